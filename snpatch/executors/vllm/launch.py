"""vLLM's engine arguments, snpatch's and the user's, for dual-stream models and score models.

Why they are checked here: vLLM takes up to minutes to start. engine_lifecycle.py starts it.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING, is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from snpatch.config import EngineConfig, ModelSource
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.vllm import log, versions
from snpatch.executors.vllm.engine_settings import DualStreamSettings, dual_stream_capture_sizes
from snpatch.executors.vllm.worker import plugin
from snpatch.models.checkpoint import TESTED_ARCHITECTURES, load_config
from snpatch.models.geometry import Geometry, build_geometry, resolve_dtype
from snpatch.models.hub import resolve_revision
from snpatch.models.model import Model
from snpatch.models.text_processing import TextProcessor
from snpatch.models.weights import check_weights

PLUGINS_VARIABLE = "VLLM_PLUGINS"  # names of the only plugins that vLLM loads
BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
CAPTURE_ARGUMENTS = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "performance_mode"}
OWN_BIND_VARIABLE = "SNPATCH_CPU_OMP_THREADS_BIND"  # snpatch's value of it, to recognize a user's


class DualStreamLaunch:
    """Engine arguments and settings of a dual-stream engine. text_processors: one for each set of weights."""

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        versions.check()
        arguments: dict[str, Any] = {**config.vllm}
        model = config.model
        model_config = load_config(model, config.allow_untested)
        if config.batch_size is not None:
            if "max_num_seqs" in arguments:
                raise SnpatchError("backend vllm: batch_size: expected no max_num_seqs with it, got both. Pass one.")
            arguments["max_num_seqs"] = config.batch_size
        if arguments.get("load_format") != "dummy":
            check_weights(model, model_config)
        self.geometry = build_geometry(model_config, config.dtype, arguments.get("max_model_len"))
        if config.secondary is not None:
            self.geometry = self._common_geometry(config, config.secondary, arguments)
        self._arguments = dual_stream_arguments(model, model_config, config.dtype, arguments)
        self._arguments["tokenizer"] = str(text_processors[0].tokenizer.name_or_path)  # an adapter may have its own
        self.settings = DualStreamSettings.build(
            config.capacity,
            [text_processor.eos_ids for text_processor in text_processors],
            config.secondary,
            is_eager=bool(self._arguments.get("enforce_eager")),
            allow_untested=config.allow_untested,
        )
        if self.settings.scales_kv and "k_proj" not in self.geometry.widths:
            raise SnpatchError(f"scales_kv: a {model_config.model_type} model has no separate k_proj and v_proj")

    def _common_geometry(self, config: EngineConfig, source: ModelSource, arguments: dict) -> Geometry:
        """Check the secondary model, and return the sizes that both models support."""
        if config.capacity.streams == 1:
            raise SnpatchError("streams=1: secondary weights run in a second stream; start two engines")
        secondary = source.checkpoint or config.model
        secondary_config = load_config(secondary, config.allow_untested)
        if arguments.get("load_format") != "dummy":
            check_weights(secondary, secondary_config)
        context = None if "max_model_len" in arguments else secondary_config.max_position_embeddings
        return self.geometry.limit(secondary_config.vocab_size, context)

    def check_model(self, name: str, model: Model) -> None:
        """Raise if a model scales keys or values and the engine is started without that."""
        if self.settings.scales_kv is False and model.scales_kv:
            raise SnpatchError(
                f"adapter {name}: it scales k_proj or v_proj, and this engine was started without; "
                "start it with scales_kv=True"
            )

    def engine_args(self, scales_kv: bool):
        """Return vLLM's engine arguments; the settings are fixed from now on.

        scales_kv: whether adapters scale keys or values, if the settings leave it open.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs

        if self.settings.scales_kv is None:
            self.settings = replace(self.settings, scales_kv=scales_kv)
        # vLLM requires space for a token after every prompt; with one more, a prompt can fill the context.
        fixed: dict[str, Any] = {"max_model_len": self.geometry.context + 1}
        if self.settings.streams == 2 and not CAPTURE_ARGUMENTS & self._arguments.keys():
            fixed["cudagraph_capture_sizes"] = dual_stream_capture_sizes(self._arguments.get("max_num_seqs"))
        fixed["additional_config"] = {**self._arguments.get("additional_config", {}), **self.settings.as_config()}
        return AsyncEngineArgs(**{**self._arguments, **fixed})


