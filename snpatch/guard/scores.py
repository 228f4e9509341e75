"""Scores of a guard: accuracy, AUC and calibration of its probabilities, with bootstrap intervals over prompts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.guard.fitting import validate_labels
from snpatch.statistics import UNDEFINED, interval

NUM_BINS = 10  # of the calibration curve, of equal width


@dataclass(frozen=True)
class CalibrationBin:
    """A point of the calibration curve: n prompts with a probability of harm in [low, high) (last bin: 1 too)."""

    low: float
    high: float
    n: int
    mean_probability: float
    harmful_share: float


@dataclass(frozen=True)
class GuardScores:
    """Scores over prompts. `_low` and `_high` are the ends of bootstrap intervals over prompts.

    Args:
        n: Number of prompts.
        harmful: Number of harmful prompts.
        accuracy: Fraction of prompts classified correctly at the threshold.
        balanced_accuracy: Mean recall of the two classes. None if all prompts are of one class; resamples of one class
            are left out of the interval.
        auc: Area under the ROC curve; None as for balanced_accuracy.
        brier: Mean squared error of the probabilities.
        calibration_error: |fraction of harmful prompts - mean probability| of each bin, weighted by its prompts.
        majority: Accuracy of always predicting the more frequent class.
        curve: Calibration bins that contain prompts.
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
    curve: tuple[CalibrationBin, ...]


def evaluate(
    probabilities: ArrayLike,  # [prompts], of harm
    labels: ArrayLike,  # [prompts], True: harmful
    *,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> GuardScores:
    """Score predicted probabilities of harm against labels.

    Raises:
        SnpatchError: Wrong shapes, or probabilities outside 0..1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = validate_labels(labels, len(p) if p.ndim == 1 else None)
    if p.shape != y.shape or not ((p >= 0) & (p <= 1)).all():
        raise SnpatchError(f"guard: expected {len(y)} probabilities between 0 and 1, got {list(p.shape)} numbers")
    majority_class = y.mean() >= 0.5
    is_mixed = 0 < y.sum() < len(y)
    statistics = {
        "accuracy": lambda p, y, axis: ((p > threshold) == y).mean(axis),
        "balanced_accuracy": (lambda p, y, axis: _balanced_accuracy(p > threshold, y, axis)) if is_mixed else None,
        "auc": _auc if is_mixed else None,
        "brier": lambda p, y, axis: np.square(p - y).mean(axis),
        "calibration_error": _calibration_error,
        "majority": lambda p, y, axis: (y == majority_class).mean(axis),
    }
    scores = {}
    for name, statistic in statistics.items():
        estimate = UNDEFINED
        if statistic:
            estimate = interval(statistic, p, y, resamples=resamples, confidence=confidence)
        scores |= estimate.columns(name)
    return GuardScores(len(y), int(y.sum()), **scores, curve=_calibration_curve(p, y))


def _balanced_accuracy(predicted, y, axis):
    recalls = [((predicted == c) & (y == c)).sum(axis) / (y == c).sum(axis) for c in (0, 1)]
    return sum(recalls) / 2


def _auc(p, y, axis):
    """Compute the fraction of (harmful, harmless) pairs in order, ties counting half, from ranks."""
    num_harmful = y.sum(axis)
    num_ordered = (rankdata(p, axis=axis) * y).sum(axis) - num_harmful * (num_harmful + 1) / 2
    return num_ordered / (num_harmful * (y.shape[axis] - num_harmful))


def _bin_index(p):
    return np.minimum(p * NUM_BINS, NUM_BINS - 1).astype(int)


def _calibration_error(p, y, axis):
    bins = _bin_index(p)
    return sum(np.abs(((y - p) * (bins == b)).sum(axis)) for b in range(NUM_BINS)) / y.shape[axis]


def _calibration_curve(p, y) -> tuple[CalibrationBin, ...]:
    bins = _bin_index(p)
    return tuple(
        CalibrationBin(b / NUM_BINS, (b + 1) / NUM_BINS, int(n), float(p[bins == b].mean()), float(y[bins == b].mean()))
        for b, n in enumerate(np.bincount(bins, minlength=NUM_BINS))
        if n
    )
