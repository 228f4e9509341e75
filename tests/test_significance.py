"""Tests of differences: closed forms, and false-positive rates in simulations with a fixed seed."""

import numpy as np
import pytest
from scipy.stats import binom, norm, ttest_1samp, ttest_rel
from scipy.stats import t as student

from snpatch import SnpatchError
from snpatch.significance import (
    MIN_RANKED_DRAWS,
    control_p,
    detectable_difference,
    false_discovery_rate,
    holm,
    paired_p,
    paired_share_p,
    prompts_needed,
)


def max_rate(simulations: int) -> float:
    """Return the bound of an observed rate of false positives at 0.05, with 3 standard errors."""
    return 0.05 + 3 * (0.05 * 0.95 / simulations) ** 0.5


def test_paired_p_is_the_t_test_over_prompts():
    before, after = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.0, 2.0, 4.5])
    assert paired_p(after, before) == pytest.approx(ttest_rel(after, before).pvalue)
    assert paired_p(before, before) is None
    assert paired_p([1.0], [2.0]) is None
    assert paired_p([1.0, 2.0], [0.0, 1.0]) == 0, "every prompt differs by the same"


def test_paired_p_over_equal_clusters_is_the_test_of_their_means():
    differences, labels = np.array([1.0, 2.0, 4.0, 0.0, 3.0, 3.0]), ["a", "a", "b", "b", "c", "c"]
    expected = ttest_1samp([1.5, 2.0, 3.0], 0).pvalue
    assert paired_p(differences, np.zeros(6), labels) == pytest.approx(expected)
    assert paired_p(differences, np.zeros(6), ["a"] * 6) is None


@pytest.mark.parametrize("kind", ["normal", "bimodal"])
def test_paired_p_against_the_unpatched_recipient_rejects_at_most_its_level(kind):
    rng, count, n = np.random.default_rng(1), 1000, 200
    shared = rng.normal(0, 2, (count, n))
    x, y = (shared + rng.normal(0, 1, (count, n)) for _ in range(2))
    if kind == "bimodal":
        x, y = (np.where(values < 0.5, -10.0, 8.0) for values in (x, y))
    assert np.mean([paired_p(*pair) < 0.05 for pair in zip(x, y, strict=True)]) <= max_rate(count)


@pytest.mark.parametrize("tau", [0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("num_draws", [3, MIN_RANKED_DRAWS])
def test_control_p_of_one_more_random_draw_rejects_at_most_its_level(num_draws, tau):
    """Draws differ with deviation tau in mean cost; the ranking is one of them (200 prompts)."""
    rng, count, n = np.random.default_rng(2), 600, 200
    rejected = 0
    for _ in range(count):
        scores = rng.normal(0, tau, (num_draws + 1, 1)) + rng.normal(0, 2, n) + rng.normal(0, 1, (num_draws + 1, n))
        rejected += control_p(scores[0], scores[1:], -1) <= 0.05
    assert rejected / count <= max_rate(count)


def test_control_p_of_few_draws_is_the_t_test_of_a_new_draw():
    patched = np.array([0.0, -2.0, -1.0, -4.0])
    controls = np.array([[0.0, 0.5, 0.0, 0.0], [1.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.5, 1.0]])
    means, differences = controls.mean(1), patched - controls.mean(0)
    error = np.sqrt(differences.var(ddof=1) / 4 + means.var(ddof=1) * 4 / 3)
    expected = student.cdf((patched.mean() - means.mean()) / error, 2)
    assert control_p(patched, controls, -3.0) == pytest.approx(expected)
    assert control_p(patched, controls, 3.0) == pytest.approx(1 - expected)


def test_control_p_of_many_draws_is_the_rank():
    controls = -np.arange(19.0)[:, None] + np.zeros((19, 2))
    assert control_p([-30.0, -30.0], controls, -1) == 1 / 20
    assert control_p([-17.0, -17.0], controls, -1) == 3 / 20, "two draws move it at least as far"
    assert control_p([-17.0, -17.0], controls, 1) == 19 / 20


def test_control_p_without_a_test_is_none():
    scores = np.array([1.0, 2.0, 3.0])
    assert control_p(scores, scores[None] + 1, -1) is None, "one draw"
    assert control_p(scores, [scores, scores], -1) is None, "no score differs"
    assert control_p(scores, [scores, scores + 1], 0) is None, "no direction"
    assert control_p([1.0], [[1.0], [2.0]], 1) is None, "one prompt"
    assert control_p(scores, [scores + 1, scores + 1], -1) == 0, "no spread"


def test_paired_share_p_is_mcnemars_exact_test():
    after = np.array([1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    before = np.array([0, 0, 0, 0, 1, 0, 1, 0], dtype=bool)  # 4 prompts rose, 1 fell
    assert paired_share_p(after, before) == pytest.approx(2 * binom.sf(3, 5, 0.5))
    assert paired_share_p(after, after) is None


def test_corrections_of_known_p_values_pass_on_none():
    values = [0.01, None, 0.04, 0.03, 0.005]
    assert holm(values) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert false_discovery_rate(values) == pytest.approx([0.02, None, 0.04, 0.04, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([None, None]) == false_discovery_rate([None, None]) == [None, None]
    assert holm([]) == []


def test_detectable_difference_has_its_power():
    assert detectable_difference(12, 200) == pytest.approx(2.8016 * 12 / 200**0.5, rel=1e-4)
    rng, difference = np.random.default_rng(5), detectable_difference(4, 150)
    detected = [ttest_1samp(rng.normal(difference, 4, 150), 0).pvalue < 0.05 for _ in range(1000)]
    assert np.mean(detected) == pytest.approx(0.8, abs=0.04)
    assert prompts_needed(4, difference) == 150
    assert prompts_needed(12, -2.4) == int(np.ceil(((norm.isf(0.025) + norm.isf(0.2)) * 5) ** 2))
    with pytest.raises(SnpatchError, match="n: expected at least 1 prompt, got 0"):
        detectable_difference(1, 0)
    with pytest.raises(SnpatchError, match="difference: expected a number other than 0"):
        prompts_needed(1, 0)
