"""Opening a model: its tokenizer, weights, template and adapters, as a config names them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property

from transformers import AutoConfig

from snpatch.config import EngineConfig, Folders
from snpatch.errors import SnpatchError
from snpatch.models.adapters import identity, load_adapters
from snpatch.models.digest import digest_of_checkpoint, revision_of
from snpatch.models.model import Model, Weights
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import open_template

BASE = "base"  # the name of the weights alone
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
    "tensor_parallel_size",
    "use_tqdm_on_load",
)


class Opened:
    """What an engine knows of its model before and beside what runs it. models: name -> Model."""

    def __init__(self, config: EngineConfig) -> None:
        from transformers import AutoTokenizer  # brings scikit-learn with it, and takes two seconds

        self.tokenizer = load_pretrained(AutoTokenizer, config.model)
        folders = [folder for one in config.adapters.values() for folder in one]
        self.template = open_template(config.template, self.tokenizer, folders)
        self.models: dict[str, Model] = {}
        self._config = config

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint, which is hashed when this is first asked for: after its architecture was looked at."""
        return _weights(self._config)

    def add(self, adapters: Mapping[str, Folders], geometry, check: Callable[[str, Model], None]) -> None:
        """Load adapters, each under its name; check: what the executor has to say to a model."""
        if not self.models:
            self.models[BASE] = Model(self.weights, identity(geometry.n_layers, geometry.widths))
        for name, folders in adapters.items():
            if name in self.models:
                raise SnpatchError(f"adapter name {name!r} is taken")
            model = Model(self.weights, load_adapters(folders, geometry.n_layers, geometry.widths))
            check(name, model)
            self.models[name] = model

    def digest_of(self, model: Model) -> str:
        """Names a model with its template and tokenizer by content."""
        parts = [model.digest, self.template.digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _weights(config: EngineConfig) -> Weights:
    settings = {name: value for name, value in config.vllm.items() if name not in RESOURCES}
    digest = "dummy" if settings.get("load_format") == "dummy" else digest_of_checkpoint(config.model)
    named = json.dumps({"dtype": _dtype(config), **settings}, sort_keys=True, default=str)
    return Weights(config.model, digest, revision_of(config.model), named)


def _dtype(config: EngineConfig) -> str:
    """The dtype of the weights as they run, so that "auto" and the checkpoint's own, when it is named, are the same."""
    own = load_pretrained(AutoConfig, config.model).dtype if config.dtype == "auto" else None
    return config.dtype if own is None else str(own).removeprefix("torch.")
