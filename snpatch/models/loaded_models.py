"""LoadedModels: the tokenizer, weights, chat template and adapters that an engine's config names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

from transformers import AutoConfig

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig, ModelSource
from snpatch.errors import SnpatchError
from snpatch.models.adapters import IA3Scales, load_adapters
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint
from snpatch.models.hub import get_revision, resolve_adapter_folder
from snpatch.models.lora import load_lora
from snpatch.models.model import Model, Weights
from snpatch.models.notes import Notes
from snpatch.models.peft_files import MERGE_WITH_PEFT, find_other_base, read_adapter_config
from snpatch.models.pretrained import load_pretrained
from snpatch.models.text_processing import has_text_files, load_text_processors
from snpatch.names import BASE
from snpatch.utils.hashing import hash_bytes, hash_json
from snpatch.utils.optional import require

# vLLM's arguments that change speed or memory but no completion. All others are part of a model's fingerprint.
RESOURCE_ARGUMENTS = (
    "async_scheduling",
    "block_size",
    "compilation_config",
    "disable_cascade_attn",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "optimization_level",
    "served_model_name",
    "tensor_parallel_size",
    "use_tqdm_on_load",
)


class LoadedModels:
    """Models of an engine, without the executor that runs them.

    Attributes:
        models: Name -> Model.
        text_processors: Tokenizer, chat template and EOS tokens of each set of weights.
        notes: Warnings for the user.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.notes = Notes()
        self.text_processors = load_text_processors(config, self.notes)
        self.tokenizer = self.text_processors[0].tokenizer
        self.templates = [processor.template for processor in self.text_processors]
        self.models: dict[str, Model] = {}
        self._config = config

    @cached_property
    def weights(self) -> dict[ModelSource, Weights]:
        """Return the checkpoints by source.

        They are hashed on first use, after the executor has checked their architecture.
        """
        config = self._config
        sources = [PRIMARY_WEIGHTS] if config.secondary is None else [PRIMARY_WEIGHTS, config.secondary]
        return {
            source: _load_weights(config, source, self.text_processors[index].eos_ids, index)
            for index, source in enumerate(sources)
        }

    def add(self, sources: Mapping[str, ModelSource], geometry, check: Callable[[str, Model], None]) -> None:
        """Load adapters and add each model under its name.

        Args:
            sources: Name -> source of the model.
            geometry: `n_layers` and `widths` of the engine's model.
            check: The executor's check of a model and its name; it raises SnpatchError.
        """
        if not self.models:
            self.models[BASE] = Model(self.weights[PRIMARY_WEIGHTS], IA3Scales.ones(geometry.n_layers, geometry.widths))
        checked: set[str] = set()  # all models on the secondary weights name the same LoRA folders
        for name, source in sources.items():
            for folder in source.lora:
                if folder not in checked:
                    self._check_lora(folder)
                    checked.add(folder)
            scales = IA3Scales.ones(geometry.n_layers, geometry.widths)
            if source.adapters:
                scales = load_adapters(source.adapters, geometry.n_layers, geometry.widths)
                if scales.is_identity:
                    self._note_no_effect(" on ".join(map(str, source.adapters)), "all of its scales are 1")
            for folder in (*source.lora, *source.adapters):
                self._note_other_base(folder, source.checkpoint or self._config.model)
            self.add_model(name, Model(self.weights[source.weights_source], scales), check)

    def add_model(self, name: str, model: Model, check: Callable[[str, Model], None]) -> None:
        """Add a model that is already loaded. check: see `add`."""
        if name in self.models:
            raise SnpatchError(f"model name {name!r} is taken")
        check(name, model)
        self.models[name] = model

    def check_late_adapter(self, source: ModelSource) -> None:
        """Check adapters that are added after the start.

        Raises:
            SnpatchError: They need another tokenizer, template or EOS.
        """
        if not any(map(has_text_files, source.adapters)):
            return
        name = "an adapter added later"
        config = replace(self._config, adapters={**self._config.adapters, name: source.adapters})
        late, current = load_text_processors(config, self.notes)[0], self.text_processors[0]
        if (late.template.fingerprint, late.eos_ids) != (current.template.fingerprint, current.eos_ids):
            raise SnpatchError(
                f"{', '.join(source.adapters)}: expected the engine's template, tokenizer and EOS (of "
                f"{self._config.model}), got others. Pass the adapter when the engine starts."
            )

    def fingerprint(self, model: Model) -> str:
        """Return the content hash of a model with its template, tokenizer and EOS tokens."""
        return hash_json(
            [model.fingerprint, self.templates[model.weights.index].fingerprint, sorted(model.weights.eos_ids)]
        )

    def _check_lora(self, folder: str) -> None:
        lora = load_lora(folder)
        config = load_pretrained(AutoConfig, require(self._config.secondary).checkpoint or self._config.model)
        if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} & lora.updates.keys():
            raise SnpatchError(
                f"{folder}: expected no LoRA on the head, which is tied to the embedding, got one. {MERGE_WITH_PEFT}"
            )
        if lora.is_zero:
            self._note_no_effect(folder, "all of its updates are 0")

    def _note_other_base(self, folder: str, model: str) -> None:
        config = read_adapter_config(resolve_adapter_folder(folder), "IA3", "LORA")
        if base := find_other_base(config, model):
            self.notes.add(f"base {folder}", f"{folder} was trained on {base}, as its config says, and runs on {model}")

    def _note_no_effect(self, folders: str, why: str) -> None:
        self.notes.add(f"plain {folders}", f"{folders} changes nothing ({why}): it was never trained, or saved wrong")


def _load_weights(config: EngineConfig, source: ModelSource, eos_ids: frozenset[int], index: int) -> Weights:
    name = source.checkpoint or config.model
    arguments = {key: value for key, value in config.vllm.items() if key not in RESOURCE_ARGUMENTS}
    checkpoint = fingerprint_checkpoint(name, has_weights=arguments.get("load_format") != "dummy")
    parts = [checkpoint, *map(fingerprint_adapter, source.lora)]
    fingerprint = checkpoint if len(parts) == 1 else hash_bytes(" ".join(parts).encode())
    settings = json.dumps({"dtype": _resolve_dtype(config), **arguments}, sort_keys=True, default=str)
    return Weights(name, fingerprint, get_revision(name), settings, eos_ids, index)


def _resolve_dtype(config: EngineConfig) -> str:
    """Return the dtype in which the weights run, so that "auto" equals the checkpoint's own dtype by name."""
    own = load_pretrained(AutoConfig, config.model).dtype if config.dtype == "auto" else None
    return config.dtype if own is None else str(own).removeprefix("torch.")
