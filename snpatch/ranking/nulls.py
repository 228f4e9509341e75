"""Null distribution of the agreement of two rankings: unrelated changes of the same activations.

A change score is S = RMS(r) u with the relative change u. Two rankings of one base model share the sizes of its
activations, so their top neurons agree even if their changes have nothing in common. Random orders ignore this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from snpatch.errors import SnpatchError
from snpatch.op.plan import UNRANKED
from snpatch.ranking.ranking import Ranking
from snpatch.utils.optional import require

DRAWS = 50
SEED = 0


@dataclass(frozen=True)
class AgreementNull:
    """Agreement of two rankings under the null, by draw and k.

    Attributes:
        overlap: [draws, ks], fraction of the first k neurons that both share.
        spearman: [draws, ks], rank correlation of the shared neurons; NaN for fewer than two.
    """

    overlap: NDArray[np.float64]
    spearman: NDArray[np.float64]


def relative_changes(ranking: Ranking) -> NDArray[np.float64] | None:
    """Return the scores divided by the root mean square of the recipient's activation.

    Args:
        ranking: The ranking.

    Returns:
        [L, F], NaN for a neuron that is not ranked or never active; None for a ranking without statistics or scores.
    """
    if ranking.statistics is None or ranking.scores is None:
        return None
    return _per_activation(ranking, ranking.scores.double().numpy())


def signed_changes(ranking: Ranking) -> NDArray[np.float64] | None:
    """Return (mean d - mean r) / RMS(r): the relative change with its direction.

    Args:
        ranking: The ranking.

    Returns:
        [L, F], NaN for a neuron that is not ranked or never active; None for a ranking without statistics of a pair.
    """
    if ranking.statistics is None or not ranking.statistics.is_pair:
        return None
    return _per_activation(ranking, ranking.statistics.mean_changes().numpy())


def draw_agreement_nulls(
    rankings: Mapping[str, Ranking], ks: Sequence[int], draws: int = DRAWS, seed: int = SEED
) -> dict[tuple[str, str], AgreementNull]:
    """Draw the agreement of each pair of rankings under the null.

    In each draw and ranking, the relative changes of the ranked neurons are permuted within each layer, and multiplied
    by the neurons' own RMS(r). A draw at a time is held, so memory is a few numbers per neuron and ranking.

    Args:
        rankings: Rankings by name. Those without statistics are left out.
        ks: Numbers of neurons, 1 to the number of ranked neurons.
        draws: Number of permutations.
        seed: Seed of the permutations.

    Returns:
        The null of each pair of names, in the order of `rankings`.

    Raises:
        SnpatchError: A k is out of range, or the rankings are of models of different shapes.
    """
    for name, ranking in rankings.items():
        if not 1 <= min(ks) <= max(ks) <= len(ranking):
            raise SnpatchError(f"k: expected 1..{len(ranking)} (neurons of ranking {name}), got {min(ks)}..{max(ks)}")
        if ranking.shape != (shape := next(iter(rankings.values())).shape):
            raise SnpatchError(f"ranking {name}: expected {list(shape)}, as the first, got {list(ranking.shape)}")
    generator = np.random.default_rng(seed)
    shuffled = {name: _ShuffledRanking(one) for name, one in rankings.items() if relative_changes(one) is not None}
    pairs = list(combinations(shuffled, 2))
    figures = {pair: np.empty((2, draws, len(ks))) for pair in pairs}
    for draw in range(draws if pairs else 0):
        orders = {name: ranking.draw(generator, max(ks)) for name, ranking in shuffled.items()}
        for a, b in pairs:
            figures[a, b][:, draw] = _compare_orders(orders[a], orders[b], ks, shuffled[b].size)
    return {pair: AgreementNull(*values) for pair, values in figures.items()}


class _ShuffledRanking:
    """A ranking whose relative changes are permuted within each layer."""

    def __init__(self, ranking: Ranking) -> None:
        relative = require(relative_changes(ranking))
        self.size = relative.size
        self._rms = require(ranking.statistics).recipient_rms().numpy().ravel()
        self._relative = relative.ravel()
        # Neurons that are never active keep their scores; those that are not ranked come last.
        is_ranked = (ranking.rank != UNRANKED).numpy()
        self._scores = np.where(is_ranked, require(ranking.scores).double().numpy(), -np.inf).ravel()
        is_active = ~np.isnan(relative)
        self._layers = [np.flatnonzero(row) + i * relative.shape[1] for i, row in enumerate(is_active)]

    def draw(self, generator: np.random.Generator, k: int) -> NDArray[np.int64]:
        """Return the first k flat neuron indices of a permutation, in their order."""
        scores = self._scores.copy()
        for neurons in self._layers:
            scores[neurons] = self._rms[neurons] * generator.permutation(self._relative[neurons])
        first = np.argpartition(-scores, k - 1)[:k]
        return first[np.argsort(-scores[first], kind="stable")]


def _per_activation(ranking: Ranking, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values [L, F] divided by RMS(r); NaN for a neuron that is not ranked or never active."""
    rms = require(ranking.statistics).recipient_rms().numpy()
    is_defined = (ranking.rank != UNRANKED).numpy() & (rms > 0)
    return np.divide(values, rms, out=np.full_like(rms, np.nan), where=is_defined)


def _compare_orders(
    order_a: NDArray[np.int64], order_b: NDArray[np.int64], ks: Sequence[int], size: int
) -> tuple[list[float], list[float]]:
    """Return overlap and Spearman of the first k neurons of two orders, for each k."""
    rank_b = np.full(size, len(order_b))
    rank_b[order_b] = np.arange(len(order_b))
    ranks = rank_b[order_a]  # of order_a's neurons in order_b
    shared = [ranks[:k][ranks[:k] < k] for k in ks]
    return [len(one) / k for one, k in zip(shared, ks, strict=True)], [_rank_correlation(one) for one in shared]


def _rank_correlation(values: NDArray[np.int64]) -> float:
    """Return the Spearman correlation of distinct values with their places; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return np.nan
    distances = np.argsort(np.argsort(values)) - np.arange(n)
    return 1 - 6 * float(np.square(distances, dtype=float).sum()) / (n * (n * n - 1))
