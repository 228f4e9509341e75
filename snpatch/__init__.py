"""snpatch: find safety neurons, patch them during generation, and measure the effect.

Public names are imported on first use, because `snpatch --help` must not wait for torch.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING

# torch would otherwise start CUDA to find out whether there is a GPU, and a process that vLLM forks could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# vLLM's server sets the root logger to ERROR, which would hide snpatch's warnings.
logging.getLogger("snpatch").setLevel(logging.WARNING)

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names as _MODULES, for editors and type checkers
    from snpatch.config import Capacity as Capacity
    from snpatch.config import EngineConfig as EngineConfig
    from snpatch.config import ModelSource as ModelSource
    from snpatch.data.loading import load_dataset as load_dataset
    from snpatch.engine.async_engine import AsyncEngine as AsyncEngine
    from snpatch.engine.engine import Engine as Engine
    from snpatch.engine.requests import Completion as Completion
    from snpatch.errors import ReceiptError as ReceiptError
    from snpatch.errors import SnpatchError as SnpatchError
    from snpatch.experiments.config import load_experiment_config as load_experiment_config
    from snpatch.experiments.context import ExperimentContext as ExperimentContext
    from snpatch.guard.config import GuardConfig as GuardConfig
    from snpatch.guard.guard import Guard as Guard
    from snpatch.judges.factory import open_judge as open_judge
    from snpatch.judges.score_model import ScoreModel as ScoreModel
    from snpatch.patching.patch import Constant as Constant
    from snpatch.patching.patch import Intervention as Intervention
    from snpatch.patching.patch import Noise as Noise
    from snpatch.patching.patch import Patch as Patch
    from snpatch.patching.patch import Scale as Scale
    from snpatch.ranking.ranking import Ranking as Ranking
    from snpatch.ranking.window import Window as Window
    from snpatch.sampling import Sampling as Sampling
    from snpatch.sweeps.config import SweepConfig as SweepConfig
    from snpatch.sweeps.sweep import SweepResult as SweepResult
    from snpatch.sweeps.sweep import sweep as sweep
    from snpatch.training.trainer import train_dpo as train_dpo
    from snpatch.training.trainer import train_sft as train_sft

_MODULES = {
    "AsyncEngine": "engine.async_engine",
    "Capacity": "config",
    "Completion": "engine.requests",
    "Constant": "patching.patch",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "ExperimentContext": "experiments.context",
    "Guard": "guard.guard",
    "GuardConfig": "guard.config",
    "Intervention": "patching.patch",
    "ModelSource": "config",
    "Noise": "patching.patch",
    "Patch": "patching.patch",
    "Ranking": "ranking.ranking",
    "ReceiptError": "errors",
    "Sampling": "sampling",
    "Scale": "patching.patch",
    "ScoreModel": "judges.score_model",
    "SnpatchError": "errors",
    "SweepConfig": "sweeps.config",
    "SweepResult": "sweeps.sweep",
    "Window": "ranking.window",
    "load_dataset": "data.loading",
    "load_experiment_config": "experiments.config",
    "open_judge": "judges.factory",
    "sweep": "sweeps.sweep",
    "train_dpo": "training.trainer",
    "train_sft": "training.trainer",
}
__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]  # type checkers see the imports above


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'snpatch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"snpatch.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
