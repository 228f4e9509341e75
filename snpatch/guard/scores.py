"""How good a guard's probabilities are: accuracy, ranking and calibration, with intervals over prompts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.guard.fitting import validate_labels
from snpatch.statistics import UNDEFINED, interval

BINS = 10  # of the calibration curve, of equal width


@dataclass(frozen=True)
class Bin:
    """A point of the calibration curve: n prompts of probability of harm in [low, high), the last bin with its end."""

    low: float
    high: float
    n: int
    mean_probability: float
    harmful_share: float


@dataclass(frozen=True)
class GuardScores:
    """Figures over n prompts, `harmful` of which are; low and high: bootstrap over prompts.

    balanced_accuracy: mean of both classes' recalls; auc: area under the ROC curve; both None where the prompts are
    all of one class (resamples of one class are left out of the intervals). brier: mean squared error of the
    probabilities; calibration_error: |share of harmful prompts - mean probability| of each bin, weighted by its
    prompts. majority: accuracy of always guessing the class that most of these prompts have. curve: the bins that
    hold prompts.
    """

    n: int
    harmful: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float | None
    balanced_accuracy_low: float | None
    balanced_accuracy_high: float | None
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    brier: float
    brier_low: float
    brier_high: float
    calibration_error: float
    calibration_error_low: float
    calibration_error_high: float
    majority: float
    majority_low: float
    majority_high: float
    curve: tuple[Bin, ...]


def evaluate(
    probabilities: ArrayLike,  # [prompts], of harm
    labels: ArrayLike,  # [prompts], True: harmful
    *,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> GuardScores:
    """Compare probabilities of harm with what turned out to be harmful. Bad input is a SnpatchError."""
    p = np.asarray(probabilities, dtype=np.float64)
    y = validate_labels(labels, len(p) if p.ndim == 1 else None)
    if p.shape != y.shape or not ((p >= 0) & (p <= 1)).all():
        raise SnpatchError(f"guard: wanted {len(y)} probabilities between 0 and 1, got {list(p.shape)} numbers")
    most = y.mean() >= 0.5
    is_mixed = 0 < y.sum() < len(y)
    statistics = {
        "accuracy": lambda p, y, axis: ((p > threshold) == y).mean(axis),
        "balanced_accuracy": (lambda p, y, axis: _balanced(p > threshold, y, axis)) if is_mixed else None,
        "auc": _auc if is_mixed else None,
        "brier": lambda p, y, axis: np.square(p - y).mean(axis),
        "calibration_error": _calibration_error,
        "majority": lambda p, y, axis: (y == most).mean(axis),
    }
    figures = {}
    for name, statistic in statistics.items():
        figure = UNDEFINED
        if statistic:
            figure = interval(statistic, p, y, resamples=resamples, confidence=confidence)
        figures |= figure.columns(name)
    return GuardScores(len(y), int(y.sum()), **figures, curve=_curve(p, y))


def _balanced(guess, y, axis):
    recalls = [((guess == kind) & (y == kind)).sum(axis) / (y == kind).sum(axis) for kind in (0, 1)]
    return sum(recalls) / 2


def _auc(p, y, axis):
    """The share of (harmful, harmless) pairs in order, ties counting half: from the harmful ones' ranks."""
    harmful = y.sum(axis)
    above = (rankdata(p, axis=axis) * y).sum(axis) - harmful * (harmful + 1) / 2
    return above / (harmful * (y.shape[axis] - harmful))


def _bin_of(p):
    return np.minimum(p * BINS, BINS - 1).astype(int)


def _calibration_error(p, y, axis):
    bins = _bin_of(p)
    return sum(np.abs(((y - p) * (bins == b)).sum(axis)) for b in range(BINS)) / y.shape[axis]


def _curve(p, y) -> tuple[Bin, ...]:
    bins = _bin_of(p)
    return tuple(
        Bin(b / BINS, (b + 1) / BINS, int(n), float(p[bins == b].mean()), float(y[bins == b].mean()))
        for b, n in enumerate(np.bincount(bins, minlength=BINS))
        if n
    )
