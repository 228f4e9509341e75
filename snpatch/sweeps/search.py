"""Search for the smallest window that reaches a target effect, from as few completions as possible.

How it decides: of each window the scores of some prompts are known, in one random order of all prompts. A window
suffices if its mean score is past the point `target` of the way from the recipient's mean to the donor's, prompt by
prompt (so that what all prompts have in common cancels). The test bets against the contrary (see betting.py): its
result may be read after every prompt. When every prompt was seen, nothing is left to decide.

What it assumes: scores are bounded. Without a `score_range` the bounds are a guess from the unpatched models' scores.
A score outside the guess shows that it is wrong, but a rare one may be unseen, so that the answer is then always
measured on all prompts; that smaller windows are too small still depends on the guess. With `monotone`, the effect also
rises with k: windows on the far side of a decided one are not sampled, and `conflict` lists the evidence against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from snpatch.errors import SnpatchError
from snpatch.statistics import Interval, causal_effect, estimate_gap
from snpatch.sweeps.sequential_test import Measure, SequentialTest, WindowEstimate

WINDOWS_PER_ROUND = 3
MIN_FALL_T = 4.0  # paired t of the fall between two windows, from which the effect does not rise with k
MIN_FALL = 0.02  # size of such a fall, as a fraction of the gap
MIN_BLOCK_PROMPTS = 4  # two to choose blocks and two to measure them


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        k: The smallest window of the grid that suffices for these prompts; None if none does. With `monotone`, it is
            the smallest only if the effect rises with k.
        low: The smallest window that may suffice for prompts like these, at the given confidence; None if none may.
        high: The smallest window that surely suffices for prompts like these; None if none does.
        curve: Estimates of the windows that were sampled.
        monotone: Whether it was assumed that the effect rises with k.
        conflict: With `monotone`, the sampled windows that contradict the assumption: smaller than k with an estimate
            that reaches the target, larger than k without reaching it, or clearly below a smaller window on the same
            prompts.
        used: Completions used.
        full: Completions of the whole grid.
        rounds: Rounds of sampling.
    """

    k: int | None
    low: int | None
    high: int | None
    curve: tuple[WindowEstimate, ...]
    monotone: bool
    conflict: tuple[int, ...]
    used: int
    full: int
    rounds: int


@dataclass(frozen=True)
class Block:
    """A block that was added.

    Attributes:
        name: The block.
        effect: Effect of all blocks up to this one over the prompts that did not choose them, with its bootstrap
            interval.
        used: Completions used to choose it and to measure its effect.
    """

    name: str
    effect: Interval
    used: int


