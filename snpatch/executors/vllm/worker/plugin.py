"""Entry point of vLLM's plugins: registers snpatch's model classes. Runs in all processes, so it imports little.

The dual-stream class of architecture X is registered as "SnpatchX" and built when vLLM loads it. The Beavertails
layout, for which vLLM has no model, is SCORE_ARCHITECTURE.
"""

import os
import sys

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import processes, zeroing

TESTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
)
PREFIX = "Snpatch"
SCORE_ARCHITECTURE = "SnpatchLlamaForScore"
SURGERY_MODULE = "snpatch.executors.vllm.worker.surgery"
UNTESTED_VARIABLE = "SNPATCH_UNTESTED_ARCHITECTURES"  # architectures that the client process has allowed


def register() -> None:
    """Register the model classes; entry point of the group vllm.general_plugins, may run more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    _check_fork()
    processes.ignore_ctrl_c()
    if zeroing.ENABLED in os.environ:
        zeroing.enable()
    known = ModelRegistry.get_supported_archs()
    for architecture in (*TESTED_ARCHITECTURES, *_untested()):
        if PREFIX + architecture not in known:
            ModelRegistry.models[PREFIX + architecture] = _registry_entry(SURGERY_MODULE, PREFIX + architecture)
        if architecture in MODELS_CONFIG_MAP:  # vLLM's changes of its settings for an architecture, by name
            MODELS_CONFIG_MAP[PREFIX + architecture] = MODELS_CONFIG_MAP[architecture]
    if SCORE_ARCHITECTURE not in known:
        target = f"snpatch.executors.vllm.worker.score_head:{SCORE_ARCHITECTURE}"
        ModelRegistry.register_model(SCORE_ARCHITECTURE, target)


@processes.report_errors()
def _check_fork() -> None:
    """Raise if this process was forked after CUDA had started, because it cannot use a GPU."""
    import torch

    if torch.cuda._is_in_bad_fork():
        raise SnpatchError(
            "this program asked torch about a GPU before it imported snpatch, and that started CUDA, which processes "
            "that vLLM forks cannot use: import snpatch first, or set VLLM_WORKER_MULTIPROC_METHOD=spawn"
        )


def add_untested(architecture: str) -> None:
    """Make `register` include an architecture, here and in vLLM processes that start later."""
    os.environ[UNTESTED_VARIABLE] = ",".join(sorted({*_untested(), architecture}))


def _untested() -> list[str]:
    return [name for name in os.environ.get(UNTESTED_VARIABLE, "").split(",") if name]


def _registry_entry(module: str, name: str):
    """Return vLLM's registry entry for a dual-stream class.

    vLLM inspects the class in a process of its own, which takes 13 s, to keep CUDA out of this one. A process that has
    imported the surgery runs models itself, and inspects the class here.
    """
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    class DualStreamEntry(_LazyRegisteredModel):
        def inspect_model_cls(self) -> _ModelInfo:
            if SURGERY_MODULE not in sys.modules:
                return super().inspect_model_cls()
            return _ModelInfo.from_model_cls(self.load_model_cls())

    return DualStreamEntry(module_name=module, class_name=name)
