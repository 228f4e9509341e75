"""Intervals and effects: closed forms, and coverage in simulations with a fixed seed."""

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from snpatch import SnpatchError
from snpatch.statistics import (
    MIN_GAP_T,
    causal_effect,
    effect_over_seeds,
    estimate_gap,
    estimate_means,
    interval,
    net_effect,
    simultaneous_band,
)

GAP = np.array([3.0, 5.0, 4.0, 6.0])  # t = 6.97
RECIPIENT = np.array([3.0, 1.0, 4.0, 2.0])
DONOR = RECIPIENT - GAP


def covers(bounds, truth) -> bool:
    return bounds.low <= truth <= bounds.high


def draw_scores(kind: str, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return scores of recipient, donor and patched recipient, and the true effect."""
    if kind == "normal":
        recipient = rng.normal(5, 6, n)
        donor, patched = recipient * 0.3 + rng.normal(-2.5, 5, n), recipient * 0.5 + rng.normal(0, 4, n)
        return recipient, donor, patched, 2.5 / 6
    if kind == "bimodal":  # refused at -10, or complied at 8; a patch makes some prompts refuse
        recipient = np.where(rng.random(n) < 0.8, 8.0, -10.0)
        donor = np.where(rng.random(n) < 0.35, recipient, -10.0)
        patched = np.where(rng.random(n) < 0.7, recipient, -10.0)
        return recipient, donor, patched, 0.3 / 0.65
    recipient = rng.exponential(8, n)
    donor = recipient * 0.3 + rng.exponential(1, n) ** 2 / 2
    patched = recipient * rng.random(n) + rng.exponential(1, n)
    return recipient, donor, patched, 3 / 4.6


def test_causal_effect_on_constructed_scores():
    """Halve each prompt's own gap: effect 0.5 without spread."""
    assert causal_effect(RECIPIENT - GAP / 2, RECIPIENT, DONOR) == pytest.approx((0.5, 0.5, 0.5))
    assert causal_effect(RECIPIENT, RECIPIENT, DONOR) == (0, 0, 0)
    assert causal_effect(DONOR, RECIPIENT, DONOR) == pytest.approx((1, 1, 1))
    assert causal_effect(RECIPIENT + GAP, RECIPIENT, DONOR).value == pytest.approx(-1), "worse than before"
    assert causal_effect(RECIPIENT - 2 * GAP, RECIPIENT, DONOR).value == pytest.approx(2), "past the donor"
    value, low, high = causal_effect(RECIPIENT - [GAP[0], 0, 0, 0], RECIPIENT, DONOR)
    assert value == pytest.approx(3 / 18)
    assert low < value < high


def test_causal_effect_bounds_are_fractions_that_a_t_test_just_rejects():
    patched = RECIPIENT - np.array([1.0, 0.0, 3.0, 4.0])
    _, low, high = causal_effect(patched, RECIPIENT, DONOR, confidence=0.9)
    for bound in (low, high):
        assert ttest_rel(patched - RECIPIENT, bound * (DONOR - RECIPIENT)).pvalue == pytest.approx(0.1)


@pytest.mark.parametrize("n", [30, 100, 200])
@pytest.mark.parametrize("kind", ["normal", "bimodal", "skewed"])
def test_causal_effect_interval_covers_the_effect_at_its_confidence(kind, n):
    rng, covered = np.random.default_rng(4), []
    for _ in range(800):
        recipient, donor, patched, effect = draw_scores(kind, rng, n)
        bounds = causal_effect(patched, recipient, donor)
        if bounds.value is not None:  # conditional on an established gap
            covered.append(covers(bounds, effect))
    assert len(covered) > 600
    assert 0.93 <= np.mean(covered) <= 0.97


def test_gap_is_the_paired_t_test():
    gap = estimate_gap(RECIPIENT, DONOR)
    test = ttest_rel(DONOR, RECIPIENT)
    assert gap.difference == pytest.approx((-4.5, *test.confidence_interval()))
    assert (gap.t, gap.p) == pytest.approx((test.statistic, test.pvalue))
    assert gap.is_established


@pytest.mark.parametrize(
    ("recipient", "donor", "reason"),
    [
        ([0.0, 0, 0, 0], [1.0, -1, 1, 0], "not established: t = 0.52, needed 3.18"),
        ([0.0] * 20, [1.0, -0.5] * 10, f"not established: t = 1.45, needed {MIN_GAP_T:.2f}"),
        ([1.0], [5.0], "not established with 1 prompt"),
        ([], [], "no prompt has both scores"),
        ([2.0, 3.0], [2.0, 3.0], "not established: no score differs"),
    ],
)
def test_effect_of_a_gap_that_is_not_established_is_undefined(recipient, donor, reason):
    assert estimate_gap(recipient, donor).reason == reason
    assert causal_effect(donor, recipient, donor) == (None, None, None)
    assert net_effect(donor, [recipient, donor], recipient, donor) == (None, None, None)


def test_gap_without_spread_is_established():
    gap = estimate_gap([1.0, 2.0], [0.0, 1.0])
    assert gap == ((-1, -1, -1), -math.inf, 0.0, None)


def test_net_effect_on_constructed_scores():
    controls = np.stack([RECIPIENT - GAP / 8, RECIPIENT - GAP / 8])
    assert net_effect(RECIPIENT - GAP / 2, controls, RECIPIENT, DONOR) == pytest.approx((3 / 8,) * 3)
    one_draw = net_effect(RECIPIENT - GAP / 2, controls[:1], RECIPIENT, DONOR)
    assert one_draw == pytest.approx((3 / 8, None, None))


def test_net_effect_bounds_have_students_tails_over_draws():
    controls = np.stack([RECIPIENT, RECIPIENT - 1])  # one prompt is like any other, so only draws differ
    value, low, high = net_effect(RECIPIENT - 2, controls, RECIPIENT, RECIPIENT - 4, resamples=20_000)
    half = student.isf(0.025, 1) * 0.5 / 4
    assert value == 3 / 8
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)


