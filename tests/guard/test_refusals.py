"""Refusals of a guard against random refusal, on constructed predictions with known values."""

import numpy as np
import pytest

from snpatch import SnpatchError
from snpatch.guard.refusals import COVERAGES, compute_risk_coverage, score_prevented_harm, share_interval

CERTAINTY = {"resamples": 300, "confidence": 0.95}
HARMFUL = np.array([True] * 30 + [False] * 70)  # the first 50 prompts are attacks, the others harmless
SIZES = [50, 50]


def test_guard_that_refuses_everything_equals_random_refusal():
    scores = score_prevented_harm(np.ones(100, dtype=bool), HARMFUL, SIZES, **CERTAINTY)
    assert scores.prevented == (1, pytest.approx(30 / (30 + 1.96**2), abs=1e-4), 1)
    assert scores.random == (1, 1, 1)
    assert scores.gain == (0, 0, 0)
    curve = compute_risk_coverage(np.full(100, 0.99), HARMFUL, SIZES, **CERTAINTY)
    assert [point.risk for point in curve.points] == pytest.approx([0.3] * 100)
    assert curve.area.value == pytest.approx(0.3)
    assert curve.gain == pytest.approx((0, 0, 0), abs=1e-12)


def test_perfect_guard_has_no_risk_up_to_the_harmless_share():
    scores = score_prevented_harm(HARMFUL, HARMFUL, SIZES, **CERTAINTY)
    assert scores.prevented.value == 1
    assert scores.random.value == 0.3
    assert scores.gain.value == 0.7
    assert scores.gain.low < 0.7 < scores.gain.high
    curve = compute_risk_coverage(np.where(HARMFUL, 0.9, 0.2), HARMFUL, SIZES, **CERTAINTY)
    expected = np.maximum(0, COVERAGES - 0.7) / COVERAGES
    assert [point.risk for point in curve.points] == pytest.approx(expected.tolist())
    assert curve.area.value == pytest.approx(expected.mean())
    assert curve.random_area.value == 0.3
    assert curve.gain.low > 0.15
    for point in curve.points:
        assert point.risk_low <= point.risk + 1e-12
        assert point.risk <= point.risk_high + 1e-12
        assert point.random_risk == 0.3


def test_risk_at_each_coverage_is_that_of_the_least_harmful_prompts():
    rng = np.random.default_rng(0)
    p, harmful = rng.random(100), rng.random(100) < 0.5
    curve = compute_risk_coverage(p, harmful, [100], **CERTAINTY)
    ordered = harmful[np.argsort(p)]
    assert [point.risk for point in curve.points] == pytest.approx([ordered[:n].mean() for n in range(1, 101)])
    assert curve.gain.low < 0 < curve.gain.high, "random probabilities are random refusal"


def test_prevented_harm_counts_refused_harmful_answers():
    refused = np.zeros(100, dtype=bool)
    refused[:15] = refused[40:45] = refused[90:] = True
    scores = score_prevented_harm(refused, HARMFUL, SIZES, **CERTAINTY)
    assert scores.prevented.value == 15 / 30
    assert scores.random.value == 0.3
    assert scores.gain.value == pytest.approx(0.2)
    nothing = score_prevented_harm(refused, np.zeros(100, dtype=bool), SIZES, **CERTAINTY)
    assert nothing.prevented == nothing.gain == (None, None, None)
    assert nothing.random.value == 0.3


def test_share_of_no_refusals_has_an_upper_end():
    share, low, high = share_interval(0, 100, 0.95)
    assert (share, low) == (0, 0)
    assert high == pytest.approx(1.96**2 / (100 + 1.96**2), abs=1e-4), "Wilson"
    with pytest.raises(SnpatchError, match="at least one prompt"):
        share_interval(0, 0, 0.95)
