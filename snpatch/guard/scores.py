"""Scores of a guard: accuracy, AUC and calibration of its probabilities, with bootstrap intervals over prompts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.guard.fitting import validate_labels
from snpatch.guard.resampling import percentile_interval, resample, weighted_auc

NUM_BINS = 10  # of the calibration curve, of equal width
FEW_PROMPTS = 20  # of a class, below which an interval over prompts is a guess


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
    names = "accuracy", "balanced_accuracy", "auc", "brier", "calibration_error", "majority"
    draws = resample(lambda weights: _score(p, y, threshold, weights), [len(y)], resamples)
    intervals = (percentile_interval(row, confidence).columns(name) for name, row in zip(names, draws, strict=True))
    scores: dict[str, Any] = {name: value for columns in intervals for name, value in columns.items()}
    return GuardScores(len(y), int(y.sum()), **scores, curve=_calibration_curve(p, y))


def warn_of_few_prompts(name: str, labels: np.ndarray) -> list[str]:
    """Return a warning if a class has too few prompts for reliable intervals, else nothing."""
    harmful, n = int(np.sum(labels)), len(labels)
    if min(harmful, n - harmful) >= FEW_PROMPTS:
        return []
    return [
        f"{name}: of {n} prompts {harmful} are harmful and {n - harmful} harmless; with fewer than {FEW_PROMPTS} of a "
        "class, scores and their intervals are unreliable."
    ]


def _score(p: np.ndarray, y: np.ndarray, threshold: float, weights: np.ndarray) -> np.ndarray:
    """Return the six scores of evaluate in their order, [6, resamples]. weights: [resamples, prompts]."""
    predicted, num_prompts = p > threshold, weights.sum(1)
    recalls = [weights @ ((predicted == c) & (y == c)) / (weights @ (y == c)) for c in (False, True)]
    majority_class = y.mean() >= 0.5
    bins = _bin_index(p)[:, None] == np.arange(NUM_BINS)
    return np.stack(
        [
            weights @ (predicted == y) / num_prompts,
            sum(recalls) / 2,
            weighted_auc(p, y, weights),
            weights @ np.square(p - y) / num_prompts,
            np.abs(weights @ ((y - p)[:, None] * bins)).sum(1) / num_prompts,
            weights @ (y == majority_class) / num_prompts,
        ]
    )


def _bin_index(p):
    return np.minimum(p * NUM_BINS, NUM_BINS - 1).astype(int)


def _calibration_curve(p, y) -> tuple[CalibrationBin, ...]:
    bins = _bin_index(p)
    return tuple(
        CalibrationBin(b / NUM_BINS, (b + 1) / NUM_BINS, int(n), float(p[bins == b].mean()), float(y[bins == b].mean()))
        for b, n in enumerate(np.bincount(bins, minlength=NUM_BINS))
        if n
    )