@pytest.mark.parametrize(("num_draws", "tau"), [(3, 0.0), (3, 1.0), (10, 1.0)])
def test_net_effect_interval_covers_with_variance_between_draws(num_draws, tau):
    rng, covered, n = np.random.default_rng(6), [], 100
    for _ in range(250):
        recipient = rng.normal(5, 8, n)
        donor = np.where(rng.random(n) < 0.3, recipient, recipient - 6 / 0.7)
        patched = recipient - 3 + rng.normal(0, 4, n)
        controls = recipient + rng.normal(0, tau, (num_draws, 1)) + rng.normal(0, 3, (num_draws, n))
        covered.append(covers(net_effect(patched, controls, recipient, donor, resamples=400), 0.5))
    assert np.mean(covered) >= 0.93, "conservative: the draws' means differ by their prompts' noise too"


def test_interval_covers_the_mean_at_its_confidence():
    draw = np.random.default_rng(1)
    covered = [covers(interval(np.mean, draw.normal(size=40)), 0) for _ in range(300)]
    assert 0.88 < np.mean(covered) < 0.99


def test_means_over_clusters_have_the_error_of_cluster_means():
    scores = np.array([[1.0, 3.0, 2.0, 6.0, 0.0, 9.0]])
    means = estimate_means(scores, ["a", "b", "c", "c", "b", "a"])
    cluster_means = np.array([5.0, 1.5, 4.0])
    assert means.values[0] == 3.5
    assert means.errors[0] == pytest.approx(cluster_means.std(ddof=1) / math.sqrt(3))
    assert means.df == 2
    assert estimate_means(scores).errors[0] == pytest.approx(scores.std(ddof=1) / math.sqrt(6))


