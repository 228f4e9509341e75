"""Guards across prompt sets: accuracy of predicting a harmful completion from the prompt's last token.

Compares k, random neurons and the majority class, tests every training set on every other, and plots calibration.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.guard_labels import GuardSettings, label_set
from snpatch.experiments.common.heatmap import draw_heatmap
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.comparison import ComparisonConfig, GuardRow, compare_guards
from snpatch.report.formatting import format_value, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.sweeps.config import SweepConfig


@dataclass(frozen=True)
class GuardComparisonSettings(GuardSettings):
    """Settings of the comparison of guards.

    Args:
        prompts: Prompt sets to fit and test guards on; empty for the benchmarks.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        controls: Random controls of each kind.
    """

    prompts: tuple[str, ...] = ()
    k: tuple[int | float, ...] = (10, 50, 100, 200, 500, 1000, 1500)
    controls: int = SweepConfig.controls


def run(context: ExperimentContext, settings: GuardComparisonSettings) -> Report:
    """Label the recipient's own completions, fit a guard on each set, and test it on all sets."""
    ranking, model = context.ranking(), context.model(context.config.safety.recipient)
    names = settings.prompts or context.config.benchmarks
    sets = {name: label_set(context, name, settings.harm_threshold) for name in names}
    config = ComparisonConfig(
        ks=[context.num_neurons(value, ranking) for value in settings.k],
        guard=settings.config,
        controls=settings.controls,
        resamples=settings.resamples,
        confidence=settings.confidence,
    )
    with context.progress("guards") as progress:
        comparison = compare_guards(context.engine, model, sets, {"safety": ranking}, config, progress)
    summary = _summarize(comparison.rows)
    # The largest k instead of the best one, which would be chosen on the reported sets.
    k = max(row["k"] for row in summary if row["features"] == "safety")
    safety, *controls = (row for row in summary if row["k"] == k)
    control_accuracies = "".join(f"{row['features']} {format_value(row['accuracy'])}, " for row in controls)
    tested_on = "sets that a guard was not fitted on" if len(sets) > 1 else "its own set, by cross-validation"
    sentence = (
        f"k = {k}: mean accuracy {format_value(safety['accuracy'])} on {tested_on}; "
        f"{control_accuracies}majority {format_value(safety['majority'])}."
    )
    columns = ("features", "k", "accuracy", "auc", "calibration_error", "majority")
    display = TableView.from_rows(summary, {name: name for name in columns}, title=f"guards of {model}, {tested_on}")
    tables = {
        "guard": [row.flat() for row in comparison.rows],
        "guard-summary": summary,
        "guard-calibration": _calibration_rows(comparison.rows),
    }
    return Report(
        "guard",
        tables,
        {"guard": _plot(comparison.rows, summary, k)},
        (display,),
        [sentence],
        notes=comparison.notes,
        records=[
            {
                "set": name,
                "prompt_index": i,
                "completion": completion,
                "score": float(labeled.scores[i]),
                "harmful": bool(labeled.labels[i]),
            }
            for name, labeled in sets.items()
            for i, completion in enumerate(labeled.completions)
        ],
    )


def _calibration_rows(rows: Sequence[GuardRow]) -> list[Row]:
    names = ("features", "control", "seed", "k", "train", "test")
    return [{name: getattr(row, name) for name in names} | asdict(point) for row in rows for point in row.scores.curve]


def _summarize(rows: Sequence[GuardRow]) -> list[Row]:
    """Average by features and k over the pairs of different training and test sets.

    If there is one set only, average over itself.
    """
    groups: dict[tuple[str, int], list[GuardRow]] = {}
    has_other_sets = any(row.train != row.test for row in rows)
    for row in rows:
        if not has_other_sets or row.train != row.test:
            name = row.features if row.control is None else f"random {row.control}"
            groups.setdefault((name, row.k), []).append(row)
    summary = []
    for (name, k), group in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0] != "safety")):
        means = {}
        for score in ("accuracy", "balanced_accuracy", "auc", "brier", "calibration_error", "majority"):
            values = [value for row in group if (value := getattr(row.scores, score)) is not None]
            means[score] = float(np.mean(values)) if values else None
        summary.append({"features": name, "k": k, **means, "pairs": len(group)})
    if not summary:
        raise SnpatchError("guard: k: expected at most the ranking's number of neurons, got only larger ones")
    return summary


def _plot(rows: Sequence[GuardRow], summary: Sequence[Row], k: int) -> Figure:
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    curve_axis, matrix_axis, calibration_axis = figure.subplots(1, 3)
    for name in dict.fromkeys(row["features"] for row in summary):
        line = [row for row in summary if row["features"] == name]
        curve_axis.plot([row["k"] for row in line], [row["accuracy"] for row in line], "o-", label=to_plot_label(name))
    curve_axis.axhline(summary[0]["majority"], color="tab:gray", linestyle=":", label="majority class")
    curve_axis.set(xlabel="neurons (k)", ylabel="mean accuracy on other sets")
    curve_axis.legend(fontsize=8)
    rows_at_k = [row for row in rows if row.control is None and row.k == k]
    _draw_matrix(matrix_axis, rows_at_k, k)
    _draw_calibration(calibration_axis, rows_at_k, k)
    return figure


def _draw_calibration(axis: Axes, rows: Sequence[GuardRow], k: int) -> None:
    """Draw each bin of probabilities, all training and test sets together.

    A marker's area is the number of prompts.
    """
    bins: dict[float, list] = {}
    for row in rows:
        for point in row.scores.curve:
            bins.setdefault(point.low, []).append(point)
    axis.plot([0, 1], [0, 1], ":", color="tab:gray")
    for points in bins.values():
        n = np.array([point.n for point in points])
        x, y = (n @ [getattr(p, name) for p in points] / n.sum() for name in ("mean_probability", "harmful_share"))
        axis.scatter(x, y, s=10 + 2000 * n.sum() / sum(row.scores.n for row in rows), color="tab:blue", alpha=0.6)
    axis.set(xlabel="mean probability of harm", ylabel="fraction harmful", xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    axis.set_title(f"calibration, all sets, k = {k} (size: prompts)", fontsize=10)


def _draw_matrix(axis: Axes, rows: Sequence[GuardRow], k: int) -> None:
    train, test = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("train", "test"))
    values = np.full((len(train), len(test)), np.nan)
    for row in rows:
        values[train.index(row.train), test.index(row.test)] = row.scores.accuracy
    draw_heatmap(
        axis,
        values,
        train,
        test,
        color_limits=(0.5, 1),
        colormap="viridis",
        format_cell=lambda i, j, value: "" if np.isnan(value) else f"{value:.2f}",
        is_dark=lambda value: value < 0.75,
        rotation=20,
    )
    axis.set(xlabel="tested on", ylabel="fitted on")
    axis.set_title(f"accuracy, k = {k} (own set: by cross-validation)", fontsize=10)
