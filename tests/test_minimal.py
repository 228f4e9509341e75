"""The smallest window: the same as the whole grid's, from fewer completions; blocks of layers, greedily."""

import numpy as np
import pytest

from snpatch import SnpatchError
from snpatch.sweeps.search import blocks, smallest

KS = (0, 10, 20, 40, 60, 80, 100, 130, 160, 200, 250, 300, 400, 500, 650, 800, 1000, 1300, 1600, 2000)


class World:
    """Prompts of different difficulty; an effect that rises with k up to a point that each prompt has for itself."""

    def __init__(self, seed: int, prompts: int = 150, top: float = 1.0, noise: float = 2.0) -> None:
        draw = np.random.default_rng(seed)
        self.recipient = draw.normal(6, 4, prompts)
        self.donor = draw.normal(-5, 3, prompts)
        self.middle = 300 * np.exp(draw.normal(0, 0.6, prompts))
        self.noise = draw.normal(0, noise, prompts) if noise else np.zeros(prompts)
        self.top, self.asked = top, []

    def scores(self, k: int) -> np.ndarray:
        effect = self.top * k / (k + self.middle) * (1 + self.middle / 2000)
        return self.recipient + effect * (self.donor - self.recipient) + self.noise * min(1, k / 10)

    def measure(self, pairs):
        self.asked += pairs
        return [self.scores(k)[prompt] for k, prompt in pairs]

    def exact(self, share: float) -> int | None:
        gap = self.donor.mean() - self.recipient.mean()
        effects = [(k, (self.scores(k).mean() - self.recipient.mean()) / gap) for k in KS]
        return next((k for k, effect in effects if effect >= share), None)


class Refusals(World):
    """Each prompt is refused from some k on and answered below it, so that its score is one of two."""

    def scores(self, k: int) -> np.ndarray:
        return np.where(k >= self.middle, self.donor, self.recipient)


def test_few_prompts_that_fail_are_not_overlooked():
    used, right = [], 0
    for seed in range(60):
        world = Refusals(seed, prompts=100)
        found = smallest(world.measure, KS, world.recipient, world.donor, share=0.9, seed=seed)
        right += found.k == world.exact(0.9)
        used.append(found.used / found.full)
    assert right >= 59
    assert np.mean(used) < 1 / 3


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_it_is_the_whole_grids_for_a_third_of_the_completions(share):
    used, right = [], 0
    for seed in range(40):
        world = World(seed)
        found = smallest(world.measure, KS, world.recipient, world.donor, share=share, seed=seed)
        exact = world.exact(share)
        right += found.k == exact
        used.append(found.used / found.full)
        assert len(world.asked) == len(set(world.asked)) == found.used, "nothing is asked for twice"
        assert found.full == len(KS) * 150
    assert right >= 39
    assert np.mean(used) < 1 / 3
    assert max(used) < 0.55


def test_the_interval_holds_the_answer_for_other_prompts_too():
    """Prompts are drawn from many: what the many would give lies in the interval as often as it says."""
    many = World(0, prompts=20_000)
    truth, held = many.exact(0.6), 0
    draw = np.random.default_rng(1)
    for seed in range(200):
        some = draw.choice(20_000, 120, replace=False)
        found = smallest(
            lambda pairs, some=some: [many.scores(k)[some[prompt]] for k, prompt in pairs],
            KS, many.recipient[some], many.donor[some], share=0.6, seed=seed,
        )  # fmt: skip
        held += (found.low is not None and found.low <= truth) and (found.high is None or truth <= found.high)
    assert held >= 190


def test_ends_of_the_grid():
    world = World(3, top=0.2)
    assert smallest(world.measure, KS, world.recipient, world.donor).k is None
    found = smallest(world.measure, [1300, 2000], world.recipient, world.donor, share=0.01)
    assert (found.k, found.low) == (1300, 1300)
    same = World(4, noise=0.0)
    same.scores = lambda k: same.donor if k >= 250 else same.recipient
    found = smallest(same.measure, KS, same.recipient, same.donor)
    assert (found.k, found.low) == (250, 250)
    assert found.high in (250, None), "not so many prompts that it is sure of others"
    assert found.used < found.full / 3
    assert all(seen.effect == pytest.approx(1.0) for seen in found.curve if seen.k >= 250 and seen.prompts == 150)


def test_a_score_that_rises_with_the_donor_is_recovered_as_well():
    world = World(5)
    world.recipient, world.donor = -world.recipient, -world.donor
    assert smallest(world.measure, KS, world.recipient, world.donor, share=0.6).k == world.exact(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": []}, "ks must rise"),
        ({"ks": [3, 2]}, "ks must rise"),
        ({"ks": [-1, 2]}, "not be negative"),
        ({"share": 0.0}, "share must lie"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"donor": [1.0, 2.0]}, r"each prompt, got \[3\] and \[2\]"),
        ({"donor": [3.0, 2.0, 1.0]}, "nothing to recover"),
        ({"measure": lambda pairs: [float("nan")] * len(pairs)}, "finite scores"),
        ({"measure": lambda pairs: [1.0]}, "finite scores, got 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"measure": lambda pairs: [0.0] * len(pairs), "ks": [1, 2], "recipient": [1.0, 2.0, 3.0],
             "donor": [0.0, 0.0, 0.0], **change}  # fmt: skip
    with pytest.raises(SnpatchError, match=message):
        smallest(**given)


def test_blocks_that_suffice_are_found_greedily():
    world, weight = World(6, noise=1.0), {"l2": 0.55, "l5": 0.4, **{f"l{i}": 0.01 for i in (0, 1, 3, 4, 6, 7)}}
    asked, gap = [], world.donor - world.recipient

    def measure(pairs):
        asked.extend(pairs)
        return [world.recipient[p] + sum(weight[n] for n in names) * gap[p] + world.noise[p] / 9 for names, p in pairs]

    found = blocks(measure, sorted(weight), world.recipient, world.donor)
    assert [block.name for block in found] == ["l2", "l5"]
    assert found[1].effect == pytest.approx(0.95, abs=0.03)
    assert len(asked) == len(set(asked)) == sum(block.used for block in found) < 15 * 150 * 0.6
    every = blocks(measure, ["l0", "l1"], world.recipient, world.donor)
    assert {block.name for block in every} == {"l0", "l1"}, "all, where they do not suffice"
    with pytest.raises(SnpatchError, match="a name each"):
        blocks(measure, ["l0", "l0"], world.recipient, world.donor)
