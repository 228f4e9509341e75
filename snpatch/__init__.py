"""snpatch: find safety neurons, patch them while text is generated, and measure what that changes.

The public names load on first use, so that `snpatch --help` does not wait for torch.
"""

import importlib
import os

# Asked about a GPU, torch would start CUDA, and a process that vLLM forks off could not use it any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "AsyncEngine": "async_engine",
    "EngineConfig": "config",
    "Completion": "requests",
    "Sampling": "sampling",
    "Patch": "patching.patch",
    "Clause": "patching.patch",
    "Window": "ranking.window",
    "Constant": "patching.patch",
    "Noise": "patching.patch",
    "Scale": "patching.patch",
    "Ranking": "ranking.ranking",
    "Guard": "guard.guard",
    "ScoreModel": "judges.score_model",
    "ExperimentContext": "experiments.context",
    "load_experiment_config": "experiments.config",
    "SnpatchError": "errors",
    "ReceiptError": "errors",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'snpatch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"snpatch.{_HOMES[name]}"), name)
