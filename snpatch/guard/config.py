"""GuardConfig: how a guard is fitted and what it does. Kept free of torch: the CLI takes its defaults from here."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.utils.schema import option


@dataclass(frozen=True)
class GuardConfig:
    """How a guard is fitted and what it does.

    C: inverse strength of the L2 penalty on the scaled features; of several, the one with the least log loss in
    cross-validation. class_weight: None or "balanced" (each class counts the same; the probabilities then are those
    of an even mix). folds: of every cross-validation, stratified and drawn by `seed`. max_iter: steps within which
    the fit must converge. threshold: prompts of a higher probability of harm are refused, with the text `refusal`.
    """

    C: float | tuple[float, ...] = 1.0
    class_weight: str | None = None
    folds: int = option(5, "Of the cross-validation.", min=2)
    seed: int = 0
    max_iter: int = 1000
    threshold: float = option(0.5, "Prompts of a higher probability of harm are refused.")
    refusal: str = option("I cannot help with that.", "The text that refused prompts get.")

    def __post_init__(self) -> None:
        strengths = tuple(self.C) if isinstance(self.C, Iterable) else (self.C,)
        object.__setattr__(self, "C", strengths)
        for valid, message in (
            (
                strengths and all(C > 0 and math.isfinite(C) for C in strengths),
                f"C must be positive, one value or several, got {strengths}",
            ),
            (
                self.class_weight in (None, "balanced"),
                f"class_weight must be None or 'balanced', got {self.class_weight!r}",
            ),
            (self.folds >= 2, f"folds must be at least 2, got {self.folds}"),
            (self.max_iter >= 1, f"max_iter must be at least 1, got {self.max_iter}"),
            (0 < self.threshold < 1, f"threshold must lie between 0 and 1, got {self.threshold}"),
            (self.refusal.strip(), "refusal must be a text: it stands in the place of an answer"),
        ):
            if not valid:
                raise SnpatchError(f"guard: {message}")
