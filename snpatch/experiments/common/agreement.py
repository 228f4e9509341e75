"""Agreement of rankings in experiments: overlap and Spearman over pairs, by k; its settings, plot and report.

Why one report for three experiments: training seeds, objectives and kinds of positions are compared alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_range, format_value, to_plot_label
from snpatch.report.report import Report, Row, TableView

BINS = 40
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
COLUMNS = {name: name for name in ("a", "b", "k", "overlap", "chance", "common", "spearman")}


@dataclass(frozen=True)
class AgreementSettings:
    """k: what the sentence is about; more_k: further points of the curve. Ints, or shares of the ranked neurons."""

    k: int | float = 20_000
    more_k: tuple[int | float, ...] = SHARES


def build_agreement_report(
    context: ExperimentContext, name: str, rankings: Mapping[str, Ranking], settings: AgreementSettings, what: str
) -> Report:
    """The report of any comparison of rankings."""
    if len(rankings) < 2:
        raise SnpatchError(f"needs at least two {what} in the config, there are {', '.join(rankings) or 'none'}")
    any_one = next(iter(rankings.values()))
    k = context.num_neurons(settings.k, any_one)
    ks = sorted({k, *(context.num_neurons(value, any_one) for value in settings.more_k)})
    rows = compare_rankings(rankings, ks)
    main = [row for row in rows if row["k"] == k]
    spearmans = [row["spearman"] for row in main if row["spearman"] is not None]
    overlaps = [row["overlap"] for row in main]
    chance = format_value(main[0]["chance"])
    sentence = f"{len(rankings)} {what}: overlap {format_range(overlaps)} at k = {k} ({chance} for random orders)"
    if spearmans:
        sentence += f", Spearman {format_range(spearmans)}"
    plots = {name: plot_agreement(rows, rankings, k)}
    return Report(name, {name: rows}, plots, (TableView.from_rows(rows, COLUMNS),), [f"{sentence}."])


def compare_rankings(rankings: Mapping[str, Ranking], ks: Sequence[int]) -> list[Row]:
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


def plot_agreement(rows: Sequence[Row], rankings: Mapping[str, Ranking], k: int) -> Figure:
    """Overlap by k, both figures of each pair at k, and where the top k of one stand in the other."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    by_k, pairs, ranks = figure.subplots(1, 3)
    for a, b in combinations(rankings, 2):
        line = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        by_k.plot(
            [row["k"] for row in line],
            [row["overlap"] for row in line],
            "o-",
            markersize=3,
            label=to_plot_label(f"{a}, {b}"),
        )
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
    shown = list(map(to_plot_label, names))
    axis.set_xticks(range(len(names)), shown, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), shown)
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
