"""Plot of the agreement of rankings: overlap by k with its null, a matrix at one k, and ranks of common neurons."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.experiments.common.heatmap import draw_heatmap
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import to_plot_label
from snpatch.report.report import Row

RANK_BINS = 40


def plot_agreement(rows: Sequence[Row], rankings: Mapping[str, Ranking], k: int) -> Figure:
    """Plot the overlap by k, a matrix of overlap and Spearman at k, and ranks of common neurons at k."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    curve_axis, matrix_axis, rank_axis = figure.subplots(1, 3)
    pair_rows: list[Row] = []
    for a, b in combinations(rankings, 2):
        pair_rows = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        ks, overlaps = [row["k"] for row in pair_rows], [row["overlap"] for row in pair_rows]
        curve_axis.plot(ks, overlaps, "o-", markersize=3, label=to_plot_label(f"{a}, {b}"))
    ks, chances = [row["k"] for row in pair_rows], [row["chance"] for row in pair_rows]
    curve_axis.plot(ks, chances, ":", color="tab:gray", label="random orders")
    if tested := [row for row in rows if row["chance_given_activations"] is not None]:
        lows = [min(row["chance_given_activations_low"] for row in tested if row["k"] == one) for one in ks]
        highs = [max(row["chance_given_activations_high"] for row in tested if row["k"] == one) for one in ks]
        label = "unrelated changes, same activations (95%)"
        curve_axis.fill_between(ks, lows, highs, color="tab:gray", alpha=0.3, linewidth=0, label=label)
    curve_axis.set(xlabel="k", ylabel="overlap of the top k", ylim=(0, 1.02))
    curve_axis.legend(fontsize=8)
    _draw_matrix(matrix_axis, [row for row in rows if row["k"] == k], list(rankings), k)
    _draw_ranks(rank_axis, rankings, k)
    return figure


def _draw_matrix(axis: Axes, rows: Sequence[Row], names: list[str], k: int) -> None:
    """Draw the overlap above the diagonal and Spearman below it."""
    values = np.eye(len(names))
    for row in rows:
        i, j = names.index(row["a"]), names.index(row["b"])
        values[i, j], values[j, i] = row["overlap"], np.nan if row["spearman"] is None else row["spearman"]

    def format_cell(i: int, j: int, value: float) -> str:
        return "" if i == j else "-" if np.isnan(value) else f"{value:.2f}"

    draw_heatmap(
        axis,
        values,
        names,
        names,
        color_limits=(-1, 1),
        colormap="RdBu_r",
        format_cell=format_cell,
        is_dark=lambda value: abs(value) > 0.6,
    )
    axis.set_aspect("equal")
    axis.set_title(f"k = {k}: overlap above, Spearman below the diagonal", fontsize=10)


def _draw_ranks(axis: Axes, rankings: Mapping[str, Ranking], k: int) -> None:
    """Draw neurons in the top k of both rankings of a pair by their two ranks, all pairs together."""
    x, y = [], []
    for ranking_a, ranking_b in combinations(rankings.values(), 2):
        neurons = tuple(ranking_a.top(k).t())
        ranks_b = ranking_b.rank[neurons]
        x.append(ranking_a.rank[neurons][ranks_b < k])
        y.append(ranks_b[ranks_b < k])
    counts, *_ = np.histogram2d(np.concatenate(x), np.concatenate(y), bins=RANK_BINS, range=[[0, k], [0, k]])
    image = axis.imshow(counts.T, origin="lower", extent=(0, k, 0, k), cmap="viridis", aspect="auto")
    axis.figure.colorbar(image, ax=axis, label="neurons")
    axis.set(xlabel="rank in one ranking", ylabel="rank in the other")
    axis.set_title("neurons in both top k, all pairs", fontsize=10)
