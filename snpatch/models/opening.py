"""Opening a model: its tokenizer, weights, template and adapters, as a config names them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from transformers import AutoConfig

from snpatch.config import OWN_SET, EngineConfig, ModelSource
from snpatch.errors import SnpatchError
from snpatch.models.adapters import identity, load_adapters
from snpatch.models.checkpoint import eos_ids
from snpatch.models.digest import digest_of_adapter, digest_of_checkpoint, revision_of
from snpatch.models.model import Model, Weights
from snpatch.models.pairing import check_pair
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import open_template
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


class Opened:
    """What an engine knows of its model before and beside what runs it. models: name -> Model.

    templates: how each set of weights reads chats; a checkpoint without a chat template reads them as the other does.
    """

    def __init__(self, config: EngineConfig) -> None:
        from transformers import AutoTokenizer  # brings scikit-learn with it, and takes two seconds

        self.tokenizer = load_pretrained(AutoTokenizer, config.model)
        self._tokenizers = [self.tokenizer] * (1 if config.second is None else 2)
        if config.second is not None and config.second.weights is not None:
            self._tokenizers[1] = load_pretrained(AutoTokenizer, config.second.weights)
            check_pair(config.model, config.second.weights, *self._tokenizers)
        own, other = self._tokenizers[0], self._tokenizers[-1]
        own.chat_template, other.chat_template = (
            own.chat_template or other.chat_template,
            other.chat_template or own.chat_template,
        )
        self.templates = [
            open_template(config.template, tokenizer, _adapters_on(config, place))
            for place, tokenizer in enumerate(self._tokenizers)
        ]
        self.models: dict[str, Model] = {}
        self._config = config

    @cached_property
    def sets(self) -> dict[ModelSource, Weights]:
        """The checkpoints, which are hashed when this is first asked for: after their architecture was looked at."""
        config = self._config
        found = [OWN_SET] if config.second is None else [OWN_SET, config.second]
        tokenizers = self._tokenizers
        return {one: _weights(config, one, tokenizers[place], place) for place, one in enumerate(found)}

    def add(self, sources: Mapping[str, ModelSource], geometry, check: Callable[[str, Model], None]) -> None:
        """Load adapters, each model under its name; check: what the executor has to say to it."""
        if not self.models:
            self.models[BASE] = Model(self.sets[OWN_SET], identity(geometry.n_layers, geometry.widths))
        for name, source in sources.items():
            if name in self.models:
                raise SnpatchError(f"model name {name!r} is taken")
            scales = identity(geometry.n_layers, geometry.widths)
            if source.adapters:
                scales = load_adapters(source.adapters, geometry.n_layers, geometry.widths)
            model = Model(self.sets[source.set], scales)
            check(name, model)
            self.models[name] = model

    def digest_of(self, model: Model) -> str:
        """Names a model with its template and tokenizer by content."""
        parts = [model.digest, self.templates[model.weights.place].digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _adapters_on(config: EngineConfig, place: int) -> list[str | Path]:
    """The adapter folders of all models on one set of weights."""
    sources = (one for one in config.sources.values() if (one.set != OWN_SET) == bool(place))
    return [folder for source in sources for folder in source.adapters]


def _weights(config: EngineConfig, source: ModelSource, tokenizer, place: int) -> Weights:
    settings, name = {n: v for n, v in config.vllm.items() if n not in RESOURCES}, source.weights or config.model
    own = digest_of_checkpoint(name, has_weights=settings.get("load_format") != "dummy")
    parts = [own, *map(digest_of_adapter, source.lora)]
    digest = own if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    named = json.dumps({"dtype": _dtype(config), **settings}, sort_keys=True, default=str)
    ends = eos_ids(name, load_pretrained(AutoConfig, name), tokenizer)
    return Weights(name, digest, revision_of(name), named, ends, place)


def _dtype(config: EngineConfig) -> str:
    """The dtype of the weights as they run, so that "auto" and the checkpoint's own, when it is named, are the same."""
    own = load_pretrained(AutoConfig, config.model).dtype if config.dtype == "auto" else None
    return config.dtype if own is None else str(own).removeprefix("torch.")
