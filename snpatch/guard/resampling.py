"""Bootstrap over prompts, and over the seeds of random controls, with the same resamples for all guards.

Why weights: a resample is how often each prompt was drawn. All guards are scored with the same weights, so their
differences are paired, and a score of a thousand resamples is one matrix product.
"""

from collections.abc import Callable, Sequence

import numpy as np

from snpatch.errors import SnpatchError
from snpatch.statistics import Interval

SEED = 0
MAX_WEIGHTS = 2**23  # in memory at once


def resample(
    score: Callable[[np.ndarray], np.ndarray],  # weights [resamples, prompts] -> [scores, resamples]
    sizes: Sequence[int],
    resamples: int,
) -> np.ndarray:
    """Return scores of the prompts themselves and of each resample, [scores, 1 + resamples] float64.

    Args:
        score: Computes scores from weights: how often each prompt counts.
        sizes: Number of prompts of each set. Each set is resampled by itself, and the columns of the weights are the
            prompts of all sets in order.
        resamples: Number of resamples.

    Raises:
        SnpatchError: resamples is less than 1.
    """
    if resamples < 1:
        raise SnpatchError(f"bootstrap: resamples: expected at least 1, got {resamples}")
    rng, total = np.random.default_rng(SEED), sum(sizes)
    with np.errstate(invalid="ignore", divide="ignore"):  # undefined scores are NaN
        blocks = [score(np.ones((1, total)))]
        for start in range(0, resamples, chunk := max(1, MAX_WEIGHTS // total)):
            count = min(chunk, resamples - start)
            blocks.append(score(np.concatenate([_draw_weights(rng, count, n) for n in sizes], axis=1)))
    return np.concatenate(blocks, axis=1)


def average_seeds(
    scores: np.ndarray,  # [seeds, 1 + resamples]
) -> np.ndarray:
    """Return the mean over the seeds of a random control, [1 + resamples].

    Each resample has other draws of the seeds, too: their mean is drawn from Student's t around that of these S seeds,
    with S - 1 degrees of freedom and their standard error, because five values are too few to be resampled themselves.
    One seed shows no spread, so all resamples are NaN.
    """
    num_seeds, columns = scores.shape
    if num_seeds < 2:
        return np.concatenate([scores[0, :1], np.full(columns - 1, np.nan)])
    error = scores[:, 0].std(ddof=1) / np.sqrt(num_seeds)
    shifts = np.random.default_rng(SEED).standard_t(num_seeds - 1, size=columns) * error
    shifts[0] = 0  # the prompts and seeds themselves
    return scores.mean(0) + shifts


def percentile_interval(
    draws: np.ndarray,  # [1 + resamples], the value first
    confidence: float,
) -> Interval:
    """Return a score and its percentile interval; None for what is undefined.

    Raises:
        SnpatchError: confidence is outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise SnpatchError(f"bootstrap: confidence: expected a number in (0, 1), got {confidence}")
    value, defined = draws[0], draws[1:][~np.isnan(draws[1:])]
    if np.isnan(value) or not len(defined):
        return Interval(None if np.isnan(value) else float(value), None, None)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


def weighted_auc(
    probabilities: np.ndarray,  # [n]
    labels: np.ndarray,  # [n] bool
    weights: np.ndarray,  # [resamples, n]
) -> np.ndarray:
    """Return the fraction of (harmful, harmless) pairs in order, ties counting half, [resamples].

    It is NaN where a class has no weight.
    """
    order, starts = sort_into_ties(probabilities)
    sorted_weights, sorted_labels = weights[:, order], labels[order]
    harmful = np.add.reduceat(sorted_weights * sorted_labels, starts, axis=1)
    harmless = np.add.reduceat(sorted_weights * ~sorted_labels, starts, axis=1)
    num_below = harmless.cumsum(1) - harmless / 2
    return (harmful * num_below).sum(1) / (harmful.sum(1) * harmless.sum(1))


def sort_into_ties(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending order of probabilities [n], and where each group of equal ones starts in it."""
    order = np.argsort(probabilities, kind="stable")
    return order, np.flatnonzero(np.diff(probabilities[order], prepend=-np.inf))


def _draw_weights(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)
