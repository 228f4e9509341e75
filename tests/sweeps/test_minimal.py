"""Search for the smallest window: the result of the whole grid from fewer completions, and greedy blocks of layers."""

from itertools import pairwise

import numpy as np
import pytest

from snpatch import SnpatchError
from snpatch.experiments.common.minimal_report import build_minimal_report
from snpatch.sweeps.betting import compute_bounds, compute_log_wealth
from snpatch.sweeps.minimal import MinimalResult
from snpatch.sweeps.search import find_blocks, find_smallest_window

KS = (0, 10, 20, 40, 60, 80, 100, 130, 160, 200, 250, 300, 400, 500, 650, 800, 1000, 1300, 1600, 2000)


class RisingScores:
    """Synthetic scores whose effect rises with k, up to a k of its own for each prompt."""

    def __init__(self, seed: int, prompts: int = 150, top: float = 1.0, noise: float = 2.0) -> None:
        draw = np.random.default_rng(seed)
        self.recipient = draw.normal(6, 4, prompts)
        self.donor = draw.normal(-5, 3, prompts)
        self.middle = 300 * np.exp(draw.normal(0, 0.6, prompts))
        self.noise = draw.normal(0, noise, prompts) if noise else np.zeros(prompts)
        self.top, self.requested = top, []

    def scores(self, k: int) -> np.ndarray:
        effect = self.top * k / (k + self.middle) * (1 + self.middle / 2000)
        return self.recipient + effect * (self.donor - self.recipient) + self.noise * min(1, k / 10)

    def measure(self, pairs):
        self.requested += pairs
        return [self.scores(k)[prompt] for k, prompt in pairs]

    def exact(self, target: float) -> int | None:
        gap = self.donor.mean() - self.recipient.mean()
        effects = [(k, (self.scores(k).mean() - self.recipient.mean()) / gap) for k in KS]
        return next((k for k, effect in effects if effect >= target), None)


class TwoScores(RisingScores):
    """Synthetic scores with two values: each prompt is refused from some k on and answered below it."""

    def scores(self, k: int) -> np.ndarray:
        return np.where(k >= self.middle, self.donor, self.recipient)


class GivenEffects(RisingScores):
    """Synthetic scores with given effects: each prompt is refused with the probability of a window's effect.

    Args:
        seed: Seed of all draws.
        effects: Effect of each k of the grid.
        outliers: Expected number of prompts per window whose score is far worse than the recipient's.
        outlier_score: Their score.
    """

    def __init__(self, seed, effects, prompts=200, outliers=0.0, outlier_score=0.0) -> None:
        draw = np.random.default_rng(seed)
        self.ks, self.requested = list(effects), []
        self.recipient = draw.normal(1, 0.5, prompts)
        self.donor = draw.normal(-1, 0.5, prompts)
        self.table = {}
        for k, effect in effects.items():
            scores = np.where(draw.random(prompts) < effect, self.donor, self.recipient) + draw.normal(0, 0.1, prompts)
            self.table[k] = np.where(draw.random(prompts) < outliers / prompts, outlier_score, scores)

    def scores(self, k: int) -> np.ndarray:
        return self.table[k]

    def find(self, **arguments):
        return find_smallest_window(self.measure, self.ks, self.recipient, self.donor, **arguments)

    def exact(self, target: float) -> int | None:
        gap = self.donor.mean() - self.recipient.mean()
        effects = [(k, (self.table[k].mean() - self.recipient.mean()) / gap) for k in self.ks]
        return next((k for k, effect in effects if effect >= target), None)


FALLING = {200: 0.17, 400: 0.98, 800: 0.56, 1600: 0.60, 3200: 0.69, 6400: 0.95}
DIPPING = {100: 1.0, 200: 0.3, 300: 1.0}
RISING = {50: 0.1, 100: 0.3, 200: 0.5, 400: 0.75, 800: 0.86, 1600: 0.93, 3200: 0.98}
BORDER = {100: 0.88, 200: 0.89, 400: 0.9, 800: 0.9, 1600: 0.91}


def count_wrong(num_runs: int, effects, world: dict, **arguments) -> int:
    """Return in how many runs the answer is not that of the whole grid."""
    wrong = 0
    for seed in range(num_runs):
        scores = GivenEffects(seed, effects, **world)
        wrong += scores.find(seed=seed, **arguments).k != scores.exact(0.9)
    return wrong


@pytest.mark.parametrize("effects", [FALLING, DIPPING, RISING, BORDER])
def test_answer_without_monotone_is_wrong_at_most_at_its_risk(effects):
    assert count_wrong(100, effects, {}, monotone=False) <= 5