def dual_stream_arguments(model, config, dtype: str, arguments: dict) -> dict:
    """Return vLLM's engine arguments for the dual-stream class of a model's architecture."""
    architecture = (config.architectures or [type(config).__name__.removesuffix("Config") + "ForCausalLM"])[0]
    if config.model_type not in TESTED_ARCHITECTURES:
        plugin.add_untested(architecture)
    fixed = {
        "dtype": resolve_dtype(config, dtype),
        "hf_overrides": {"architectures": [plugin.PREFIX + architecture], **arguments.pop("hf_overrides", {})},
        "worker_extension_cls": "snpatch.executors.vllm.worker.commands.WorkerExtension",
    }
    checked = engine_arguments(model, fixed, arguments, refused=("enable_lora", "disable_cascade_attn"))
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & checked.keys():
        checked["kv_cache_memory_bytes"] = _free_memory_bytes() // 4
    return checked


@log.redirect_output()
def engine_arguments(model, fixed: dict, arguments: dict, refused: Sequence[str] = ()) -> dict:
    """Merge and check the user's and snpatch's engine arguments.

    fixed: snpatch's arguments, which a user cannot set. refused: further arguments that a user must not set.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    entries = [point for point in entry_points(group="vllm.general_plugins") if point.module == plugin.__name__]
    if not entries:
        raise SnpatchError(
            "vLLM's plugins: expected snpatch's entry point, found none. Install the package (pip install -e .)."
        )
    enabled = os.environ.get(PLUGINS_VARIABLE)
    if enabled is not None and entries[0].name not in enabled.split(","):
        raise SnpatchError(
            f"{PLUGINS_VARIABLE}={enabled}: expected {entries[0].name} in the list. "
            f"Add it, or unset {PLUGINS_VARIABLE}."
        )
    plugin.register()
    if current_platform.is_cpu():
        _use_all_cores(arguments.get("tensor_parallel_size", 1))
        arguments.setdefault(
            "enforce_eager", True
        )  # compiled, it starts slower and was measured to run no faster on a CPU
    arguments.setdefault("use_tqdm_on_load", False)
    fixed = {
        "model": resolve_revision(model),
        "tokenizer": resolve_revision(model),
        "disable_log_stats": True,
        "generation_config": "vllm",
        **fixed,
    }
    reserved = {*fixed, *refused} & arguments.keys()
    if reserved:
        raise SnpatchError(f"backend vllm: {', '.join(sorted(reserved))} cannot be set")
    unknown = arguments.keys() - AsyncEngineArgs.__dataclass_fields__.keys()
    if unknown:
        raise SnpatchError(f"backend vllm: neither snpatch nor vLLM has an argument {', '.join(sorted(unknown))}")
    return {**{name: _to_vllm_config(name, value) for name, value in arguments.items()}, **fixed}


def _to_vllm_config(name: str, value: object) -> object:
    """Return a table as vLLM's config class of that argument, if it has one.

    vLLM does not convert all of them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    factory = AsyncEngineArgs.__dataclass_fields__[name].default_factory
    if not isinstance(value, dict) or factory is MISSING or not is_dataclass(default := factory()):
        return value
    try:
        return type(default)(**value)
    except (TypeError, ValueError) as error:
        raise SnpatchError(f"backend vllm: {name}: {first_line(error)}") from error


def _use_all_cores(workers: int) -> None:
    """Bind each worker to its share of all CPU cores, unless the user has bound them.

    By default vLLM leaves one core idle.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // workers)
    parts = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(workers)]
    if os.environ.get(BIND_VARIABLE) in (None, os.environ.get(OWN_BIND_VARIABLE)):
        os.environ[BIND_VARIABLE] = os.environ[OWN_BIND_VARIABLE] = "|".join(",".join(map(str, part)) for part in parts)


def _free_memory_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