def test_intervals_over_correlated_clusters_cover_only_if_clusters_are_given():
    rng, labels = np.random.default_rng(8), np.repeat(np.arange(30), 6)
    names = ("mean", "effect", "band")
    covered = {(name, is_clustered): [] for name in names for is_clustered in (True, False)}
    for _ in range(150):
        recipient = rng.normal(0, 1, 180) + rng.normal(0, 3, 30)[labels]
        donor = recipient - 6 + rng.normal(0, 1, 180) + rng.normal(0, 3, 30)[labels]
        patched = recipient - 3 + rng.normal(0, 1, 180) + rng.normal(0, 3, 30)[labels]
        for is_clustered in (True, False):
            options = {"clusters": labels.tolist() if is_clustered else None}
            mean = interval(np.mean, recipient, resamples=300, **options)
            covered["mean", is_clustered].append(covers(mean, 0))
            covered["effect", is_clustered].append(covers(causal_effect(patched, recipient, donor, **options), 0.5))
            (band,) = simultaneous_band(recipient[None], resamples=300, **options)
            covered["band", is_clustered].append(covers(band, 0))
    for name in names:
        assert 0.9 <= np.mean(covered[name, True]) <= 0.99, name
        assert np.mean(covered[name, False]) < 0.75, name


def test_simultaneous_band_covers_all_points_at_once():
    rng, n = np.random.default_rng(9), 60
    truths, joint, pointwise = np.linspace(0, 5, 12), [], []
    for _ in range(300):
        common = rng.normal(0, 2, n)
        scores = truths[:, None] + common + rng.normal(0, 1, (12, n)) * np.linspace(0.2, 3, 12)[:, None]
        band = simultaneous_band(scores, resamples=400)
        joint.append(all(map(covers, band, truths)))
        means = estimate_means(scores)
        pointwise.append((abs(means.values - truths) < student.isf(0.025, n - 1) * means.errors).all())
    assert 0.92 <= np.mean(joint) <= 0.98
    assert np.mean(pointwise) < 0.85


def test_simultaneous_band_of_one_point_is_the_t_interval():
    scores = np.random.default_rng(2).normal(size=(1, 25))
    (band,) = simultaneous_band(scores, resamples=20_000)
    half = student.isf(0.025, 24) * scores.std(ddof=1) / 5
    assert band == pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half), rel=0.05)


def test_simultaneous_band_of_constant_points_has_no_width():
    varied = np.arange(8.0)
    constant, spread = simultaneous_band([np.full(8, 2.0), varied])
    assert constant == (2, 2, 2)
    assert spread.low < 3.5 < spread.high
    assert simultaneous_band([[1.0], [2.0]]) == [(1, None, None), (2, None, None)]
    assert simultaneous_band(np.empty((2, 0))) == [(None, None, None)] * 2


def test_effect_over_seeds_is_the_t_interval_over_seeds():
    effects = [0.5, 0.7, 0.6]
    half = student.isf(0.025, 2) * 0.1 / math.sqrt(3)
    assert effect_over_seeds(effects) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    with_prompts = student.isf(0.025, 2) * math.hypot(0.1 / math.sqrt(3), 0.05)
    assert effect_over_seeds(effects, 0.05).high == pytest.approx(0.6 + with_prompts)
    assert effect_over_seeds([0.5]) == (0.5, None, None)
    assert effect_over_seeds([]) == (None, None, None)


def test_effect_over_seeds_covers_the_mean_of_all_seeds():
    """Runs share their prompts, so that the prompts' own error does not shrink with more runs."""
    rng, covered, ignored = np.random.default_rng(3), [], []
    for _ in range(2000):
        effects = 0.6 + rng.normal(0, 0.05, 5) + rng.normal(0, 0.05)
        covered.append(covers(effect_over_seeds(effects, 0.05), 0.6))
        ignored.append(covers(effect_over_seeds(effects), 0.6))
    assert np.mean(covered) >= 0.94, "conservative, as the error of the prompts is known better than that of the seeds"
    assert np.mean(ignored) < 0.8


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 1.0}])
def test_invalid_certainty_raises(options):
    with pytest.raises(SnpatchError, match="bootstrap: expected resamples >= 1 and confidence in"):
        interval(np.mean, [1.0, 2.0], **options)
    with pytest.raises(SnpatchError, match="bootstrap: expected resamples >= 1 and confidence in"):
        simultaneous_band([[1.0, 2.0]], **options)
