"""What vLLM is started with: its engine arguments, ours and the user's, checked. For twins and for score models alike.

Why as much as can be is checked here: vLLM's start takes its time. lifetime.py starts it.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING, is_dataclass, replace
from importlib.metadata import entry_points

import torch

from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.base import Geometry
from snpatch.executors.vllm import log, versions
from snpatch.executors.vllm.settings import DualStreamSettings, dual_stream_capture_sizes
from snpatch.executors.vllm.worker import plugin
from snpatch.models.checkpoint import ARCHITECTURES, check_has_weights, load_config
from snpatch.models.fingerprint import local_snapshot
from snpatch.models.model import Model
from snpatch.models.text_processing import TextProcessor

PLUGINS = "VLLM_PLUGINS"  # those that vLLM loads, where it is set
BIND = "VLLM_CPU_OMP_THREADS_BIND"
CAPTURES = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "performance_mode"}
BOUND = "SNPATCH_CPU_OMP_THREADS_BIND"  # what we bound, to tell it from what the user did


class DualStreamLaunch:
    """What a twin of a config is started with. geometry is known before it is. readers: of each set of weights."""

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        versions.check()
        arguments, model = dict(config.vllm), config.model
        own = load_config(model, config.allow_untested)
        if config.batch_size is not None:
            if "max_num_seqs" in arguments:
                raise SnpatchError("backend vllm: batch_size is max_num_seqs; give one of them")
            arguments["max_num_seqs"] = config.batch_size
        if arguments.get("load_format") != "dummy":
            check_has_weights(model)
        self.geometry = geometry_of(own, arguments.get("max_model_len"), config.dtype)
        second = config.second
        if second is not None:
            if config.capacity.streams == 1:
                raise SnpatchError("streams=1: a second set of weights runs in a second stream; start two engines")
            name = second.checkpoint or model
            other = load_config(name, config.allow_untested)
            if arguments.get("load_format") != "dummy":
                check_has_weights(name)
            least = {"vocab_size": min(own.vocab_size, other.vocab_size)}
            if "max_model_len" not in arguments:
                least["context"] = min(self.geometry.context, other.max_position_embeddings)
            self.geometry = replace(self.geometry, **least)
        self._arguments = dual_stream_arguments(model, own, config.dtype, arguments)
        self._arguments["tokenizer"] = str(text_processors[0].tokenizer.name_or_path)  # perhaps an adapter's
        is_eager = bool(self._arguments.get("enforce_eager"))
        self.settings = DualStreamSettings.build(
            config.capacity,
            [reader.eos_ids for reader in text_processors],
            second,
            is_eager=is_eager,
            allow_untested=config.allow_untested,
        )
        if self.settings.scales_kv and "k_proj" not in self.geometry.widths:
            raise SnpatchError(f"scales_kv: a {own.model_type} model has no k_proj and v_proj of their own")

    def check_model(self, name: str, model: Model) -> None:
        """An error for keys or values that the engine is started without scaling."""
        if self.settings.scales_kv is False and model.scales_kv:
            raise SnpatchError(
                f"adapter {name}: it scales k_proj or v_proj, and this engine was started without; "
                "start it with scales_kv=True"
            )

    def engine_args(self, scales_kv: bool):
        """vLLM's engine arguments; from now on the settings are fixed. scales_kv: where the settings do not say."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        if self.settings.scales_kv is None:
            self.settings = replace(self.settings, scales_kv=scales_kv)
        # vLLM wants room for a token after every prompt; a text that fills the context is read all the same.
        own = {"max_model_len": self.geometry.context + 1}
        if self.settings.streams == 2 and not CAPTURES & self._arguments.keys():
            own["cudagraph_capture_sizes"] = dual_stream_capture_sizes(self._arguments.get("max_num_seqs"))
        own["additional_config"] = {**self._arguments.get("additional_config", {}), **self.settings.as_config()}
        return AsyncEngineArgs(**{**self._arguments, **own})