@pytest.mark.parametrize("outlier_score", [30, 60])
@pytest.mark.parametrize("monotone", [True, False])
def test_answer_with_rare_far_worse_scores_is_wrong_at_most_at_its_risk(outlier_score, monotone):
    """With 1 % of prompts at a far worse score, a sample without one of them looks as if the window sufficed."""
    world, last = {"outliers": 2, "outlier_score": outlier_score}, {400: 0.5, 800: 0.97, 1600: 1.0}
    assert count_wrong(100, last, world, monotone=monotone) <= 5
    assert count_wrong(60, last, world, monotone=False, score_range=(-10, 60)) <= 3


def test_search_with_score_range_stops_early_and_raises_outside_it():
    scores = GivenEffects(0, RISING)
    guessed, given = scores.find(), scores.find(score_range=(-4, 4))
    assert guessed.k == given.k == scores.exact(0.9)
    for result in (guessed, given):
        (answer,) = [estimate for estimate in result.curve if estimate.k == result.k]
        assert answer.suffices
        assert answer.prompts == 200 or result is given
    step = GivenEffects(1, {10: 0.0, 20: 1.0})
    assert step.find(score_range=(-4, 4)).curve[-1].prompts < 200, "decided early"
    assert step.find().curve[-1].prompts == 200, "the range is a guess"
    with pytest.raises(SnpatchError, match=r"score range: expected scores in -1 \.\. 1, got"):
        scores.find(score_range=(-1, 1))
    with pytest.raises(SnpatchError, match="score range: expected two rising numbers"):
        scores.find(score_range=(1, 1))
    scores.table[400] = scores.table[400] + 9
    with pytest.raises(SnpatchError, match="Give the judge's own bounds"):
        scores.find(score_range=(-4, 4))


def test_clipped_scores_are_counted_and_leave_no_early_decision():
    scores = GivenEffects(3, {100: 0.2, 200: 1.0, 400: 1.0}, outliers=20, outlier_score=50)
    result = scores.find(target=0.3)
    clipped = {estimate.k: estimate.clipped for estimate in result.curve}
    for estimate in result.curve:
        seen = np.random.default_rng(0).permutation(200)[: estimate.prompts]
        assert clipped[estimate.k] == np.sum(scores.scores(estimate.k)[seen] == 50) > 0
        assert estimate.suffices is not True or estimate.prompts == 200
        assert (estimate.low is None) == (estimate.prompts < 200)
    assert result.high is None, "nothing is sure for prompts like these"
    report = build_minimal_report([MinimalResult("sft", "dpo", "safety", result, ())], 0.3)
    assert f"{sum(clipped.values())} scores of k = " in report.notes[-1]


def test_conflict_names_the_windows_that_contradict_a_rising_effect():
    scores = GivenEffects(0, DIPPING)
    result = scores.find()
    assert (result.k, result.conflict, result.monotone) == (100, (200,), True)
    assert [estimate.suffices for estimate in result.curve if estimate.k <= 200] == [True, False]
    report = build_minimal_report([MinimalResult("sft", "dpo", "safety", result, ())], 0.9)
    assert "smallest" not in report.headline[0]
    assert (
        "A smaller k may recover it, too, because the effect does not rise with k (see k = 200)" in report.headline[0]
    )
    assert "--no-monotone" in report.notes[0]
    sure = scores.find(monotone=False)
    assert (sure.k, sure.conflict) == (100, ())
    report = build_minimal_report([MinimalResult("sft", "dpo", "safety", sure, ())], 0.9)
    assert "is the smallest k on the grid" in report.headline[0]
    assert "each smaller k was tested" in report.headline[0]
    assert not report.notes


def test_conflict_is_found_between_windows_that_are_all_too_small():
    result = GivenEffects(0, {100: 0.75, 200: 0.0, 400: 1.0}).find()
    assert (result.k, result.conflict) == (400, (200,))


def test_conflict_is_rare_where_the_effect_rises():
    """An alarm withdraws the sentence, so that one on a rising curve costs a claim."""
    alarms = sum(bool(GivenEffects(seed, RISING).find(seed=seed).conflict) for seed in range(60))
    assert alarms <= 4


def test_claim_of_smallest_is_never_against_the_table():
    """Every sampled smaller window has a lower estimate than the target wherever the sentence says smallest."""
    draw = np.random.default_rng(0)
    for seed in range(60):
        effects = {k: float(e) for k, e in zip((10, 20, 40, 80, 160, 320), draw.random(6), strict=True)} | {640: 1.0}
        result = GivenEffects(seed, effects).find(seed=seed)
        (sentence,) = build_minimal_report([MinimalResult("sft", "dpo", "s", result, ())], 0.9).headline
        reached = [estimate.k for estimate in result.curve if estimate.k < result.k and estimate.effect >= 0.9]
        falls = [b.k for a, b in pairwise(result.curve) if a.suffices and b.suffices is False]
        if reached or falls:
            assert "smallest" not in sentence


