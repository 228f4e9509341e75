"""Agreement of rankings: overlap and Spearman correlation of each pair by k, with its settings, plot and report.

Training seeds, objectives and kinds of positions are compared by this one report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.heatmap import draw_heatmap
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_range, format_value, to_plot_label
from snpatch.report.report import Report, Row, TableView

RANK_BINS = 40
K_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
COLUMNS = {name: name for name in ("a", "b", "k", "overlap", "chance", "spearman")}


@dataclass(frozen=True)
class AgreementSettings:
    """Settings of a comparison of rankings.

    Args:
        k: Number of first neurons that the headline compares: an int, or a fraction of the ranked neurons.
        more_k: Further points of the curve.
    """

    k: int | float = 20_000
    more_k: tuple[int | float, ...] = K_FRACTIONS


def build_agreement_report(
    context: ExperimentContext, name: str, rankings: Mapping[str, Ranking], settings: AgreementSettings, compared: str
) -> Report:
    """Build the report of a comparison of rankings. compared: what they are rankings of, in the plural."""
    if len(rankings) < 2:
        names = ", ".join(rankings) or "none"
        raise SnpatchError(f"needs at least two {compared} in the experiment config, got {names}")
    first_ranking = next(iter(rankings.values()))
    k = context.num_neurons(settings.k, first_ranking)
    ks = sorted({k, *(context.num_neurons(value, first_ranking) for value in settings.more_k)})
    rows = compare_rankings(rankings, ks)
    rows_at_k = [row for row in rows if row["k"] == k]
    overlaps = [row["overlap"] for row in rows_at_k]
    spearmans = [row["spearman"] for row in rows_at_k if row["spearman"] is not None]
    chance = format_value(rows_at_k[0]["chance"])
    sentence = f"{len(rankings)} {compared}: overlap {format_range(overlaps)} at k = {k} ({chance} for random orders)"
    if spearmans:
        sentence += f", Spearman {format_range(spearmans)}"
    plots = {name: plot_agreement(rows, rankings, k)}
    return Report(name, {name: rows}, plots, (TableView.from_rows(rows, COLUMNS),), [f"{sentence}."])


def compare_rankings(rankings: Mapping[str, Ranking], ks: Sequence[int]) -> list[Row]:
    """Compare each pair of rankings at each k.

    Returns:
        One row per pair and k: overlap |A and B| / k, common (their number), chance (the overlap of random orders), and
        spearman over the common neurons re-ranked among themselves (None for fewer than 2).
    """
    rows = []
    for (a, ranking_a), (b, ranking_b) in combinations(rankings.items(), 2):
        for k in ks:
            overlap = ranking_a.overlap(ranking_b, k)
            common = round(overlap * k)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "k": k,
                    "overlap": overlap,
                    "common": common,
                    "chance": k / len(ranking_a),
                    "spearman": ranking_a.spearman(ranking_b, k) if common > 1 else None,
                }
            )
    return rows


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
