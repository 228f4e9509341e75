"""Tests of differences: paired tests, tests against random controls, corrections for many tests, power.

A figure is None where nothing can be tested, and corrections pass it on.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, false_discovery_control, norm
from scipy.stats import t as student

from snpatch.errors import SnpatchError
from snpatch.statistics import Clusters, estimate_means

MIN_RANKED_DRAWS = 19  # the fewest whose ranks can give p = 0.05
LEVEL, POWER = 0.05, 0.8


def paired_p(x: ArrayLike, y: ArrayLike, clusters: Clusters = None) -> float | None:
    """Return p of the two-sided paired t-test.

    Args:
        x: Scores [prompts].
        y: Scores of the same prompts.
        clusters: Label of each prompt, if scores within a cluster depend on one another: the error is cluster-robust,
            with clusters - 1 degrees of freedom.

    Returns:
        None for fewer than two prompts or clusters, or if no score differs.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.size < 2 or np.allclose(x, y, rtol=1e-12, atol=0):
        return None
    means = estimate_means((x - y)[None], clusters)
    if means.df < 1:
        return None
    value, error = float(means.values[0]), float(means.errors[0])
    return float(2 * student.sf(abs(value) / error, means.df)) if error else 0.0


def paired_share_p(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return p of McNemar's exact test of two shares of the same prompts; None if no prompt differs.

    Args:
        x: Truth value [prompts].
        y: Truth value of the same prompts.
    """
    x, y = np.asarray(x, dtype=bool), np.asarray(y, dtype=bool)
    only_x, only_y = int((x & ~y).sum()), int((y & ~x).sum())
    return float(binomtest(only_x, only_x + only_y).pvalue) if only_x + only_y else None


def control_p(patched: ArrayLike, controls: ArrayLike, direction: float, clusters: Clusters = None) -> float | None:
    """Return p of the one-sided test that a ranking moves the mean further than a random draw.

    From MIN_RANKED_DRAWS draws on it is the rank of the ranking among them, (1 + draws that move the mean at least as
    far) / (1 + draws). With fewer it is a t-test, t = (own - mean of the draws' means) / sqrt(e^2 + s^2 (1 + 1/draws))
    with draws - 1 degrees of freedom; e is the standard error over prompts of the difference, s the deviation between
    the draws' means.

    Args:
        patched: Scores [prompts] under the ranking's neurons.
        controls: Scores [draws, prompts] under the random controls.
        direction: Its sign is that of the expected change, donor - recipient.
        clusters: Label of each prompt; see `paired_p`.

    Returns:
        None for fewer than two draws or prompts, for direction 0, and if no score differs.
    """
    controls = np.asarray(controls, dtype=float)
    patched = np.asarray(patched, dtype=float)
    num_draws = len(controls)
    if num_draws < 2 or patched.size < 2 or not direction or (controls == patched).all():
        return None
    sign = math.copysign(1.0, direction)
    own, draws = sign * patched.mean(), sign * controls.mean(-1)
    if num_draws >= MIN_RANKED_DRAWS:
        return float((1 + (draws >= own).sum()) / (1 + num_draws))
    means = estimate_means((patched - controls.mean(0))[None], clusters)
    if means.df < 1:
        return None
    error = math.sqrt(means.covariance[0, 0] + draws.var(ddof=1) * (1 + 1 / num_draws))
    difference = own - draws.mean()
    return float(student.sf(difference / error, num_draws - 1)) if error else float(difference <= 0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values, which bound the chance of any false rejection; None stays None."""

    def adjust(values: np.ndarray) -> np.ndarray:
        order = np.argsort(values)
        adjusted = np.empty(len(values))
        adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
        return np.minimum(adjusted, 1)

    return _adjust(p_values, adjust)


def false_discovery_rate(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the q values of Benjamini and Hochberg; None stays None."""
    return _adjust(p_values, false_discovery_control)


def detectable_difference(sd: float, n: int, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the smallest difference of paired means that n prompts detect, 2.8 sd / sqrt(n) by default.

    Args:
        sd: Standard deviation over prompts of the paired differences.
        n: Number of prompts.
        level: Level of the two-sided test.
        power: Probability to detect the difference.

    Raises:
        SnpatchError: There is no prompt.
    """
    if n < 1:
        raise SnpatchError(f"detectable_difference: n: expected at least 1 prompt, got {n}")
    return _sum_quantiles(level, power) * sd / math.sqrt(n)


def prompts_needed(sd: float, difference: float, *, level: float = LEVEL, power: float = POWER) -> int:
    """Return the number of prompts that detect a difference of paired means.

    Args:
        sd: Standard deviation over prompts of the paired differences.
        difference: The difference, of either sign.
        level: Level of the two-sided test.
        power: Probability to detect the difference.

    Raises:
        SnpatchError: The difference is 0.
    """
    if not difference:
        raise SnpatchError("prompts_needed: difference: expected a number other than 0, got 0")
    return max(1, math.ceil((_sum_quantiles(level, power) * sd / difference) ** 2))


def _adjust(p_values: Sequence[float | None], adjust) -> list[float | None]:
    defined = [p for p in p_values if p is not None]
    adjusted = iter(adjust(np.array(defined)).tolist() if defined else ())
    return [None if p is None else next(adjusted) for p in p_values]


def _sum_quantiles(level: float, power: float) -> float:
    return float(norm.isf(level / 2) + norm.isf(1 - power))
