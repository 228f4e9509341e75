"""vLLM's entry point: tells vLLM of the twin models. Runs in every process of vLLM, so it imports as little as can be.

A twin of architecture X is registered as "SnpatchX"; the class is made when vLLM asks for it. The Beavertails layout,
of which vLLM has no model, is there as SCORE.
"""

import os
import sys

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import processes, zeroing

TESTED = (
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
SCORE = "SnpatchLlamaForScore"
SURGERY = "snpatch.executors.vllm.worker.surgery"
UNTESTED = "SNPATCH_UNTESTED_ARCHITECTURES"  # what the user's process has tried, for the processes that it starts


def register() -> None:
    """Entry point of the group vllm.general_plugins; may run more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    _check_fork()
    processes.ignore_ctrl_c()
    if zeroing.ENABLED in os.environ:
        zeroing.enable()
    known = ModelRegistry.get_supported_archs()
    for architecture in (*TESTED, *_untested()):
        if PREFIX + architecture not in known:
            ModelRegistry.models[PREFIX + architecture] = _twin(SURGERY, PREFIX + architecture)
        if architecture in MODELS_CONFIG_MAP:  # what vLLM changes of its settings for an architecture, by its name
            MODELS_CONFIG_MAP[PREFIX + architecture] = MODELS_CONFIG_MAP[architecture]
    if SCORE not in known:
        ModelRegistry.register_model(SCORE, f"snpatch.executors.vllm.worker.score_head:{SCORE}")


@processes.report_errors()
def _check_fork() -> None:
    """Raise in a process that was forked off one in which CUDA had started: it cannot use a GPU."""
    import torch

    if torch.cuda._is_in_bad_fork():
        raise SnpatchError(
            "this program asked torch about a GPU before it imported snpatch, and that started CUDA, which processes "
            "that vLLM forks cannot use: import snpatch first, or set VLLM_WORKER_MULTIPROC_METHOD=spawn"
        )


def add_untested(architecture: str) -> None:
    """Have `register` know one more architecture, here and in all processes of vLLM that start from now on."""
    os.environ[UNTESTED] = ",".join(sorted({*_untested(), architecture}))


def _untested() -> list[str]:
    return [name for name in os.environ.get(UNTESTED, "").split(",") if name]


def _twin(module: str, name: str):
    """vLLM's entry for a twin class, which it looks at in a process of its own, for 13 s, lest this one touches CUDA.

    A process that has the surgery loaded runs models by itself, and looks at the class here.
    """
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    class DualStreamEntry(_LazyRegisteredModel):
        def inspect_model_cls(self) -> _ModelInfo:
            if SURGERY not in sys.modules:
                return super().inspect_model_cls()
            return _ModelInfo.from_model_cls(self.load_model_cls())

    return DualStreamEntry(module_name=module, class_name=name)
