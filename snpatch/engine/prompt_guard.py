"""PromptGuard: what an engine needs of a guard, so that the engine does not import the guards."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from snpatch.engine.requests import Prompt
from snpatch.utils.progress import Progress


@runtime_checkable
class PromptGuard(Protocol):
    """Predictor of harm that refuses prompts before anything is generated; see guard.Guard."""

    @property
    def threshold(self) -> float:
        """Probability of harm above which a prompt is refused."""
        ...

    @property
    def refusal(self) -> str:
        """Completion of refused prompts."""
        ...

    def predict(self, engine: Any, prompts: Sequence[Prompt], progress: Progress | bool | None = None) -> np.ndarray:
        """Predict the probability of harm of each prompt, [prompts], from 0 to 1. engine: an Engine."""
        ...
