"""Search for the smallest window that reaches a target effect, from as few completions as possible.

How it decides: of each window the scores of some prompts are known, in one random order of all prompts. A window
suffices if its mean score is past the point `target` of the way from the recipient's mean to the donor's, prompt by
prompt (so that what all prompts have in common cancels). The test bets against the contrary (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", 2020, without replacement): its result may be read after
every prompt, and it holds for any distribution of bounded scores. A normal interval would not do: often a few prompts
fail outright, and a dozen prompts that all went well say nothing about them. When every prompt was seen, nothing is
left to decide.

Assumption: the effect rises with k. Windows on the far side of a decided one are not sampled.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from snpatch.errors import SnpatchError
from snpatch.statistics import half_width

FIRST_SAMPLE_SIZE = 12  # prompts of a window's first sample; each further one doubles them
WINDOWS_PER_ROUND = 3
BET_FRACTIONS = np.linspace(0.05, 0.95, 10)[:, None]  # of the largest possible bet; all are made in parallel
RANGE_MARGIN = 0.25  # how far scores may be outside the range of the unpatched models, as a fraction of it

Measure = Callable[
    [list[tuple[Hashable, int]]], Sequence[float]
]  # (what is patched, prompt) -> score of the completion


@dataclass(frozen=True)
class WindowEstimate:
    """Effect (Eq. 4) of a window over the prompts seen so far, with its interval for all prompts."""

    k: int
    prompts: int
    effect: float
    low: float
    high: float


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        k: The smallest window of the grid that suffices for these prompts; None if none does.
        low: The smallest window that may suffice for prompts like these, at the given confidence; None if none may.
        high: The smallest window that surely suffices for prompts like these; None if none does.
        curve: Estimates of the windows that were sampled.
        used: Completions used.
        full: Completions of the whole grid.
        rounds: Rounds of sampling.
    """

    k: int | None
    low: int | None
    high: int | None
    curve: tuple[WindowEstimate, ...]
    used: int
    full: int
    rounds: int


@dataclass(frozen=True)
class Block:
    """A block that was added, the effect over all prompts with it, and the completions used to choose it."""

    name: str
    effect: float
    used: int


