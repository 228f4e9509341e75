"""Rows of a sweep from given scores: comparisons, shared prompts, corrections over windows, notes."""

import math

import numpy as np
import pytest
import torch

from snpatch import Ranking
from snpatch.significance import control_p, false_discovery_rate, holm, paired_p, paired_share_p
from snpatch.statistics import causal_effect, estimate_gap, net_effect, simultaneous_band
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.points import build_points
from snpatch.sweeps.rows import build_notes, build_rows, compare_scores

NUM_PROMPTS = 24
CONFIG = SweepConfig(("sft",), "dpo", (4, 12, 20), controls=3, resamples=200)


@pytest.fixture(scope="module")
def points():
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    ranking = Ranking.from_order(torch.stack([order // 40, order % 40], dim=1), (3, 40))
    return build_points({"safety": ranking}, CONFIG)[0]


@pytest.fixture
def scores(points):
    """Return scores [points, prompts]: recipient 5, donor -5, windows from 4 down, controls near the recipient."""
    rng = np.random.default_rng(0)
    means = [5 if p.patch is None else 5 - 0.3 * len(p.window) * (p.control_seed is None) for p in points]
    means[[point.recipient for point in points].index("dpo")] = -5
    return np.array(means)[:, None] + rng.normal(0, 3, NUM_PROMPTS) + rng.normal(0, 2, (len(points), NUM_PROMPTS))


def build(points, scores, clusters=None, config=CONFIG):
    record = {"completion": "a b", "token_ids": [1, 2], "finish_reason": "eos", "overwrites": 3, "logprobs": {}}
    records = [[record] * NUM_PROMPTS for _ in points]
    return build_rows(config, "cost", "attacks", points, records, scores, clusters)


def split(points, scores):
    """Return scores of recipient and donor, and by window those of its own neurons and of its controls."""
    unpatched = {p.recipient: values for p, values in zip(points, scores, strict=True) if p.patch is None}
    own = {p.window.hi: values for p, values in zip(points, scores, strict=True) if p.patch and p.control_seed is None}
    controls = {
        k: np.array([v for p, v in zip(points, scores, strict=True) if p.control_seed is not None and p.window.hi == k])
        for k in own
    }
    return unpatched["sft"], unpatched["dpo"], own, controls


def test_rows_compare_each_window_with_unpatched_models_and_controls(points, scores):
    recipient, donor, own, controls = split(points, scores)
    rows = build(points, scores)
    assert [(row.recipient, row.rank_hi, row.control_seed) for row in rows] == [
        (point.recipient, point.window.hi, point.control_seed) for point in points
    ]
    for row in rows:
        if row.ranking is None or row.control_seed is not None:
            assert (row.net_effect, row.p_vs_random, row.q_vs_random, row.band_low, row.controls) == (None,) * 4 + (0,)
            continue
        k = row.rank_hi
        options = {"resamples": 200}
        assert (row.effect, row.effect_low, row.effect_high) == causal_effect(own[k], recipient, donor)
        net = net_effect(own[k], controls[k], recipient, donor, **options)
        assert (row.net_effect, row.net_effect_low, row.net_effect_high) == pytest.approx(net)
        gap = estimate_gap(recipient, donor)
        assert (row.gap, row.gap_low, row.gap_high, row.gap_t) == (*gap.difference, gap.t)
        assert row.p_vs_unpatched == paired_p(own[k], recipient)
        assert row.p_vs_random == pytest.approx(control_p(own[k], controls[k], -1))
        assert row.share_above_0 == (own[k] > 0).mean()
        assert row.p_share_above_0 == paired_share_p(own[k] > 0, recipient > 0)
        assert (row.neuron_fraction, row.ranked_fraction, row.controls) == (k / 120, k / 80, 3)
        assert (row.tokens, row.overwrites) == (2 * NUM_PROMPTS, 3 * NUM_PROMPTS)


def test_windows_of_a_curve_are_corrected_and_banded_together(points, scores):
    _, _, own, controls = split(points, scores)
    rows = [row for row in build(points, scores) if row.ranking and row.control_seed is None]
    p_values = [control_p(own[k], controls[k], -1) for k in own]
    assert [row.q_vs_random for row in rows] == pytest.approx(false_discovery_rate(p_values))
    assert [row.p_holm_vs_random for row in rows] == pytest.approx(holm(p_values))
    band = simultaneous_band(np.array([*own.values()]), resamples=200)
    assert np.array([(row.mean, row.band_low, row.band_high) for row in rows]) == pytest.approx(np.array(band))
    assert all(row.band_low < row.mean_low < row.mean_high < row.band_high for row in rows)


def test_prompt_that_failed_at_one_point_is_left_out_of_all_rows(points, scores):
    scores[5, 7] = np.nan
    rows = build(points, scores)
    assert {(row.prompts, row.failed) for row in rows} == {(NUM_PROMPTS - 1, 1)}
    for row, values in zip(rows, np.delete(scores, 7, axis=1), strict=True):
        assert row.mean == pytest.approx(values.mean())
    (recipient,) = [row.mean for row in rows if (row.ranking, row.recipient) == (None, "sft")]
    for row in rows:
        if row.ranking:
            assert row.effect == pytest.approx((row.mean - recipient) / row.gap)
    assert build_notes(CONFIG, "cost", "attacks", points, scores)[0] == (
        f"attacks: 1 of {NUM_PROMPTS} prompts are left out of all rows of cost: a completion or a score failed"
    )


def test_point_that_mostly_failed_leaves_other_rows_whole(points, scores):
    failed = next(i for i, point in enumerate(points) if point.patch and point.window.hi == 20)
    scores[failed, 2:] = np.nan
    rows = build(points, scores)
    assert (rows[failed].prompts, rows[failed].failed) == (2, NUM_PROMPTS - 2)
    assert rows[failed].band_low is None
    assert {row.failed for index, row in enumerate(rows) if index != failed} == {0}
    scores[failed] = np.nan
    empty = build(points, scores)[failed]
    assert (empty.prompts, empty.mean, empty.share_above_0, empty.gap) == (0, None, None, None)


def test_control_that_mostly_failed_is_not_compared_with(points, scores):
    recipient, donor, own, controls = split(points, scores)
    failed = next(i for i, point in enumerate(points) if point.control_seed == 1 and point.window.hi == 4)
    scores[failed] = np.nan
    row = next(row for row in build(points, scores) if row.ranking and row.rank_hi == 4)
    assert (row.controls, row.failed) == (2, 0)
    assert row.net_effect == pytest.approx(net_effect(own[4], controls[4][[0, 2]], recipient, donor).value)


def test_row_without_established_gap_has_no_effect(points, scores):
    donor = [point.recipient for point in points].index("dpo")
    scores[donor] = scores[0] + np.random.default_rng(1).normal(0, 5, NUM_PROMPTS)
    for row in build(points, scores):
        assert (row.effect, row.effect_low, row.net_effect, row.net_effect_high) == (None,) * 4
        assert row.ranking is None or abs(row.gap_t) < 3
        assert row.mean is not None


def test_rows_over_clusters_have_cluster_intervals(points, scores):
    labels = [f"category {index % 6}" for index in range(NUM_PROMPTS)]
    recipient, donor, own, _ = split(points, scores)
    for row in build(points, scores, labels):
        if row.ranking and row.control_seed is None:
            expected = causal_effect(own[row.rank_hi], recipient, donor, clusters=labels)
            assert (row.effect, row.effect_low, row.effect_high) == expected
            assert row.p_vs_unpatched == paired_p(own[row.rank_hi], recipient, labels)
    assert build_notes(CONFIG, "cost", "attacks", points, scores, labels)[0] == (
        "attacks: intervals are over 6 clusters of prompts; fewer than 10 make them rough"
    )


def test_note_tells_the_difference_that_unpatched_models_prompts_detect(points, scores):
    recipient, donor, *_ = split(points, scores)
    detectable = 2.8016 * (donor - recipient).std(ddof=1) / math.sqrt(NUM_PROMPTS)
    assert build_notes(CONFIG, "cost", "attacks", points, scores) == [
        f"attacks, sft and dpo: with {NUM_PROMPTS} prompts a difference in mean cost of {detectable:.2g} can be "
        "detected (power 80%)"
    ]


def test_compare_scores_without_donor_tests_against_the_recipient():
    scores, recipient = np.array([1.0, -2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.0, 4.0])
    figures = compare_scores(scores, recipient)
    assert figures["p_vs_unpatched"] == paired_p(scores, recipient)
    assert (figures["mean"], figures["share_above_0"]) == (0.625, 0.75)
    assert (figures["effect"], figures["gap"], figures["p_vs_random"]) == (None, None, None)
    assert figures["p_share_above_0"] == 1, "one prompt differs"
