"""Statistics of scores: Eq. 4's causal effect, intervals of means and effects, correlation of ranks, skewness.

Everything is paired: a patch is compared with other completions of the same prompts, so prompts are resampled, or
whole clusters of them where their scores depend on one another.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap, norm, skew, spearmanr
from scipy.stats import t as student

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError

MIN_GAP_T = 3.0  # of the paired t of recipient and donor, below which a fraction of their gap means nothing
Clusters = Sequence[object] | None  # label of each prompt; None: every prompt is a cluster of its own


class Interval(NamedTuple):
    """A figure and the bounds of its interval; None where they are undefined."""

    value: float | None
    low: float | None
    high: float | None

    def columns(self, name: str) -> dict[str, float | None]:
        """Return the columns of a table: name, name_low and name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


UNDEFINED = Interval(None, None, None)


class Means(NamedTuple):
    """Means over the same prompts, and how well they are known.

    Attributes:
        values: Mean of each sample.
        covariance: Covariance [samples, samples] of the means; NaN with fewer than two clusters.
        df: Degrees of freedom: clusters - 1.
    """

    values: np.ndarray
    covariance: np.ndarray
    df: int

    @property
    def errors(self) -> np.ndarray:
        """Standard error of each mean."""
        return np.sqrt(np.diag(self.covariance))


def estimate_means(samples: ArrayLike, clusters: Clusters = None) -> Means:
    """Return the means of samples [samples, prompts] and their covariance over clusters of prompts."""
    samples = np.asarray(samples, dtype=float)
    means = samples.mean(-1)
    sums = _sum_by_cluster(samples - means[:, None], clusters)
    num_clusters = sums.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.float64(num_clusters) / (num_clusters - 1) / samples.shape[1] ** 2
        return Means(means, sums @ sums.T * scale, num_clusters - 1)


def interval(
    statistic,
    *samples: ArrayLike,
    clusters: Clusters = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return a statistic of paired samples and its bootstrap interval over prompts or clusters.

    The interval is a percentile interval. The seed is fixed.

    Args:
        statistic: Called as `statistic(*samples, axis=axis)`; returns values.
        samples: Samples [prompts].
        clusters: Label of each prompt; clusters are resampled as a whole. None: prompts are.
        resamples: Bootstrap resamples. Those with an undefined statistic (NaN) are left out; if all are, the bounds
            are None.
        confidence: Level of the interval.

    Returns:
        The interval. With one prompt both bounds are the value, because it has no spread; with one cluster of several
        prompts there are none.
    """
    _check_certainty(resamples, confidence)
    samples = tuple(np.asarray(sample, dtype=float) for sample in samples)
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return Interval(value, value, value)
    if clusters is not None and len(set(clusters)) < 2:
        return Interval(value, None, None)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # no spread over prompts: an interval of one point
        if clusters is not None:
            rows = _draw_clusters(clusters, resamples)
            distribution = np.array([statistic(*(sample[row] for sample in samples), axis=-1) for row in rows])
        else:
            distribution = bootstrap(
                samples,
                statistic,
                paired=True,
                vectorized=True,
                method="percentile",
                n_resamples=resamples,
                rng=np.random.default_rng(0),
            ).bootstrap_distribution
    return _to_interval(value, distribution, confidence)


class Gap(NamedTuple):
    """Mean score of the donor minus the recipient's, over the same prompts.

    Attributes:
        difference: The gap with its t-interval.
        t: Paired t; infinite if every prompt has the same gap, None without spread or without a gap.
        p: p of the two-sided paired t-test.
        reason: Why the gap is not established; None if it is.
    """

    difference: Interval
    t: float | None
    p: float | None
    reason: str | None

    @property
    def is_established(self) -> bool:
        """True if an effect, which is a fraction of the gap, can be estimated."""
        return self.reason is None


def estimate_gap(
    recipient: ArrayLike, donor: ArrayLike, *, clusters: Clusters = None, confidence: float = CONFIDENCE
) -> Gap:
    """Estimate the gap between the mean scores of recipient and donor.

    It is established if |t| is at least MIN_GAP_T, and its interval does not contain 0.

    Args:
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        clusters: Label of each prompt; see `interval`.
        confidence: Level of the interval.
    """
    differences = np.asarray(donor, dtype=float) - np.asarray(recipient, dtype=float)
    if not len(differences):
        return Gap(UNDEFINED, None, None, "no prompt has both scores")
    means = estimate_means(differences[None], clusters)
    value, error = float(means.values[0]), float(means.errors[0])
    if means.df < 1:
        count = "1 prompt" if len(differences) == 1 else "1 cluster"
        return Gap(Interval(value, None, None), None, None, f"not established with {count}")
    critical = float(student.isf((1 - confidence) / 2, means.df))
    difference = Interval(value, value - critical * error, value + critical * error)
    if not np.ptp(differences):
        t, p = (math.copysign(math.inf, value), 0.0) if value else (None, None)
        return Gap(difference, t, p, None if value else "not established: no score differs")
    t, needed = value / error, max(MIN_GAP_T, critical)
    reason = None if abs(t) >= needed else f"not established: t = {t:.2f}, needed {needed:.2f}"
    return Gap(difference, t, float(2 * student.sf(abs(t), means.df)), reason)


def causal_effect(
    patched: ArrayLike,
    recipient: ArrayLike,
    donor: ArrayLike,
    *,
    clusters: Clusters = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return Eq. 4: the fraction of the way from the recipient's mean score to the donor's.

    The interval is Fieller's (1954), the set of fractions f for which a paired t-test does not reject
    mean(patched - recipient) = f mean(donor - recipient). A percentile interval is too narrow below 100 prompts.

    Args:
        patched: Scores [prompts] of the patched recipient.
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        clusters: Label of each prompt; see `interval`.
        confidence: Level of the interval.

    Returns:
        The effect. UNDEFINED if the gap of donor and recipient is not established (see `estimate_gap`), because a
        fraction of it would be unbounded.
    """
    if not estimate_gap(recipient, donor, clusters=clusters, confidence=confidence).is_established:
        return UNDEFINED
    recipient = np.asarray(recipient, dtype=float)
    change, gap = np.asarray(patched, dtype=float) - recipient, np.asarray(donor, dtype=float) - recipient
    (x, y), ((xx, xy), (_, yy)), df = estimate_means(np.stack([change, gap]), clusters)
    critical = student.isf((1 - confidence) / 2, df) ** 2
    a, b, c = y * y - critical * yy, x * y - critical * xy, x * x - critical * xx
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(x / y), float((b - root) / a), float((b + root) / a))


