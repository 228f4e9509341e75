"""Search for the smallest window: the result of the whole grid from fewer completions, and greedy blocks of layers."""

import numpy as np
import pytest

from snpatch import SnpatchError
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
    draw = np.random.default_rng(1)
    for seed in range(200):
        some = draw.choice(20_000, 120, replace=False)
        result = find_smallest_window(
            lambda pairs, some=some: [population.scores(k)[some[prompt]] for k, prompt in pairs],
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
        ({"donor": [3.0, 2.0, 1.0]}, "nothing to recover"),
        ({"measure": lambda pairs: [float("nan")] * len(pairs)}, "finite scores"),
        ({"measure": lambda pairs: [1.0]}, "finite scores, got 1"),
    ],
)
def test_smallest_window_with_invalid_input_raises(change, message):
    arguments = {"measure": lambda pairs: [0.0] * len(pairs), "ks": [1, 2], "recipient": [1.0, 2.0, 3.0],
                 "donor": [0.0, 0.0, 0.0], **change}  # fmt: skip
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
    assert result[1].effect == pytest.approx(0.95, abs=0.03)
    assert len(requested) == len(set(requested)) == sum(block.used for block in result) < 15 * 150 * 0.6
    blocks = find_blocks(measure, ["l0", "l1"], scores.recipient, scores.donor)
    assert {block.name for block in blocks} == {"l0", "l1"}, "all, because they do not suffice"
    with pytest.raises(SnpatchError, match="a different name for each"):
        find_blocks(measure, ["l0", "l0"], scores.recipient, scores.donor)
