"""Split-half reliability: how far a ranking depends on which prompts its contrast read.

A contrast keeps the sums of two random halves of its prompts (Ranking.half). Each half gives a ranking.
"""

from dataclasses import dataclass

import numpy as np

from snpatch.op.plan import UNRANKED
from snpatch.ranking.methods import METHODS
from snpatch.ranking.ranking import Ranking
from snpatch.utils.optional import require


@dataclass(frozen=True)
class Reliability:
    """Agreement of the rankings of two halves of a contrast's prompts, at one k.

    Attributes:
        overlap: Fraction of the first k neurons that both share.
        spearman: Rank correlation of the shared neurons, None for fewer than two.
        correlation: Pearson correlation of the halves' scores over all ranked neurons, None if a half has no spread.
        full_correlation: The same of two contrasts of as many prompts as the whole: Spearman-Brown, 2 c / (1 + c).
    """

    overlap: float
    spearman: float | None
    correlation: float | None
    full_correlation: float | None


def split_halves(ranking: Ranking) -> tuple[Ranking, Ranking] | None:
    """Return the rankings of two halves of the prompts, of the neurons that are ranked.

    Args:
        ranking: The ranking.

    Returns:
        The rankings, or None if the ranking does not contain the sums of a half or the method of its scores.
    """
    statistics, half, method = ranking.statistics, ranking.half, METHODS.get(ranking.meta.get("method", ""))
    if statistics is None or half is None or method is None:
        return None
    is_ranked = ranking.rank.flatten() != UNRANKED
    halves = []
    for part in (statistics.without(half), half):
        full = Ranking.from_scores(method(part))
        order = full.top(len(full))
        kept = is_ranked[order[:, 0] * ranking.shape[1] + order[:, 1]]
        halves.append(Ranking.from_order(order[kept], ranking.shape, scores=full.scores))
    return halves[0], halves[1]


def compute_reliability(halves: tuple[Ranking, Ranking], k: int) -> Reliability:
    """Return the agreement of two halves at k.

    Spearman-Brown is exact for sums of prompts whose errors are independent and of equal variance in both halves. The
    scores are roots of such sums, for which it holds as far as an error is small against its score.

    Args:
        halves: Rankings of `split_halves`.
        k: Number of neurons, 1 to their length.

    Raises:
        SnpatchError: k is out of range.
    """
    first, second = halves
    overlap = first.overlap(second, k)
    spearman = first.spearman(second, k) if round(overlap * k) > 1 else None
    is_ranked = (first.rank != UNRANKED).numpy()
    scores = [require(half.scores).double().numpy()[is_ranked] for half in halves]
    if any(np.ptp(values) == 0 for values in scores):
        return Reliability(overlap, spearman, None, None)
    correlation = float(np.corrcoef(scores)[0, 1])
    return Reliability(
        overlap, spearman, correlation, 2 * correlation / (1 + correlation) if correlation > -1 else None
    )