def net_effect(
    patched: ArrayLike,
    controls: ArrayLike,
    recipient: ArrayLike,
    donor: ArrayLike,
    *,
    clusters: Clusters = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the causal effect without what random neurons recover on average.

    Prompts and draws are resampled together: prompts by the bootstrap, the mean over draws by Student's t with
    draws - 1 degrees of freedom, because a bootstrap of three draws is too narrow.

    Args:
        patched: Scores [prompts] of the patched recipient.
        controls: Scores [draws, prompts] under the random controls.
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        clusters: Label of each prompt; see `interval`.
        resamples: Resamples.
        confidence: Level of the interval.

    Returns:
        The effect; without bounds for one draw, whose variance between draws is unknown. UNDEFINED if the gap of donor
        and recipient is not established.
    """
    _check_certainty(resamples, confidence)
    if not estimate_gap(recipient, donor, clusters=clusters, confidence=confidence).is_established:
        return UNDEFINED
    recipient, controls = np.asarray(recipient, dtype=float), np.asarray(controls, dtype=float)
    num_draws, draw_means = len(controls), controls.mean(-1)
    net, gap = np.asarray(patched, dtype=float) - controls.mean(0), np.asarray(donor, dtype=float) - recipient
    value = float(net.mean() / gap.mean())
    if num_draws < 2:
        return Interval(value, None, None)
    rng = np.random.default_rng(0)
    weights = _draw_weights(len(recipient), clusters, resamples, rng)
    between = rng.standard_t(num_draws - 1, resamples) * draw_means.std(ddof=1) / math.sqrt(num_draws)
    gaps = weights @ gap
    return _to_interval(value, (weights @ net - between) / np.where(gaps == 0, np.nan, gaps), confidence)


def simultaneous_band(
    scores: ArrayLike, *, clusters: Clusters = None, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Return the mean of each point with bounds that hold for all points at once.

    The common critical value is the quantile of the largest studentized deviation over the points (max-t bootstrap).

    Args:
        scores: Scores [points, prompts].
        clusters: Label of each prompt; see `interval`.
        resamples: Bootstrap resamples.
        confidence: Probability that all means are inside.

    Returns:
        One interval per point; without bounds for fewer than two prompts or clusters.
    """
    _check_certainty(resamples, confidence)
    scores = np.asarray(scores, dtype=float)
    if not scores.size:
        return [UNDEFINED] * len(scores)
    means = estimate_means(scores, clusters)
    if means.df < 1:
        return [Interval(float(mean), None, None) for mean in means.values]
    weights = _draw_weights(scores.shape[1], clusters, resamples, np.random.default_rng(0))
    deviations = np.abs(weights @ scores.T - means.values)
    spreads = np.sqrt(np.square(deviations).mean(0))
    is_spread = np.ptp(scores, axis=1) > 0
    half_widths = np.zeros(len(scores))
    if is_spread.any():
        largest = (deviations[:, is_spread] / spreads[is_spread]).max(1)
        critical = student.isf(norm.sf(np.quantile(largest, confidence)), means.df)
        half_widths[is_spread] = critical * means.errors[is_spread]
    bounds = zip(means.values, means.values - half_widths, means.values + half_widths, strict=True)
    return [Interval(*map(float, figures)) for figures in bounds]


def effect_over_seeds(effects: ArrayLike, prompt_error: float = 0.0, *, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean effect over training seeds, with a random-effects interval over seeds.

    Its standard error is sqrt(s^2 / S + prompt_error^2), with s the deviation between S seeds; Student's t with S - 1
    degrees of freedom.

    Args:
        effects: Effect [seeds] of each training run. Each has errors from its prompts, which s contains if every run
            has prompts of its own.
        prompt_error: Standard error over prompts of the mean effect, if all runs share their prompts: their common
            error is in no difference between runs.
        confidence: Level of the interval.

    Returns:
        The mean; without bounds for one seed, UNDEFINED without any.
    """
    effects = np.asarray(effects, dtype=float)
    if not len(effects):
        return UNDEFINED
    value = float(effects.mean())
    if len(effects) < 2:
        return Interval(value, None, None)
    error = math.hypot(effects.std(ddof=1) / math.sqrt(len(effects)), prompt_error)
    half = float(student.isf((1 - confidence) / 2, len(effects) - 1)) * error
    return Interval(value, value - half, value + half)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation of paired values."""
    return float(spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]  # it has one


def skewness(values: ArrayLike) -> float | None:
    """Return the skewness of a sample; None if all values are equal."""
    values = np.asarray(values)
    return float(skew(values)) if np.ptp(values) > 0 else None


def _check_certainty(resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        message = f"resamples >= 1 and confidence in (0, 1), got resamples {resamples} and confidence {confidence}"
        raise SnpatchError(f"bootstrap: expected {message}")


def _number_clusters(clusters: Sequence[object]) -> np.ndarray:
    """Return the number of each prompt's cluster, counted from 0."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in clusters])


def _sum_by_cluster(samples: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Return the sums [samples, clusters] of samples [samples, prompts]."""
    if clusters is None:
        return samples
    numbers = _number_clusters(clusters)
    return samples @ (numbers[:, None] == np.arange(numbers.max() + 1))


def _draw_clusters(clusters: Sequence[object], resamples: int) -> list[np.ndarray]:
    """Return the indices of the prompts of each resample, which has as many clusters as there are."""
    numbers = _number_clusters(clusters)
    members = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    draws = np.random.default_rng(0).integers(len(members), size=(resamples, len(members)))
    return [np.concatenate([members[number] for number in draw]) for draw in draws]


def _draw_weights(num_prompts: int, clusters: Clusters, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the weight [resamples, prompts] of each prompt in the mean over a resample."""
    numbers = np.arange(num_prompts) if clusters is None else _number_clusters(clusters)
    num_clusters = int(numbers.max()) + 1
    counts = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=resamples)[:, numbers]
    return counts / counts.sum(1, keepdims=True)


def _to_interval(value: float, distribution: np.ndarray, confidence: float) -> Interval:
    """Return the percentile interval of a distribution, without its NaN."""
    defined = distribution[~np.isnan(distribution)]
    if not len(defined):
        return Interval(value, None, None)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