def geometry_of(config, max_model_len: int | None, dtype: str) -> Geometry:
    """Return the sizes of a model. dtype: as EngineConfig has it."""
    widths = {"down_proj": config.intermediate_size}
    if config.model_type != "phi3":  # whose queries, keys and values are one projection
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * head)
    context = config.max_position_embeddings if max_model_len is None else max_model_len
    if not 1 <= context <= config.max_position_embeddings:
        raise SnpatchError(f"max_model_len must lie in 1..{config.max_position_embeddings}, got {context}")
    return Geometry(
        config.num_hidden_layers,
        config.intermediate_size,
        context,
        config.vocab_size,
        widths,
        resolve_dtype(config, dtype),
    )


def resolve_dtype(config, dtype: str) -> str:
    """Return the dtype of a model's activations: the given one, or for "auto" its checkpoint's."""
    return str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype


def dual_stream_arguments(model, config, dtype: str, arguments: dict) -> dict:
    """vLLM's engine arguments for the twin of the model's architecture."""
    architecture = (config.architectures or [type(config).__name__.removesuffix("Config") + "ForCausalLM"])[0]
    if config.model_type not in ARCHITECTURES:
        plugin.add_untested(architecture)
    own = {
        "dtype": resolve_dtype(config, dtype),
        "hf_overrides": {"architectures": [plugin.PREFIX + architecture], **arguments.pop("hf_overrides", {})},
        "worker_extension_cls": "snpatch.executors.vllm.worker.commands.WorkerExtension",
    }
    checked = engine_arguments(model, own, arguments, refused=("enable_lora", "disable_cascade_attn"))
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & checked.keys():
        checked["kv_cache_memory_bytes"] = _spare_memory() // 4
    return checked


@log.redirect_output()
def engine_arguments(model, own: dict, arguments: dict, refused: Sequence[str] = ()) -> dict:
    """vLLM's engine arguments: the user's and our own, checked. refused: further ones that nobody may set."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    points = [point for point in entry_points(group="vllm.general_plugins") if point.module == plugin.__name__]
    if not points:
        raise SnpatchError("vLLM would not find snpatch's plugin: install the package (pip install -e .)")
    chosen = os.environ.get(PLUGINS)
    if chosen is not None and points[0].name not in chosen.split(","):
        raise SnpatchError(
            f"{PLUGINS}={chosen}: expected {points[0].name} among them, without which vLLM knows of no patches. "
            f"Add it, or unset {PLUGINS}."
        )
    plugin.register()
    if current_platform.is_cpu():
        _use_all_cores(arguments.get("tensor_parallel_size", 1))
        arguments.setdefault("enforce_eager", True)  # compiled measured no faster there and starts slower
    arguments.setdefault("use_tqdm_on_load", False)
    own = {
        "model": local_snapshot(model),
        "tokenizer": local_snapshot(model),
        "disable_log_stats": True,
        "generation_config": "vllm",
        **own,
    }
    taken = {*own, *refused} & arguments.keys()
    if taken:
        raise SnpatchError(f"backend vllm: {', '.join(sorted(taken))} cannot be set")
    unknown = arguments.keys() - AsyncEngineArgs.__dataclass_fields__.keys()
    if unknown:
        raise SnpatchError(f"backend vllm: neither snpatch nor vLLM has an argument {', '.join(sorted(unknown))}")
    return {**{name: _of_vllm(name, value) for name, value in arguments.items()}, **own}


def _of_vllm(name: str, value: object) -> object:
    """A table as vLLM's own config of that name, where it has one: it does not make all of them itself."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    factory = AsyncEngineArgs.__dataclass_fields__[name].default_factory
    if not isinstance(value, dict) or factory is MISSING or not is_dataclass(default := factory()):
        return value
    try:
        return type(default)(**value)
    except (TypeError, ValueError) as error:
        raise SnpatchError(f"backend vllm: {name}: {first_line(error)}") from error


def _use_all_cores(workers: int) -> None:
    """vLLM leaves a core idle on a CPU; give each worker its share of all, unless the user bound them."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // workers)
    parts = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(workers)]
    if os.environ.get(BIND) in (None, os.environ.get(BOUND)):
        os.environ[BIND] = os.environ[BOUND] = "|".join(",".join(map(str, part)) for part in parts)


def _spare_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
