"""Distribution of change scores: by layer, skewness, fraction above thresholds, layer x neuron map.

A score is RMS(r) times the relative change, so the skewness of both factors is reported with its own: few large scores
can be few large activations. For the same reason the share of the change that is a factor of the neuron is reported.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.op.plan import UNRANKED
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_percent, format_value
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import skewness
from snpatch.utils.optional import require

MAX_MAP_COLUMNS = 512  # neurons of a layer are pooled to at most this many columns, by their largest score


@dataclass(frozen=True)
class DistributionSettings:
    """Settings of the distribution.

    Args:
        thresholds: Change scores above which neurons are counted.
        k: First neurons of the ranking to count by layer: an int, or a fraction of the ranked neurons.
    """

    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    k: int | float = 20_000


def run(context: ExperimentContext, settings: DistributionSettings) -> Report:
    """Describe the scores of the ranked neurons together, and of each layer, excluded ones too."""
    ranking = context.ranking()
    k = context.num_neurons(settings.k, ranking)
    scores = require(ranking.scores).numpy().astype(float)
    top_counts = ranking.layer_counts(k).tolist()
    excluded = ranking.meta["excluded_layers"]
    is_ranked = (ranking.rank != UNRANKED).numpy()

    def describe(neurons: np.ndarray) -> Row:
        return describe_scores(scores[neurons], settings.thresholds) | describe_factors(ranking, neurons)

    rows = []
    for layer in range(len(scores)):
        in_layer = np.zeros_like(is_ranked)
        in_layer[layer] = True
        row = {"layer": layer, "ranked": layer not in excluded, **describe(in_layer)}
        rows.append({**row, "in_top_k": top_counts[layer]})
    total = {"layer": "all", "ranked": True, **describe(is_ranked), "in_top_k": k}
    largest = settings.thresholds[-1]
    sentences = [
        f"change scores of {len(ranking)} ranked neurons: mean {format_value(total['mean'])}, "
        f"median {format_value(total['median'])}, skewness {_format_or_undefined(total['skewness'])}; "
        f"{total[f'above {largest:g}']:.2%} are above {largest:g}.",
        f"layers {', '.join(map(str, excluded)) or 'none'} excluded from the ranking; the top {k} are in "
        f"{sum(map(bool, top_counts))} layers, most in layer {int(np.argmax(top_counts))} ({max(top_counts)}).",
    ]
    if total["own_factor_share"] is not None:
        sentences.append(
            f"skewness of RMS(r) {_format_or_undefined(total['rms_skewness'])}, of the relative change "
            f"{_format_or_undefined(total['relative_skewness'])}; {format_percent(total['own_factor_share'])} of the "
            "squared change is a constant factor of each neuron."
        )
    rows.append(total)
    plots = {"distribution": _plot(scores, is_ranked, top_counts, settings.thresholds, k)}
    columns = (
        "layer",
        "mean",
        "median",
        "skewness",
        "rms_skewness",
        "relative_skewness",
        "own_factor_share",
        "in_top_k",
    )
    display = TableView.from_rows(rows, {name: name for name in columns})
    return Report("distribution", {"distribution": rows}, plots, (display,), sentences)


def describe_scores(scores: np.ndarray, thresholds: tuple[float, ...]) -> Row:
    """Compute the moments, quantiles and fractions above thresholds of scores [n].

    The moments are mean, deviation and skewness (None if all scores are equal).
    """
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "median": float(np.median(scores)),
        "p99": float(np.quantile(scores, 0.99)),
        "max": float(scores.max()),
        "skewness": skewness(scores),
        **{f"above {threshold:g}": float((scores > threshold).mean()) for threshold in thresholds},
    }


def describe_factors(ranking: Ranking, neurons: np.ndarray) -> Row:
    """Describe RMS(r), the relative change and the own factors of some neurons.

    Args:
        ranking: The ranking.
        neurons: [L, F] bool.

    Returns:
        Skewness of RMS(r) and of the relative change, and the share of the squared change that is each neuron's own
        factor (Statistics.own_factor_changes), summed over the neurons. None where the ranking has no statistics of
        two models.
    """
    names = ("rms_skewness", "relative_skewness", "own_factor_share")
    statistics = ranking.statistics
    if statistics is None or not statistics.is_pair:
        return dict.fromkeys(names)
    rms = statistics.recipient_rms().numpy()[neurons]
    scores = require(ranking.scores).double().numpy()[neurons]
    squared_changes = statistics.sums[:, 4].numpy()[neurons].sum()
    own_changes = statistics.own_factor_changes().numpy()[neurons].sum()
    share = float(own_changes / squared_changes) if squared_changes > 0 else None
    return dict(zip(names, (skewness(rms), skewness(scores[rms > 0] / rms[rms > 0]), share), strict=True))


def _format_or_undefined(value: float | None) -> str:
    return "undefined" if value is None else format_value(value)


def _plot(
    scores: np.ndarray, is_ranked: np.ndarray, top_counts: list[int], thresholds: tuple[float, ...], k: int
) -> Figure:
    n_layers, n_neurons = scores.shape
    figure = Figure(figsize=(13, 8), layout="constrained")
    (histogram, by_layer), (bars, neurons) = figure.subplots(2, 2)
    histogram.hist(scores[is_ranked], bins=100, log=True)
    for threshold in thresholds:
        if threshold <= scores.max():
            histogram.axvline(threshold, color="tab:red", linewidth=0.8, linestyle=":")
    histogram.set(xlabel="change score", ylabel="neurons", title="ranked neurons")
    by_layer.boxplot(list(scores), positions=range(n_layers), showfliers=False)
    by_layer.set(xlabel="layer", ylabel="change score", title="by layer (outliers not drawn)")
    bars.bar(range(n_layers), top_counts)
    bars.set(xlabel="layer", ylabel="neurons", title=f"layers of the top {k}")
    width = -(-n_neurons // MAX_MAP_COLUMNS)
    padded = np.pad(scores, ((0, 0), (0, -n_neurons % width)))
    pooled = padded.reshape(n_layers, -1, width).max(-1)
    image = neurons.imshow(pooled, aspect="auto", origin="lower", extent=(0, n_neurons, -0.5, n_layers - 0.5))
    figure.colorbar(image, ax=neurons, label="change score")
    neurons.set(xlabel="neuron", ylabel="layer", title="every neuron" if width == 1 else f"largest of {width} neurons")
    return figure
