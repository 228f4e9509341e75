"""SequentialTest: scores of windows on more and more prompts, and what they decide.

Why scores are compared prompt by prompt with the point `target` of the way from recipient to donor: what all prompts
have in common cancels.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from snpatch.errors import SnpatchError
from snpatch.sweeps.betting import compute_bounds, compute_log_wealth

FIRST_SAMPLE_SIZE = 12  # prompts of a window's first sample; each further one doubles them
RANGE_MARGIN = 0.25  # how far scores may be outside the range of the unpatched models, as a fraction of it

Measure = Callable[
    [list[tuple[Hashable, int]]], Sequence[float]
]  # (what is patched, prompt) -> score of the completion


@dataclass(frozen=True)
class WindowEstimate:
    """Effect (Eq. 4) of a window over the prompts seen so far, with its betting interval for all prompts.

    Attributes:
        k: The window.
        prompts: Prompts seen.
        effect: Effect over these prompts.
        low: Lower bound; None if scores outside the assumed range, on the recipient's side, leave it open.
        high: Upper bound; None if scores outside the assumed range, on the donor's side, leave it open.
        suffices: Whether the window reaches the target; None if that is undecided.
        clipped: Scores outside the assumed range.
    """

    k: int
    prompts: int
    effect: float
    low: float | None
    high: float | None
    suffices: bool | None
    clipped: int


class SequentialTest:
    """Scores measured so far: for each window (or set of blocks) the first prompts of one random order.

    Args:
        measure: See find_smallest_window.
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        target: Effect to reach.
        order: Indices of the prompts that may be measured, in their order.
        score_range: See find_smallest_window.
    """

    def __init__(
        self,
        measure: Measure,
        recipient: np.ndarray,
        donor: np.ndarray,
        target: float,
        order: np.ndarray,
        score_range: tuple[float, float] | None = None,
    ) -> None:
        if not 0 < target <= 1:
            raise SnpatchError(f"minimal: target effect: expected a value in (0, 1], got {target}")
        gap = donor.mean() - recipient.mean()
        self.prompts, self.used, self.target, self.gap = len(order), 0, target, abs(gap)
        self._sign, self._score_range = math.copysign(1, gap), score_range
        self._target_scores = recipient + target * (donor - recipient)
        unpatched = np.concatenate([recipient, donor])
        if score_range is None:
            margin = RANGE_MARGIN * np.ptp(unpatched)
            bounds = np.array([unpatched.min() - margin, unpatched.max() + margin])
        else:
            bounds = np.array(score_range, dtype=float)
            if bounds.shape != (2,) or not np.isfinite(bounds).all() or bounds[0] >= bounds[1]:
                raise SnpatchError(f"minimal: score range: expected two rising numbers, got {score_range}")
            self._check_in_range(unpatched)
        low, high = np.sort(self._sign * bounds)
        target_scores = self._sign * self._target_scores
        self._range = low - target_scores.max(), high - target_scores.min()  # of scores past the target
        self._order, self._measure = order, measure
        self._scores: dict[Hashable, list[float]] = {}  # in the order of prompts
        self._sample_sizes = [min(FIRST_SAMPLE_SIZE, self.prompts)]
        while self._sample_sizes[-1] < self.prompts:
            self._sample_sizes.append(min(2 * self._sample_sizes[-1], self.prompts))

    def num_seen(self, key: Hashable) -> int:
        """Return the number of prompts with a score."""
        return len(self._scores.get(key, ()))

    def is_complete(self, key: Hashable) -> bool:
        """Return whether all prompts have a score."""
        return self.num_seen(key) == self.prompts

    def scores(self, key: Hashable) -> np.ndarray:
        """Return the scores of the prompts seen, in their order."""
        return np.array(self._scores[key])

    def sample(self, keys: Sequence[Hashable]) -> None:
        """Measure each key on its next sample of prompts."""
        sizes = [next((s for s in self._sample_sizes if s > self.num_seen(key)), self.prompts) for key in keys]
        self._measure_up_to(keys, sizes)

    def sample_all(self, keys: Sequence[Hashable]) -> None:
        """Measure each key on all further prompts."""
        self._measure_up_to(keys, [self.prompts] * len(keys))

    def surpluses(self, key: Hashable) -> np.ndarray:
        """Return the scores past the target, in the order of prompts."""
        return self._sign * (self.scores(key) - self._target_scores[self._order[: self.num_seen(key)]])

    def mean(self, key: Hashable) -> float:
        """Return the mean score past the target."""
        return float(self.surpluses(key).mean())

    def reaches_target(self, key: Hashable) -> bool:
        """Return whether the mean over the prompts seen reaches the target."""
        return self.mean(key) >= -1e-12 * self.gap

    def verdict(self, key: Hashable, risk: float, is_population: bool = True) -> int:
        """Return 1 if the key reaches the target, -1 if it does not, 0 if that is undecided.

        Args:
            key: What is patched.
            risk: Probability of a wrong 1 or -1.
            is_population: Decide for these prompts; otherwise for infinitely many prompts like these.
        """
        if is_population and self.is_complete(key):
            return 1 if self.reaches_target(key) else -1
        values, middle, population = self._to_bets(key, is_population)
        num_below, num_above = self._count_clipped(key)
        if not num_below and compute_log_wealth(values, middle, population) >= -math.log(risk):
            return 1
        is_too_small = not num_above and compute_log_wealth(1 - values, 1 - middle, population) >= -math.log(risk)
        return -1 if is_too_small else 0

    def bounds(self, key: Hashable, tail: float, is_population: bool = True) -> tuple[float, float]:
        """Return the betting interval of the effect; a side that clipped scores leave open is infinite.

        Args:
            key: What is patched.
            tail: Probability of each side.
            is_population: See verdict.
        """
        effect = self.target + self.mean(key) / self.gap
        if is_population and self.is_complete(key):
            return effect, effect
        values, middle, population = self._to_bets(key, is_population)
        width = (self._range[1] - self._range[0]) / self.gap
        low, high = (self.target + (m - middle) * width for m in compute_bounds(values, tail, population))
        num_below, num_above = self._count_clipped(key)
        return -math.inf if num_below else min(low, effect), math.inf if num_above else max(high, effect)

    def to_estimate(self, key, tail: float, verdict: int) -> WindowEstimate:
        """Return the effect with its betting interval for all prompts."""
        low, high = self.bounds(key, tail)
        return WindowEstimate(
            key,
            self.num_seen(key),
            self.target + self.mean(key) / self.gap,
            None if math.isinf(low) else low,
            None if math.isinf(high) else high,
            None if verdict == 0 else verdict > 0,
            sum(self._count_clipped(key)),
        )

    def _measure_up_to(self, keys: Sequence[Hashable], sizes: Sequence[int]) -> None:
        pairs = []
        for key, size in zip(keys, sizes, strict=True):
            pairs += [(key, int(prompt)) for prompt in self._order[self.num_seen(key) : size]]
        scores = [float(score) for score in self._measure(pairs)] if pairs else []
        if len(scores) != len(pairs) or not all(map(math.isfinite, scores)):
            raise SnpatchError(f"minimal: expected {len(pairs)} finite scores, got {len(scores)}")
        if self._score_range is not None:
            self._check_in_range(scores)
        self.used += len(pairs)
        for (key, _), score in zip(pairs, scores, strict=True):
            self._scores.setdefault(key, []).append(score)

    def _check_in_range(self, scores: ArrayLike) -> None:
        assert self._score_range is not None
        low, high = self._score_range
        outside = [score for score in np.asarray(scores).tolist() if not low <= score <= high]
        if outside:
            raise SnpatchError(
                f"minimal: score range: expected scores in {low} .. {high}, got {outside[0]}. Give the judge's own "
                "bounds, or none."
            )

    def _count_clipped(self, key: Hashable) -> tuple[int, int]:
        """Return how many scores are below the range and above it, seen from the recipient to the donor."""
        surpluses, (low, high) = self.surpluses(key), self._range
        return int((surpluses < low).sum()), int((surpluses > high).sum())

    def _to_bets(self, key: Hashable, is_population: bool) -> tuple[np.ndarray, float, int | None]:
        """Return the scores past the target in [0, 1], the target there, and the number of all prompts."""
        low, high = self._range
        values = (np.clip(self.surpluses(key), low, high) - low) / (high - low)
        return values, -low / (high - low), self.prompts if is_population else None
