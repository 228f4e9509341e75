"""The guard over sets of prompts: does the prompt's last token tell whether the answer will be harmful?

Accuracy per k beside random neurons and the majority class; every training set tried on every other; calibration.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.guard_labels import GuardSettings, label_set
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.comparison import GuardRow, compare
from snpatch.report.formatting import format_value, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.sweeps.config import SweepConfig


@dataclass(frozen=True)
class Settings(GuardSettings):
    """prompts: sets to fit and try guards on (default: the benchmarks). k: numbers of neurons, ints or shares."""

    prompts: tuple[str, ...] = ()
    k: tuple[int | float, ...] = (10, 50, 100, 200, 500, 1000, 1500)
    controls: int = SweepConfig.controls


def run(context: ExperimentContext, settings: Settings) -> Report:
    """Label the generator's own answers, fit a guard on each set, try each on all."""
    ranking, model = context.ranking(), context.model(context.config.safety.recipient)
    names = settings.prompts or context.config.benchmarks
    sets = {name: label_set(context, name, settings.harm_threshold) for name in names}
    ks = [context.num_neurons(value, ranking) for value in settings.k]
    with context.progress("guards") as progress:
        found = compare(
            context.engine,
            model,
            sets,
            {"safety": ranking},
            ks,
            settings.config,
            controls=settings.controls,
            resamples=settings.resamples,
            confidence=settings.confidence,
            progress=progress,
        )
    rows = [row.flat() for row in found.rows]
    curve = [
        {"features": r.features, "control": r.control, "seed": r.seed, "k": r.k, "train": r.train, "test": r.test}
        | asdict(point)
        for r in found.rows
        for point in r.scores.curve
    ]
    summary = _summary(found.rows)
    # The largest k, and not the best: that would be chosen on the sets that are reported.
    k = max(row["k"] for row in summary if row["features"] == "safety")
    mine, *others = (row for row in summary if row["k"] == k)
    beside = "".join(f"{row['features']} {format_value(row['accuracy'])}, " for row in others)
    where = "sets that a guard was not fitted on" if len(sets) > 1 else "its own set, by cross-validation"
    sentence = (
        f"k = {k}: mean accuracy {format_value(mine['accuracy'])} on {where}; "
        f"{beside}majority {format_value(mine['majority'])}."
    )
    return Report(
        "guard",
        {"guard": rows, "guard-summary": summary, "guard-calibration": curve},
        {"guard": _plot(found.rows, summary, k)},
        (TableView.from_rows(summary, {name: name for name in summary[0]}, title=f"guards of {model}, {where}"),),
        [sentence, *found.notes],
        records=[
            {
                "set": name,
                "prompt_index": i,
                "completion": text,
                "score": float(s.scores[i]),
                "harmful": bool(s.labels[i]),
            }
            for name, s in sets.items()
            for i, text in enumerate(s.completions)
        ],
    )


def _summary(rows: Sequence[GuardRow]) -> list[Row]:
    """By features and k: means over the pairs of different training and test sets (of one set alone: over its own)."""
    groups: dict[tuple[str, int], list[GuardRow]] = {}
    are_apart = any(row.train != row.test for row in rows)
    for row in rows:
        if not are_apart or row.train != row.test:
            name = row.features if row.control is None else f"random {row.control}"
            groups.setdefault((name, row.k), []).append(row)
    summary = []
    for (name, k), mine in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0] != "safety")):
        figures = {}
        for figure in ("accuracy", "balanced_accuracy", "auc", "brier", "calibration_error", "majority"):
            values = [v for row in mine if (v := getattr(row.scores, figure)) is not None]
            figures[figure] = float(np.mean(values)) if values else None
        summary.append({"features": name, "k": k, **figures, "pairs": len(mine)})
    if not summary:
        raise SnpatchError("guard: no k leaves enough neurons for a guard")
    return summary


def _plot(rows: Sequence[GuardRow], summary: Sequence[Row], k: int) -> Figure:
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    by_k, matrix, calibration = figure.subplots(1, 3)
    for name in dict.fromkeys(row["features"] for row in summary):
        line = [row for row in summary if row["features"] == name]
        by_k.plot([row["k"] for row in line], [row["accuracy"] for row in line], "o-", label=to_plot_label(name))
    by_k.axhline(summary[0]["majority"], color="tab:gray", linestyle=":", label="majority class")
    by_k.set(xlabel="neurons (k)", ylabel="mean accuracy on other sets")
    by_k.legend(fontsize=8)
    own = [row for row in rows if row.control is None and row.k == k]
    _matrix(matrix, own, k)
    _calibration(calibration, own, k)
    return figure


def _calibration(axis: Axes, rows: Sequence[GuardRow], k: int) -> None:
    """Each bin of probabilities, all training and test sets together; the larger, the more prompts."""
    bins: dict[float, list] = {}
    for row in rows:
        for point in row.scores.curve:
            bins.setdefault(point.low, []).append(point)
    axis.plot([0, 1], [0, 1], ":", color="tab:gray")
    for points in bins.values():
        n = np.array([point.n for point in points])
        x, y = (n @ [getattr(p, name) for p in points] / n.sum() for name in ("mean_probability", "harmful_share"))
        axis.scatter(x, y, s=10 + 2000 * n.sum() / sum(row.scores.n for row in rows), color="tab:blue", alpha=0.6)
    axis.set(xlabel="mean probability of harm", ylabel="share that was harmful", xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    axis.set_title(f"calibration, all sets, k = {k} (size: prompts)", fontsize=10)


def _matrix(axis: Axes, rows: Sequence[GuardRow], k: int) -> None:
    trained, tested = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("train", "test"))
    values = np.full((len(trained), len(tested)), np.nan)
    for row in rows:
        values[trained.index(row.train), tested.index(row.test)] = row.scores.accuracy
    axis.imshow(values, vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.75 else "black")
    axis.set_xticks(range(len(tested)), list(map(to_plot_label, tested)), rotation=20, ha="right")
    axis.set_yticks(range(len(trained)), list(map(to_plot_label, trained)))
    axis.set(xlabel="tried on", ylabel="fitted on")
    axis.set_title(f"accuracy, k = {k} (own set: by cross-validation)", fontsize=10)
