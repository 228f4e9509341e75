"""Statistics of scores: Eq. 4's causal effect, bootstrap intervals, paired tests, correlation of ranks, skewness.

Everything is paired: a patch is compared with what else was written for the same prompts, so prompts are what is
resampled.
"""

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap, skew, spearmanr, ttest_rel
from scipy.stats import t as student

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError

Interval = tuple[float, float | None, float | None]  # value, low, high


def interval(statistic, *samples: ArrayLike, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """A statistic of paired samples [prompts] and its percentile bootstrap interval over prompts.

    statistic: (*samples, axis) -> values. One prompt has no spread: both ends are the value. Resamples in which the
    statistic is undefined (NaN) are left out; without any other, both ends are None. The seed is fixed.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise SnpatchError("bootstrap: resamples must be at least 1 and confidence lie between 0 and 1")
    samples = tuple(np.asarray(sample, dtype=float) for sample in samples)
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return value, value, value
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # no spread over prompts: an interval of one point
        found = bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=resamples,
            rng=np.random.default_rng(0),
        )
    tail = 50 * (1 - confidence)
    defined = found.bootstrap_distribution[~np.isnan(found.bootstrap_distribution)]
    if not len(defined):
        return value, None, None
    low, high = np.percentile(defined, [tail, 100 - tail])
    return value, float(low), float(high)


def causal_effect(patched: ArrayLike, recipient: ArrayLike, donor: ArrayLike, **certainty) -> Interval | tuple:
    """Eq. 4: the share of the way from the recipient's mean score to the donor's, with its interval.

    Three times None where donor and recipient score the same, which leaves nothing to recover.
    """
    if np.mean(donor) == np.mean(recipient):
        return None, None, None

    def effect(patched, recipient, donor, axis=-1):
        base = recipient.mean(axis)
        gap = donor.mean(axis) - base
        return (patched.mean(axis) - base) / np.where(gap == 0, np.nan, gap)

    return interval(effect, patched, recipient, donor, **certainty)


def net_effect(
    patched: ArrayLike, controls: ArrayLike, recipient: ArrayLike, donor: ArrayLike, **certainty
) -> Interval | tuple:
    """The causal effect without what random neurons recover, with its interval. controls: their mean for each prompt.

    Three times None where donor and recipient score the same.
    """
    if np.mean(donor) == np.mean(recipient):
        return None, None, None

    def net(patched, controls, recipient, donor, axis=-1):
        gap = donor.mean(axis) - recipient.mean(axis)
        return (patched.mean(axis) - controls.mean(axis)) / np.where(gap == 0, np.nan, gap)

    return interval(net, patched, controls, recipient, donor, **certainty)


def paired_p(one: ArrayLike, other: ArrayLike) -> float | None:
    """p of the two-sided paired t-test; None where fewer than two prompts are there or no score differs."""
    if len(one) < 2 or np.allclose(one, other, rtol=1e-12, atol=0):
        return None
    return float(ttest_rel(one, other).pvalue)


def half_width(values: ArrayLike, tail: float, population: int | None = None) -> float:
    """Half the width of the t-interval of a mean. tail: probability of each side.

    population: how many values there are in all, if these were drawn from so many without replacement. Infinite for
    fewer than two values, unless they are all there is.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n == population:
        return 0.0
    if n < 2:
        return math.inf
    left = 1.0 if population is None else (population - n) / (population - 1)
    return float(student.isf(tail, n - 1) * values.std(ddof=1) * math.sqrt(left / n))


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Rank correlation of paired values."""
    return float(spearmanr(one, other).statistic)


def skewness(values: ArrayLike) -> float | None:
    """Of a sample's distribution; None where all values are the same."""
    values = np.asarray(values)
    return float(skew(values)) if np.ptp(values) > 0 else None
