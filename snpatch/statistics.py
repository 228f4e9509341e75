"""Statistics of scores: Eq. 4's causal effect, bootstrap intervals, paired tests, correlation of ranks, skewness.

Everything is paired: a patch is compared with other completions of the same prompts, so prompts are resampled.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap, skew, spearmanr, ttest_rel
from scipy.stats import t as student

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError


class Interval(NamedTuple):
    """A figure and the bounds of its interval; None where they are undefined."""

    value: float | None
    low: float | None
    high: float | None

    def columns(self, name: str) -> dict[str, float | None]:
        """Return the columns of a table: name, name_low and name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


UNDEFINED = Interval(None, None, None)


def interval(statistic, *samples: ArrayLike, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """Return a statistic of paired samples and its bootstrap interval over prompts.

    The interval is a percentile interval. The seed is fixed.

    Args:
        statistic: Called as `statistic(*samples, axis=axis)`; returns values.
        samples: Samples [prompts].
        resamples: Bootstrap resamples. Those with an undefined statistic (NaN) are left out; if all are, the bounds
            are None.
        confidence: Level of the interval.

    Returns:
        The interval. With one prompt both bounds are the value, because it has no spread.
    """
    if resamples < 1 or not 0 < confidence < 1:
        message = f"resamples >= 1 and confidence in (0, 1), got resamples {resamples} and confidence {confidence}"
        raise SnpatchError(f"bootstrap: expected {message}")
    samples = tuple(np.asarray(sample, dtype=float) for sample in samples)
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return Interval(value, value, value)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # no spread over prompts: an interval of one point
        result = bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=resamples,
            rng=np.random.default_rng(0),
        )
    tail = 50 * (1 - confidence)
    defined = result.bootstrap_distribution[~np.isnan(result.bootstrap_distribution)]
    if not len(defined):
        return Interval(value, None, None)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def causal_effect(patched: ArrayLike, recipient: ArrayLike, donor: ArrayLike, **certainty) -> Interval:
    """Return Eq. 4: the fraction of the way from the recipient's mean score to the donor's.

    UNDEFINED if donor and recipient have the same mean, because there is nothing to recover.
    """
    if np.asarray(donor).mean() == np.asarray(recipient).mean():
        return UNDEFINED

    def effect(patched, recipient, donor, axis=-1):
        base = recipient.mean(axis)
        gap = donor.mean(axis) - base
        return (patched.mean(axis) - base) / np.where(gap == 0, np.nan, gap)

    return interval(effect, patched, recipient, donor, **certainty)


def net_effect(
    patched: ArrayLike, controls: ArrayLike, recipient: ArrayLike, donor: ArrayLike, **certainty
) -> Interval:
    """Return the causal effect without what random neurons recover.

    UNDEFINED if donor and recipient have the same mean. controls: mean score of the random controls on each prompt.
    """
    if np.asarray(donor).mean() == np.asarray(recipient).mean():
        return UNDEFINED

    def net(patched, controls, recipient, donor, axis=-1):
        gap = donor.mean(axis) - recipient.mean(axis)
        return (patched.mean(axis) - controls.mean(axis)) / np.where(gap == 0, np.nan, gap)

    return interval(net, patched, controls, recipient, donor, **certainty)


def paired_p(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return p of the two-sided paired t-test; None for fewer than two prompts, or if no score differs."""
    if np.size(x) < 2 or np.allclose(x, y, rtol=1e-12, atol=0):
        return None
    return float(ttest_rel(x, y).pvalue)


def half_width(values: ArrayLike, tail: float, population: int | None = None) -> float:
    """Return half the width of the t-interval of a mean.

    It is infinite for fewer than two values of a larger population.

    Args:
        values: The sample.
        tail: Probability of each side.
        population: Number of values that the sample was drawn from without replacement; None: infinite.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n == population:
        return 0.0
    if n < 2:
        return math.inf
    left = 1.0 if population is None else (population - n) / (population - 1)
    return float(student.isf(tail, n - 1) * values.std(ddof=1) * math.sqrt(left / n))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation of paired values."""
    return float(spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]  # it has one


def skewness(values: ArrayLike) -> float | None:
    """Return the skewness of a sample; None if all values are equal."""
    values = np.asarray(values)
    return float(skew(values)) if np.ptp(values) > 0 else None