def find_smallest_window(
    measure: Measure,
    ks: Sequence[int],
    recipient: ArrayLike,  # [prompts], scores of the unpatched recipient
    donor: ArrayLike,  # [prompts], scores of the unpatched donor
    *,
    target: float = 0.9,
    confidence: float = 0.95,
    seed: int = 0,
) -> SearchResult:
    """Find the smallest k that covers `target` of the way from the recipient's mean score to the donor's.

    Args:
        measure: Returns the scores of (k, prompt) pairs; each pair is requested once.
        ks: The grid, rising.
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        target: Effect to reach, in (0, 1].
        confidence: Probability that `k` is what the whole grid would give, if the effect rises with k.
        seed: Seed of the order of prompts.
    """
    test = _SequentialTest(measure, recipient, donor, target, seed)
    ks = list(ks)
    if not ks or ks != sorted(set(ks)) or ks[0] < 0:
        raise SnpatchError(f"minimal: ks: expected rising numbers from 0 on, got {ks}")
    if not 0 < confidence < 1:
        raise SnpatchError(f"minimal: confidence: expected a value in (0, 1), got {confidence}")
    risk = (1 - confidence) / len(ks)
    low, high, rounds = -1, len(ks), 0  # indices: all up to low are too small, all from high on suffice
    while high - low > 1:
        rounds += 1
        started = [i for i in range(low + 1, high) if test.num_seen(ks[i])]
        spread = [low + (high - low) * (j + 1) // (WINDOWS_PER_ROUND + 1) for j in range(WINDOWS_PER_ROUND)]
        chosen = [i for i in dict.fromkeys(started or spread) if low < i < high] or [(low + high) // 2]
        test.sample([ks[i] for i in chosen])
        for i in chosen:
            verdict = test.verdict(ks[i], risk)
            if verdict > 0:
                high = min(high, i)
            elif verdict < 0:
                low = max(low, i)
        low = min(low, high - 1)
    # Verdicts for prompts like these and not only for these: as if they were drawn from infinitely many.
    verdicts = [test.verdict(k, risk, is_population=False) if test.num_seen(k) else 0 for k in ks]
    enough = next((i for i, verdict in enumerate(verdicts) if verdict > 0), None)
    too_few = max((i for i, verdict in enumerate(verdicts) if verdict < 0), default=-1)
    return SearchResult(
        k=ks[high] if high < len(ks) else None,
        low=ks[too_few + 1] if too_few + 1 < len(ks) else None,
        high=None if enough is None else ks[enough],
        curve=tuple(test.to_estimate(k, (1 - confidence) / 2) for k in ks if test.num_seen(k)),
        used=test.used,
        full=len(ks) * test.prompts,
        rounds=rounds,
    )


def find_blocks(
    measure: Measure,
    names: Sequence[str],
    recipient: ArrayLike,
    donor: ArrayLike,
    *,
    target: float = 0.9,
    seed: int = 0,
) -> list[Block]:
    """Choose blocks greedily until they reach the target effect together; return all if they do not.

    Each step adds the block that gains most. The better half of its candidates is sampled on twice as many prompts.

    Args:
        measure: Returns the scores of (names of the patched blocks, prompt) pairs.
        names: Names of the blocks.
        recipient: See find_smallest_window; so are donor, target and seed.
    """
    if not names or len(set(names)) < len(names):
        raise SnpatchError(f"minimal: blocks: expected a different name for each, got {list(names)}")
    test, chosen = _SequentialTest(measure, recipient, donor, target, seed), []
    while len(chosen) < len(names) and (not chosen or chosen[-1].effect < target):
        before, used_before = tuple(block.name for block in chosen), test.used
        candidates = [(*before, name) for name in names if name not in before]
        while True:
            test.sample(candidates)
            if len(candidates) == 1:
                break
            candidates = sorted(candidates, key=test.mean, reverse=True)[: -(-len(candidates) // 2)]
        (best,) = candidates
        while test.num_seen(best) < test.prompts:
            test.sample(candidates)
        chosen.append(Block(best[-1], test.to_estimate(best, 0.025).effect, test.used - used_before))
    return chosen


class _SequentialTest:
    """Scores measured so far: for each window (or set of blocks) the first prompts of one random order."""

    def __init__(self, measure: Measure, recipient: ArrayLike, donor: ArrayLike, target: float, seed: int) -> None:
        recipient, donor = (np.asarray(scores, dtype=float) for scores in (recipient, donor))
        if recipient.shape != donor.shape or recipient.ndim != 1 or not len(recipient):
            raise SnpatchError(
                f"minimal: expected a score of both models for each prompt, got {list(recipient.shape)} and "
                f"{list(donor.shape)}"
            )
        if not 0 < target <= 1:
            raise SnpatchError(f"minimal: target effect: expected a value in (0, 1], got {target}")
        gap = donor.mean() - recipient.mean()
        if not math.isfinite(gap) or gap == 0:
            raise SnpatchError("minimal: the two models' mean scores are the same: there is nothing to recover")
        self.prompts, self.used, self.target, self.gap = len(recipient), 0, target, abs(gap)
        self._sign, self._target_scores = math.copysign(1, gap), recipient + target * (donor - recipient)
        scores = self._sign * np.concatenate([recipient, donor])
        target_scores, margin = self._sign * self._target_scores, RANGE_MARGIN * np.ptp(scores)
        self._range = scores.min() - margin - target_scores.max(), scores.max() + margin - target_scores.min()
        self._order = np.random.default_rng(seed).permutation(self.prompts)
        self._measure = measure
        self._surpluses: dict[Hashable, list[float]] = {}  # scores past the target, in the order of prompts
        self._sample_sizes = [min(FIRST_SAMPLE_SIZE, self.prompts)]
        while self._sample_sizes[-1] < self.prompts:
            self._sample_sizes.append(min(2 * self._sample_sizes[-1], self.prompts))

    def num_seen(self, key: Hashable) -> int:
        """Return the number of prompts with a score."""
        return len(self._surpluses.get(key, ()))

    def sample(self, keys: Sequence[Hashable]) -> None:
        """Measure each key on its next sample of prompts."""
        pairs = []
        for key in keys:
            n = next((size for size in self._sample_sizes if size > self.num_seen(key)), self.prompts)
            pairs += [(key, int(prompt)) for prompt in self._order[self.num_seen(key) : n]]
        scores = [float(score) for score in self._measure(pairs)] if pairs else []
        if len(scores) != len(pairs) or not all(map(math.isfinite, scores)):
            raise SnpatchError(f"minimal: expected {len(pairs)} finite scores, got {len(scores)}")
        self.used += len(pairs)
        for (key, prompt), score in zip(pairs, scores, strict=True):
            self._surpluses.setdefault(key, []).append(self._sign * (score - self._target_scores.item(prompt)))

    def mean(self, key: Hashable) -> float:
        """Return the mean score past the target."""
        return float(np.mean(self._surpluses[key]))

    def verdict(self, key: Hashable, risk: float, is_population: bool = True) -> int:
        """Return 1 if the key reaches the target, -1 if it does not, 0 if that is undecided.

        Args:
            key: What is patched.
            risk: Probability of a wrong 1 or -1.
            is_population: Decide for these prompts; otherwise for infinitely many prompts like these.
        """
        if is_population and self.num_seen(key) == self.prompts:
            return 1 if self.mean(key) >= -1e-12 * self.gap else -1
        low, high = self._range
        values = (np.clip(self._surpluses[key], low, high) - low) / (high - low)
        middle, population = -low / (high - low), self.prompts if is_population else None
        if _log_wealth(values, middle, population) >= -math.log(risk):
            return 1
        return -1 if _log_wealth(1 - values, 1 - middle, population) >= -math.log(risk) else 0

    def to_estimate(self, key, tail: float) -> WindowEstimate:
        """Return the effect with its t-interval for all prompts. It is for display and decides nothing."""
        effect = self.target + self.mean(key) / self.gap
        half = half_width(self._surpluses[key], tail, self.prompts) / self.gap
        return WindowEstimate(key, self.num_seen(key), effect, effect - half, effect + half)


def _log_wealth(values: np.ndarray, mean: float, population: int | None) -> float:
    """Return the logarithm of the largest wealth, from 1, of bets that the mean is above `mean`.

    If the mean of all values is at most `mean`, the wealth reaches 1 / risk with a probability of at most `risk`.

    Args:
        values: Values [n] in [0, 1], the first of the population in a random order.
        mean: The mean that is bet against.
        population: Number of all values; None: infinite.
    """
    n = len(values)
    if population is None:
        expected = np.full(n, mean)
    else:  # mean of the values that are not seen yet
        expected = (population * mean - np.cumsum(values) + values) / (population - np.arange(n))
    if (expected <= 0).any():
        return math.inf
    bets = np.where(expected < 1, BET_FRACTIONS / np.minimum(expected, 1), 0.0)
    log_wealth = np.cumsum(np.log1p(bets * (values - expected)), axis=1)
    return float((np.logaddexp.reduce(log_wealth, axis=0) - math.log(len(BET_FRACTIONS))).max())