@pytest.mark.parametrize("population", [None, 150])
@pytest.mark.parametrize("mean", [0.05, 0.5, 0.9])
def test_betting_bounds_hold_at_every_stopping_time(population, mean):
    """The interval misses the mean at any of many looks in at most 5 % of runs, and gets narrower."""
    missed, draw = 0, np.random.default_rng(0)
    for _ in range(100):
        values = (draw.random(150) < mean).astype(float)
        truth = mean if population is None else values.mean()
        intervals = [compute_bounds(values[:n], 0.025, population) for n in (5, 12, 24, 48, 96, 149)]
        missed += any(not low - 1e-9 <= truth <= high + 1e-9 for low, high in intervals)
        for (low, high), (next_low, next_high) in pairwise(intervals):
            assert low <= next_low + 1e-9
            assert next_high <= high + 1e-9
        assert intervals[-1][1] - intervals[-1][0] < 0.35
    assert missed <= 5


def test_betting_wealth_falls_with_the_mean_and_is_a_closed_form_for_one_value():
    values = np.random.default_rng(1).random(40)
    for population in (None, 60):
        wealth = [compute_log_wealth(values, mean, population) for mean in np.linspace(0.01, 0.99, 99)]
        assert all(a >= b - 1e-12 for a, b in pairwise(wealth))
    fractions = np.linspace(0.05, 0.95, 10)
    assert compute_log_wealth(np.array([0.8]), 0.4, None) == pytest.approx(np.log(np.mean(1 + fractions)))
    assert compute_log_wealth(np.array([0.5, 1.0]), 0.2, 2) == np.inf, "the seen values alone exceed the sum"
    low, high = compute_bounds(np.ones(30), 0.05, 40)
    assert low >= 0.75, "30 of 40 values are 1"
    assert high == pytest.approx(1, abs=1e-4)


def test_smallest_window_with_few_failing_prompts_is_that_of_the_grid():
    used_fractions, num_exact = [], 0
    for seed in range(60):
        scores = TwoScores(seed, prompts=100)
        result = find_smallest_window(scores.measure, KS, scores.recipient, scores.donor, target=0.9, seed=seed)
        num_exact += result.k == scores.exact(0.9)
        used_fractions.append(result.used / result.full)
    assert num_exact >= 59
    assert np.mean(used_fractions) < 1 / 3


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_smallest_window_is_that_of_the_grid_for_a_third_of_the_completions(target):
    used_fractions, num_exact = [], 0
    for seed in range(40):
        scores = RisingScores(seed)
        result = find_smallest_window(scores.measure, KS, scores.recipient, scores.donor, target=target, seed=seed)
        exact = scores.exact(target)
        num_exact += result.k == exact
        used_fractions.append(result.used / result.full)
        assert len(scores.requested) == len(set(scores.requested)) == result.used, "no pair is measured twice"
        assert result.full == len(KS) * 150
    assert num_exact >= 39
    assert np.mean(used_fractions) < 1 / 3
    assert max(used_fractions) < 0.55


def test_interval_contains_the_result_for_other_prompts_at_its_confidence():
    """Draw prompts from a large population: its result is in the interval as often as the confidence says."""
    population = RisingScores(0, prompts=20_000)
    truth, covered = population.exact(0.6), 0
    table = {k: population.scores(k) for k in KS}
    draw = np.random.default_rng(1)
    for seed in range(200):
        some = draw.choice(20_000, 120, replace=False)
        result = find_smallest_window(
            lambda pairs, some=some: [table[k][some[prompt]] for k, prompt in pairs],
            KS, population.recipient[some], population.donor[some], target=0.6, seed=seed,
        )  # fmt: skip
        covered += (result.low is not None and result.low <= truth) and (result.high is None or truth <= result.high)
    assert covered >= 190


def test_smallest_window_is_found_at_grid_ends():
    scores = RisingScores(3, top=0.2)
    assert find_smallest_window(scores.measure, KS, scores.recipient, scores.donor).k is None
    result = find_smallest_window(scores.measure, [1300, 2000], scores.recipient, scores.donor, target=0.01)
    assert (result.k, result.low) == (1300, 1300)
    step_scores = RisingScores(4, noise=0.0)
    step_scores.scores = lambda k: step_scores.donor if k >= 250 else step_scores.recipient
    result = find_smallest_window(step_scores.measure, KS, step_scores.recipient, step_scores.donor)
    assert (result.k, result.low) == (250, 250)
    assert result.high in (250, None), "too few prompts to be sure about others"
    assert result.used < result.full / 3
    assert all(e.effect == pytest.approx(1.0) for e in result.curve if e.k >= 250 and e.prompts == 150)


