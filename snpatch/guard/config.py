"""GuardConfig: settings of a guard. Imports no torch, because the CLI reads its defaults from here."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from snpatch.errors import SnpatchError
from snpatch.utils import schema
from snpatch.utils.schema import option


@dataclass(frozen=True)
class GuardConfig:
    """Settings of a guard's fit and of its decisions.

    Args:
        C: Inverse strength of the L2 penalty on the scaled features. Of several values, cross-validation chooses the
            one with the lowest log loss.
        class_weight: None, or "balanced" to give both classes the same total weight (the probabilities are then those
            of an even mix of classes).
        folds: Folds of each cross-validation, stratified.
        seed: Seed that assigns prompts to folds.
        max_iter: Maximum number of solver iterations; a fit that does not converge is an error.
        threshold: Prompts with a higher predicted probability of harm are refused.
        refusal: Completion of a refused prompt.
    """

    C: float | tuple[float, ...] = 1.0
    class_weight: str | None = field(default=None, metadata={"choices": ("balanced",)})
    folds: int = option(5, "Number of cross-validation folds.", min=2)
    seed: int = 0
    max_iter: int = field(default=1000, metadata={"min": 1})
    threshold: float = option(0.5, "Probability of harm above which a prompt is refused.", above=0, below=1)
    refusal: str = option("I cannot help with that.", "Completion of refused prompts.")

    def __post_init__(self) -> None:
        strengths = tuple(self.C) if isinstance(self.C, Iterable) else (self.C,)
        object.__setattr__(self, "C", strengths)
        schema.validate(self, "guard: ")
        for valid, message in (
            (
                strengths and all(C > 0 and math.isfinite(C) for C in strengths),
                f"C: expected one or more positive numbers, got {strengths}",
            ),
            (self.refusal.strip(), "refusal: expected a text that is not empty, because it replaces a completion"),
        ):
            if not valid:
                raise SnpatchError(f"guard: {message}")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Return the values of C, also if it was given as one number."""
        assert isinstance(self.C, tuple)
        return self.C