def find_smallest_window(
    measure: Measure,
    ks: Sequence[int],
    recipient: ArrayLike,  # [prompts], scores of the unpatched recipient
    donor: ArrayLike,  # [prompts], scores of the unpatched donor
    *,
    target: float = 0.9,
    confidence: float = 0.95,
    monotone: bool = True,
    score_range: tuple[float, float] | None = None,
    seed: int = 0,
) -> SearchResult:
    """Find the smallest k that covers `target` of the way from the recipient's mean score to the donor's.

    Args:
        measure: Returns the scores of (k, prompt) pairs; each pair is requested once.
        ks: The grid, rising.
        recipient: Scores [prompts] of the unpatched recipient.
        donor: Scores [prompts] of the unpatched donor.
        target: Effect to reach, in (0, 1].
        confidence: Probability that `k` is what the whole grid would give; with `monotone`, if the effect rises with k.
        monotone: Assume that the effect rises with k. Otherwise every window below the answer is decided by itself.
        score_range: The judge's lowest and highest possible score. Default: the range of the unpatched scores and a
            quarter of it on both sides, and the answer is measured on all prompts.
        seed: Seed of the order of prompts.

    Raises:
        SnpatchError: An argument is invalid, the two models' scores do not differ clearly, or a score is outside
            `score_range`.
    """
    recipient, donor = _check_scores(recipient, donor)
    order = np.random.default_rng(seed).permutation(len(recipient))
    test, ks = SequentialTest(measure, recipient, donor, target, order, score_range), list(ks)
    if not ks or ks != sorted(set(ks)) or ks[0] < 0:
        raise SnpatchError(f"minimal: ks: expected rising numbers from 0 on, got {ks}")
    if not 0 < confidence < 1:
        raise SnpatchError(f"minimal: confidence: expected a value in (0, 1), got {confidence}")
    risk = (1 - confidence) / len(ks)
    verdicts, rounds = [0] * len(ks), 0
    while True:
        answer = next((i for i, verdict in enumerate(verdicts) if verdict > 0), len(ks))
        if chosen := _choose_windows(test, ks, verdicts, answer, monotone):
            test.sample([ks[i] for i in chosen])
        elif answer < len(ks) and score_range is None and not test.is_complete(ks[answer]):
            chosen = [answer]
            test.sample_all([ks[answer]])
        else:
            break
        rounds += 1
        for i in chosen:
            verdicts[i] = test.verdict(ks[i], risk)
    tail = (1 - confidence) / 2
    curve = tuple(test.to_estimate(k, tail, v) for k, v in zip(ks, verdicts, strict=True) if test.num_seen(k))
    k = ks[answer] if answer < len(ks) else None
    conflict = _find_conflict(test, curve, k) if monotone else ()
    # Verdicts for prompts like these and not only for these: as if they were drawn from infinitely many.
    outlook = [test.verdict(k, risk, is_population=False) if test.num_seen(k) else 0 for k in ks]
    enough = next((i for i, verdict in enumerate(outlook) if verdict > 0), len(ks))
    too_small = {i for i in range(enough) if outlook[i] < 0}
    if monotone and not conflict:
        too_small.update(range(max(too_small, default=0)))
    low = next((i for i in range(len(ks)) if i not in too_small), None)
    return SearchResult(
        k=k,
        low=None if low is None else ks[low],
        high=ks[enough] if enough < len(ks) else None,
        curve=curve,
        monotone=monotone,
        conflict=conflict,
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
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Block]:
    """Choose blocks greedily until they reach the target effect together; return all if they do not.

    Each step adds the block that gains most. The better half of its candidates is sampled on twice as many prompts.
    One random half of the prompts chooses the blocks and ends the search; the other half measures the effects, because
    the chosen block's effect on the prompts that chose it is too high.

    Args:
        measure: Returns the scores of (names of the patched blocks, prompt) pairs.
        names: Names of the blocks.
        recipient: See find_smallest_window; so are donor, target and seed.
        donor: See find_smallest_window.
        target: Effect to reach, in (0, 1].
        confidence: Level of the intervals.
        seed: Seed of the halves and of the order of prompts.

    Raises:
        SnpatchError: An argument is invalid, or the two models' scores do not differ clearly.
    """
    if not names or len(set(names)) < len(names):
        raise SnpatchError(f"minimal: blocks: expected a different name for each, got {list(names)}")
    recipient, donor = _check_scores(recipient, donor)
    if len(recipient) < MIN_BLOCK_PROMPTS:
        raise SnpatchError(f"minimal: blocks: expected at least {MIN_BLOCK_PROMPTS} prompts, got {len(recipient)}")
    choosing, measuring = np.array_split(np.random.default_rng(seed).permutation(len(recipient)), 2)
    test = SequentialTest(measure, recipient, donor, target, choosing)
    report = SequentialTest(measure, recipient, donor, target, measuring)
    steps: list[tuple[tuple[str, ...], int]] = []  # names of the chosen blocks, and completions used to choose the last
    while len(steps) < len(names) and (not steps or not test.reaches_target(steps[-1][0])):
        before, used_before = steps[-1][0] if steps else (), test.used
        candidates = [(*before, name) for name in names if name not in before]
        while True:
            test.sample(candidates)
            if len(candidates) == 1:
                break
            candidates = sorted(candidates, key=test.mean, reverse=True)[: -(-len(candidates) // 2)]
        test.sample_all(candidates)
        steps.append((candidates[0], test.used - used_before))
    report.sample_all([chosen for chosen, _ in steps])
    effects = [
        causal_effect(report.scores(chosen), recipient[measuring], donor[measuring], confidence=confidence)
        for chosen, _ in steps
    ]
    return [
        Block(chosen[-1], effect, used + len(measuring)) for (chosen, used), effect in zip(steps, effects, strict=True)
    ]


def _check_scores(recipient: ArrayLike, donor: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both models' scores; raise unless their gap is established."""
    recipient, donor = (np.asarray(scores, dtype=float) for scores in (recipient, donor))
    if recipient.shape != donor.shape or recipient.ndim != 1 or not len(recipient):
        raise SnpatchError(
            f"minimal: expected a score of both models for each prompt, got {list(recipient.shape)} and "
            f"{list(donor.shape)}"
        )
    gap = estimate_gap(recipient, donor)
    if not gap.is_established:
        raise SnpatchError(
            f"minimal: the gap between the two models over {len(recipient)} prompts is {gap.reason}. Give more "
            "prompts, or a pair that differs more."
        )
    return recipient, donor


def _choose_windows(
    test: SequentialTest, ks: Sequence[int], verdicts: Sequence[int], answer: int, monotone: bool
) -> list[int]:
    """Return the indices of the windows to sample next; none if all windows below the answer are decided."""
    undecided = [i for i in range(answer) if verdicts[i] == 0]
    if monotone:  # windows below one that is too small are, too, unless their own estimate contradicts
        too_small = max((i for i in range(answer) if verdicts[i] < 0), default=-1)
        undecided = [i for i in undecided if i > too_small or (test.num_seen(ks[i]) and test.reaches_target(ks[i]))]
    if started := [i for i in undecided if test.num_seen(ks[i])]:
        return started
    if not monotone and answer < len(ks):
        return undecided
    places = [(len(undecided) + 1) * (j + 1) // (WINDOWS_PER_ROUND + 1) - 1 for j in range(WINDOWS_PER_ROUND)]
    return [undecided[place] for place in dict.fromkeys(places) if 0 <= place < len(undecided)]


def _find_conflict(test: SequentialTest, curve: Sequence[WindowEstimate], k: int | None) -> tuple[int, ...]:
    """Return the sampled windows that contradict an effect that rises with k."""
    conflict = []
    for i, estimate in enumerate(curve):
        is_smaller = k is None or estimate.k < k
        is_contrary = estimate.effect >= test.target if is_smaller else estimate.suffices is False
        if is_contrary or any(_is_fall(test, smaller.k, estimate.k) for smaller in curve[:i]):
            conflict.append(estimate.k)
    return tuple(conflict)


def _is_fall(test: SequentialTest, smaller: int, larger: int) -> bool:
    """Return whether the effect is clearly lower at the larger window, on the prompts that both have seen."""
    n = min(test.num_seen(smaller), test.num_seen(larger))
    before, after = test.surpluses(smaller)[:n], test.surpluses(larger)[:n]
    fall = estimate_gap(after, before)
    return (fall.difference.value or 0.0) / test.gap >= MIN_FALL and (fall.t or 0.0) >= MIN_FALL_T