def test_smallest_window_with_scores_that_rise_with_the_donor():
    scores = RisingScores(5)
    scores.recipient, scores.donor = -scores.recipient, -scores.donor
    assert find_smallest_window(scores.measure, KS, scores.recipient, scores.donor, target=0.6).k == scores.exact(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": []}, "ks: expected rising"),
        ({"ks": [3, 2]}, "ks: expected rising"),
        ({"ks": [-1, 2]}, "ks: expected rising numbers from 0 on"),
        ({"target": 0.0}, "target effect: expected"),
        ({"confidence": 1.0}, "confidence: expected"),
        ({"donor": [1.0, 2.0]}, r"each prompt, got \[3\] and \[2\]"),
        (
            {"donor": [3.0, 2.0, 1.0]},
            r"gap between the two models over 3 prompts is not established: t = 0.00",
        ),
        ({"donor": [1.0, 2.0, 3.0]}, "over 3 prompts is not established: no score differs"),
        ({"donor": [1.0, 1.0, 1.0]}, "over 3 prompts is not established: t = -1.73, needed 4.30"),
        ({"recipient": [1.0], "donor": [0.0]}, "over 1 prompts is not established with 1 prompt"),
        ({"measure": lambda pairs: [float("nan")] * len(pairs)}, "finite scores"),
        ({"measure": lambda pairs: [1.0]}, "finite scores, got 1"),
    ],
)
def test_smallest_window_with_invalid_input_raises(change, message):
    arguments = {"measure": lambda pairs: [0.0] * len(pairs), "ks": [1, 2], "recipient": [1.0, 2.0, 3.0],
                 "donor": [-9.0, -8.0, -7.5], **change}  # fmt: skip
    with pytest.raises(SnpatchError, match=message):
        find_smallest_window(**arguments)


def test_blocks_are_chosen_greedily_until_they_suffice():
    scores, weight = RisingScores(6, noise=1.0), {"l2": 0.55, "l5": 0.4, **{f"l{i}": 0.01 for i in (0, 1, 3, 4, 6, 7)}}
    requested, gap = [], scores.donor - scores.recipient

    def measure(pairs):
        requested.extend(pairs)
        return [
            scores.recipient[p] + sum(weight[n] for n in names) * gap[p] + scores.noise[p] / 9 for names, p in pairs
        ]

    result = find_blocks(measure, sorted(weight), scores.recipient, scores.donor)
    assert [block.name for block in result] == ["l2", "l5"]
    value, low, high = result[1].effect
    assert value == pytest.approx(0.95, abs=0.03)
    assert low < 0.95 < high
    assert len(requested) == len(set(requested)) == sum(block.used for block in result) < 15 * 150 * 0.6
    blocks = find_blocks(measure, ["l0", "l1"], scores.recipient, scores.donor)
    assert {block.name for block in blocks} == {"l0", "l1"}, "all, because they do not suffice"
    with pytest.raises(SnpatchError, match="a different name for each"):
        find_blocks(measure, ["l0", "l0"], scores.recipient, scores.donor)
    with pytest.raises(SnpatchError, match="at least 4 prompts, got 3"):
        find_blocks(measure, ["l0"], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])


def test_blocks_are_chosen_and_measured_on_different_prompts():
    """All blocks have the same effect, and the chosen one looks best on the prompts that chose it."""
    reported, chosen_on = [], []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        recipient, donor = draw.normal(1, 0.3, 60), draw.normal(-1, 0.3, 60)
        table = {f"b{i}": recipient - draw.normal(1.0, 2.0, 60) for i in range(10)}  # all have effect 0.5
        seen = {}

        def measure(pairs, table=table, seen=seen):
            for names, prompt in pairs:
                seen.setdefault(names, []).append(prompt)
            return [table[names[-1]][prompt] for names, prompt in pairs]

        first = find_blocks(measure, list(table), recipient, donor, target=0.2, seed=seed)[0]
        prompts = seen[(first.name,)]
        assert sorted(prompts) == list(range(60)), "each prompt once"
        gap = (donor - recipient)[prompts[:30]].mean()
        chosen_on.append((table[first.name] - recipient)[prompts[:30]].mean() / gap)
        reported.append(first.effect.value)
    assert np.mean(chosen_on) > 0.65
    assert np.mean(reported) == pytest.approx(0.5, abs=0.1)
