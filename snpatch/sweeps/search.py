"""The smallest window that recovers a share of the donor's gain, from as few completions as possible.

How it is decided: of each window the scores of some prompts are known, in one random order of all prompts. A window
suffices if its mean score lies past the point `share` of the way from the recipient's mean to the donor's, prompt by
prompt (what all prompts of a kind have in common cancels). It is decided by betting against the contrary (Waudby-Smith
and Ramdas, "Estimating means of bounded random variables by betting", 2020, without replacement): a bet that may be
looked at after every prompt, and that holds for any distribution of bounded scores. Few prompts that fail outright are
the rule here, and an interval of the normal kind, from a dozen prompts that all went well, would know nothing of them.
Where every prompt was seen there is nothing left to decide.

What is assumed: the effect rises with k. Windows on the far side of a decided one are not looked at.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from snpatch.errors import SnpatchError
from snpatch.statistics import half_width

FIRST = 12  # prompts of the first look
PROBES = 3  # windows of a round
FRACTIONS = np.linspace(0.05, 0.95, 10)[:, None]  # of the largest bets; all are made side by side
ROOM = 0.25  # by which scores may lie outside those of the unpatched models, as a share of their range

Measure = Callable[[list[tuple[Hashable, int]]], Sequence[float]]  # (what is patched, prompt) -> score of its text


@dataclass(frozen=True)
class Seen:
    """What is known of a window. effect: Eq. 4 over the prompts seen, with its interval for all prompts."""

    k: int
    prompts: int
    effect: float
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """k: the smallest window of the grid that suffices for these prompts; None: none does.

    low, high: the windows that cannot be told from it for prompts like these, at the asked confidence; None: no end
    was seen. used: completions; full: of the whole grid.
    """

    k: int | None
    low: int | None
    high: int | None
    curve: tuple[Seen, ...]
    used: int
    full: int
    rounds: int


@dataclass(frozen=True)
class Block:
    """A block that was added, the effect with it (over all prompts), and the completions that it took to choose it."""

    name: str
    effect: float
    used: int


def smallest(
    measure: Measure,
    ks: Sequence[int],
    recipient: ArrayLike,  # [prompts], scores of the unpatched recipient
    donor: ArrayLike,  # [prompts], of the unpatched donor
    *,
    share: float = 0.9,
    confidence: float = 0.95,
    seed: int = 0,
) -> Found:
    """The smallest of ks that recovers `share` of the way from the recipient's mean score to the donor's.

    measure: scores of (k, prompt) pairs, each asked for once. For an effect that rises with k, `k` is what the whole
    grid would give with probability `confidence`.
    """
    asked = _Asked(measure, recipient, donor, share, seed)
    ks = list(ks)
    if not ks or ks != sorted(set(ks)) or ks[0] < 0:
        raise SnpatchError(f"minimal: ks must rise and not be negative, got {ks}")
    if not 0 < confidence < 1:
        raise SnpatchError(f"minimal: confidence must lie between 0 and 1, got {confidence}")
    risk = (1 - confidence) / len(ks)
    low, high, rounds = -1, len(ks), 0
    while high - low > 1:
        rounds += 1
        inside = range(low + 1, high)
        begun = [i for i in inside if asked.seen(ks[i])]
        chosen = begun or [low + (high - low) * (j + 1) // (PROBES + 1) for j in range(PROBES)]
        chosen = [i for i in dict.fromkeys(chosen) if low < i < high] or [(low + high) // 2]
        asked.look([ks[i] for i in chosen])
        for i in chosen:
            verdict = asked.verdict(ks[i], risk)
            if verdict > 0:
                high = min(high, i)
            elif verdict < 0:
                low = max(low, i)
        low = min(low, high - 1)
    # What holds for prompts like these and not only for these: as if they were drawn from infinitely many.
    sure = [asked.verdict(k, risk, of_all=False) if asked.seen(k) else 0 for k in ks]
    enough = next((i for i, verdict in enumerate(sure) if verdict > 0), None)
    too_few = max((i for i, verdict in enumerate(sure) if verdict < 0), default=-1)
    return Found(
        ks[high] if high < len(ks) else None,
        ks[too_few + 1] if too_few + 1 < len(ks) else None,
        None if enough is None else ks[enough],
        tuple(asked.told(k, (1 - confidence) / 2) for k in ks if asked.seen(k)),
        asked.used,
        len(ks) * asked.prompts,
        rounds,
    )


def blocks(
    measure: Measure,
    names: Sequence[str],
    recipient: ArrayLike,
    donor: ArrayLike,
    *,
    share: float = 0.9,
    seed: int = 0,
) -> list[Block]:
    """Blocks that together recover `share`, each the one that adds most to those before it; all, if they do not.

    measure: scores of (names of the patched blocks, prompt) pairs. Of the candidates of a step the better half goes on
    to twice as many prompts.
    """
    if not names or len(set(names)) < len(names):
        raise SnpatchError(f"minimal: blocks must have a name each, got {list(names)}")
    asked, chosen = _Asked(measure, recipient, donor, share, seed), []
    while len(chosen) < len(names) and (not chosen or chosen[-1].effect < share):
        before, start = tuple(block.name for block in chosen), asked.used
        left = [(*before, name) for name in names if name not in before]
        while True:
            asked.look(left)
            if len(left) == 1:
                break
            left = sorted(left, key=asked.mean, reverse=True)[: -(-len(left) // 2)]
        while asked.seen(left[0]) < asked.prompts:
            asked.look(left)
        chosen.append(Block(left[0][-1], asked.told(left[0], 0.025).effect, asked.used - start))
    return chosen


class _Asked:
    """What was measured so far: of each window the first prompts of one random order."""

    def __init__(self, measure: Measure, recipient: ArrayLike, donor: ArrayLike, share: float, seed: int) -> None:
        recipient, donor = (np.asarray(scores, dtype=float) for scores in (recipient, donor))
        if recipient.shape != donor.shape or recipient.ndim != 1 or not len(recipient):
            raise SnpatchError(
                f"minimal: wanted a score of both models for each prompt, got {list(recipient.shape)} and "
                f"{list(donor.shape)}"
            )
        if not 0 < share <= 1:
            raise SnpatchError(f"minimal: share must lie in (0, 1], got {share}")
        gap = donor.mean() - recipient.mean()
        if not math.isfinite(gap) or gap == 0:
            raise SnpatchError("minimal: the two models' mean scores are the same: there is nothing to recover")
        self.prompts, self.used, self.share, self.gap = len(recipient), 0, share, abs(gap)
        self._sign, self._target = math.copysign(1, gap), recipient + share * (donor - recipient)
        scores = self._sign * np.concatenate([recipient, donor])
        target, room = self._sign * self._target, ROOM * np.ptp(scores)
        self._range = scores.min() - room - target.max(), scores.max() + room - target.min()
        self._order = np.random.default_rng(seed).permutation(self.prompts)
        self._measure, self._past = measure, {}
        sizes = [min(FIRST, self.prompts)]
        while sizes[-1] < self.prompts:
            sizes.append(min(2 * sizes[-1], self.prompts))
        self.looks = sizes

    def seen(self, what: Hashable) -> int:
        """How many prompts of it are known."""
        return len(self._past.get(what, ()))

    def look(self, those: Sequence[Hashable]) -> None:
        """Measure each on as many prompts as its next look has."""
        pairs = []
        for what in those:
            n = next((size for size in self.looks if size > self.seen(what)), self.prompts)
            pairs += [(what, int(prompt)) for prompt in self._order[self.seen(what) : n]]
        scores = [float(score) for score in self._measure(pairs)] if pairs else []
        if len(scores) != len(pairs) or not all(map(math.isfinite, scores)):
            raise SnpatchError(f"minimal: wanted {len(pairs)} finite scores, got {len(scores)}")
        self.used += len(pairs)
        for (what, prompt), score in zip(pairs, scores, strict=True):
            self._past.setdefault(what, []).append(self._sign * (score - self._target[prompt]))

    def mean(self, what: Hashable) -> float:
        """How far it lies past the share, in scores."""
        return float(np.mean(self._past[what]))

    def verdict(self, what: Hashable, risk: float, of_all: bool = True) -> int:
        """1: it suffices; -1: it does not; 0: not decided. of_all: for these prompts, else for any like these.

        risk: probability of a wrong 1 or -1.
        """
        if of_all and self.seen(what) == self.prompts:
            return 1 if self.mean(what) >= -1e-12 * self.gap else -1
        low, high = self._range
        values = (np.clip(self._past[what], low, high) - low) / (high - low)
        middle, population = -low / (high - low), self.prompts if of_all else None
        if _log_wealth(values, middle, population) >= -math.log(risk):
            return 1
        return -1 if _log_wealth(1 - values, 1 - middle, population) >= -math.log(risk) else 0

    def told(self, k, tail: float) -> Seen:
        """As an effect, with its t-interval for all prompts, which is for looking at and decides nothing."""
        middle = self.share + self.mean(k) / self.gap
        half = half_width(self._past[k], tail, self.prompts) / self.gap
        return Seen(k, self.seen(k), middle, middle - half, middle + half)


def _log_wealth(values: np.ndarray, mean: float, population: int | None) -> float:
    """The logarithm of the largest wealth that bets on a mean above `mean` ever had, from 1; values: [n] in [0, 1].

    Where the mean of all is at most that, it reaches 1 / risk with probability `risk` at most. population: how many
    values there are, of which these are the first in a random order; None: infinitely many.
    """
    n = len(values)
    if population is None:
        left = np.full(n, mean)
    else:  # the mean that is left for the values not seen yet
        left = (population * mean - np.cumsum(values) + values) / (population - np.arange(n))
    if (left <= 0).any():
        return math.inf
    bets = np.where(left < 1, FRACTIONS / np.minimum(left, 1), 0.0)
    wealth = np.cumsum(np.log1p(bets * (values - left)), axis=1)
    return float((np.logaddexp.reduce(wealth, axis=0) - math.log(len(FRACTIONS))).max())
