"""Opening a model: its tokenizer, weights, template and adapters, as a config names them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

from transformers import AutoConfig

from snpatch.config import OWN_SET, EngineConfig, ModelSource
from snpatch.errors import SnpatchError
from snpatch.models.adapters import IA3Scales, load_adapters
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint, get_revision
from snpatch.models.lora import load_lora
from snpatch.models.model import Model, Weights
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained
from snpatch.models.text_processing import has_text_files, load_text_processors
from snpatch.names import BASE

# vLLM's arguments that change how fast a text is made, or how much room there is, and not which text it is. All others
# are part of what names a model.
RESOURCES = (
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
    """What an engine knows of its model before and beside what runs it. models: name -> Model.

    readers: how each set of weights reads chats and ends texts. notes: what the user should know.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.notes = Notes()
        self.text_processors = load_text_processors(config, self.notes)
        self.tokenizer, self.templates = (
            self.text_processors[0].tokenizer,
            [reader.template for reader in self.text_processors],
        )
        self.models: dict[str, Model] = {}
        self._config = config

    @cached_property
    def sets(self) -> dict[ModelSource, Weights]:
        """The checkpoints, which are hashed when this is first asked for: after their architecture was looked at."""
        config = self._config
        found = [OWN_SET] if config.second is None else [OWN_SET, config.second]
        return {
            one: _weights(config, one, self.text_processors[place].eos_ids, place) for place, one in enumerate(found)
        }

    def add(self, sources: Mapping[str, ModelSource], geometry, check: Callable[[str, Model], None]) -> None:
        """Load adapters, each model under its name; check: what the executor has to say to it."""
        if not self.models:
            self.models[BASE] = Model(self.sets[OWN_SET], IA3Scales.ones(geometry.n_layers, geometry.widths))
        checked: set[str] = set()  # every model of the second set names the same LoRA folders
        for name, source in sources.items():
            if name in self.models:
                raise SnpatchError(f"model name {name!r} is taken")
            for folder in source.lora:
                if folder not in checked:
                    self._check_lora(folder)
                    checked.add(folder)
            scales = IA3Scales.ones(geometry.n_layers, geometry.widths)
            if source.adapters:
                scales = load_adapters(source.adapters, geometry.n_layers, geometry.widths)
                if scales.is_identity:
                    self._tell_plain(" on ".join(map(str, source.adapters)), "all of its scales are 1")
            model = Model(self.sets[source.set], scales)
            check(name, model)
            self.models[name] = model

    def check_beside(self, source: ModelSource) -> None:
        """Raise an error for adapters that come after the start and bring another way to read texts."""
        if not any(map(has_text_files, source.adapters)):
            return
        name = "an adapter added later"
        later = replace(self._config, adapters={**self._config.adapters, name: source.adapters})
        reader, own = load_text_processors(later, self.notes)[0], self.text_processors[0]
        if (reader.template.fingerprint, reader.eos_ids) != (own.template.fingerprint, own.eos_ids):
            raise SnpatchError(
                f"{', '.join(source.adapters)}: its template, tokenizer or EOS is not what this engine of "
                f"{self._config.model} reads by: give the adapter when the engine starts"
            )

    def digest_of(self, model: Model) -> str:
        """Names a model with its template and tokenizer by content."""
        parts = [model.fingerprint, self.templates[model.weights.index].fingerprint, sorted(model.weights.eos_ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _check_lora(self, folder: str) -> None:
        lora, config = (
            load_lora(folder),
            load_pretrained(AutoConfig, self._config.second.checkpoint or self._config.model),
        )
        if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} & lora.updates.keys():
            raise SnpatchError(
                f"{folder}: it has a LoRA on the head of a model whose head is its embedding: merge this adapter with "
                "PEFT (merge_and_unload) and give the checkpoint"
            )
        if lora.is_zero:
            self._tell_plain(folder, "all of its updates are 0")

    def _tell_plain(self, folders: str, why: str) -> None:
        self.notes.add(f"plain {folders}", f"{folders} changes nothing ({why}): it was never trained, or saved wrong")


def _weights(config: EngineConfig, source: ModelSource, ends: frozenset[int], place: int) -> Weights:
    settings, name = {n: v for n, v in config.vllm.items() if n not in RESOURCES}, source.checkpoint or config.model
    own = fingerprint_checkpoint(name, has_weights=settings.get("load_format") != "dummy")
    parts = [own, *map(fingerprint_adapter, source.lora)]
    fingerprint = own if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    named = json.dumps({"dtype": _dtype(config), **settings}, sort_keys=True, default=str)
    return Weights(name, fingerprint, get_revision(name), named, ends, place)


def _dtype(config: EngineConfig) -> str:
    """The dtype of the weights as they run, so that "auto" and the checkpoint's own, when it is named, are the same."""
    own = load_pretrained(AutoConfig, config.model).dtype if config.dtype == "auto" else None
    return config.dtype if own is None else str(own).removeprefix("torch.")
