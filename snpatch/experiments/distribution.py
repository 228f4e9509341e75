"""Distribution of change scores: by layer, skewness, fraction above thresholds, layer x neuron map."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.report.formatting import format_value
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
    """Describe the scores of the safety ranking, including excluded layers."""
    ranking = context.ranking()
    k = context.num_neurons(settings.k, ranking)
    scores = require(ranking.scores).numpy().astype(float)
    top_counts = ranking.layer_counts(k).tolist()
    excluded = ranking.meta["excluded_layers"]
    rows = []
    for layer, layer_scores in enumerate(scores):
        row = {"layer": layer, "ranked": layer not in excluded, **describe_scores(layer_scores, settings.thresholds)}
        rows.append({**row, "in_top_k": top_counts[layer]})
    total = {"layer": "all", "ranked": True, **describe_scores(scores.ravel(), settings.thresholds), "in_top_k": k}
    largest = settings.thresholds[-1]
    sentences = [
        f"change scores of {scores.size} neurons: mean {format_value(total['mean'])}, "
        f"median {format_value(total['median'])}, skewness {_format_or_undefined(total['skewness'])}; "
        f"{total[f'above {largest:g}']:.2%} are above {largest:g}.",
        f"layers {', '.join(map(str, excluded)) or 'none'} excluded from the ranking; the top {k} are in "
        f"{sum(map(bool, top_counts))} layers, most in layer {int(np.argmax(top_counts))} ({max(top_counts)}).",
    ]
    rows.append(total)
    plots = {"distribution": _plot(scores, top_counts, settings.thresholds, k)}
    columns = ("layer", "mean", "median", "max", "skewness", "in_top_k")
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


def _format_or_undefined(value: float | None) -> str:
    return "undefined" if value is None else format_value(value)


def _plot(scores: np.ndarray, top_counts: list[int], thresholds: tuple[float, ...], k: int) -> Figure:
    n_layers, n_neurons = scores.shape
    figure = Figure(figsize=(13, 8), layout="constrained")
    (histogram, by_layer), (bars, neurons) = figure.subplots(2, 2)
    histogram.hist(scores.ravel(), bins=100, log=True)
    for threshold in thresholds:
        if threshold <= scores.max():
            histogram.axvline(threshold, color="tab:red", linewidth=0.8, linestyle=":")
    histogram.set(xlabel="change score", ylabel="neurons", title="all neurons")
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
