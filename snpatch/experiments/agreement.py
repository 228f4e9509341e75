"""How much rankings agree: overlap and Spearman over pairs, by k. What stability, preference and positions share."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.ranking.ranking import Ranking
from snpatch.report.report import Row

BINS = 40


def compare(rankings: Mapping[str, Ranking], ks: Sequence[int]) -> list[Row]:
    """A row a pair and k: overlap |A and B| / k, Spearman over the common neurons re-ranked within them.

    chance: what the overlap of two random orders would be. spearman is None where fewer than 2 are in common.
    """
    rows = []
    for (a, one), (b, other) in combinations(rankings.items(), 2):
        for k in ks:
            overlap = one.overlap(other, k)
            common = round(overlap * k)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "k": k,
                    "overlap": overlap,
                    "common": common,
                    "chance": k / len(one),
                    "spearman": one.spearman(other, k) if common > 1 else None,
                }
            )
    return rows


def plot(rows: Sequence[Row], rankings: Mapping[str, Ranking], k: int) -> Figure:
    """Overlap by k, both figures of each pair at k, and where the top k of one stand in the other."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    by_k, pairs, ranks = figure.subplots(1, 3)
    for a, b in combinations(rankings, 2):
        line = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        by_k.plot([row["k"] for row in line], [row["overlap"] for row in line], "o-", markersize=3, label=f"{a}, {b}")
    by_k.plot([row["k"] for row in line], [row["chance"] for row in line], ":", color="tab:gray", label="random orders")
    by_k.set(xlabel="k", ylabel="overlap of the top k", ylim=(0, 1.02))
    by_k.legend(fontsize=8)
    _matrix(pairs, [row for row in rows if row["k"] == k], list(rankings), k)
    _rank_map(ranks, rankings, k)
    return figure


def _matrix(axis: Axes, rows: Sequence[Row], names: list[str], k: int) -> None:
    values = np.eye(len(names))
    for row in rows:
        i, j = names.index(row["a"]), names.index(row["b"])
        values[i, j], values[j, i] = row["overlap"], np.nan if row["spearman"] is None else row["spearman"]
    axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    for (i, j), value in np.ndenumerate(values):
        text, light = ("", False) if i == j else ("-" if np.isnan(value) else f"{value:.2f}", abs(value) > 0.6)
        axis.text(j, i, text, ha="center", va="center", color="white" if light else "black", fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_title(f"k = {k}: overlap above, Spearman below the diagonal", fontsize=10)


def _rank_map(axis: Axes, rankings: Mapping[str, Ranking], k: int) -> None:
    """Neurons in both of a pair's first k, by their rank in one and in the other, all pairs together."""
    x, y = [], []
    for one, other in combinations(rankings.values(), 2):
        place = tuple(one.top(k).t())
        there = other.rank[place]
        x.append(one.rank[place][there < k])
        y.append(there[there < k])
    counts, *_ = np.histogram2d(np.concatenate(x), np.concatenate(y), bins=BINS, range=[[0, k], [0, k]])
    image = axis.imshow(counts.T, origin="lower", extent=(0, k, 0, k), cmap="viridis", aspect="auto")
    axis.figure.colorbar(image, ax=axis, label="neurons")
    axis.set(xlabel="rank in one", ylabel="rank in the other")
    axis.set_title("neurons in both top k, all pairs", fontsize=10)
