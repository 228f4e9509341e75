"""Guards across prompt sets: accuracy of predicting a harmful completion from the prompt's last token.

Compares k, random neurons, classifiers that read no neurons, and the majority class, with intervals of the differences.
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
from snpatch.guard.comparison import BASELINES, CONTROL_SEEDS, Comparison, ComparisonConfig, GuardRow, compare_guards
from snpatch.guard.differences import GuardDifference
from snpatch.guard.splits import MERGED
from snpatch.report.formatting import format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView

RANKING = "safety"  # name of the ranking in the tables
ROW_SCORES = ("balanced_accuracy", "brier", "calibration_error", "majority")  # averaged over rows, without intervals


@dataclass(frozen=True)
class GuardComparisonSettings(GuardSettings):
    """Settings of the comparison of guards.

    Args:
        prompts: Prompt sets to fit and test guards on; empty for the benchmarks.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        protocol: "pairwise": a guard is tested on each other set, and the mean is over all pairs. "merged", as
            published: it is tested on all other sets as one, and the mean is over the training sets.
        controls: Random controls of each kind.
        baselines: Classifiers that read no neurons, see ComparisonConfig.
    """

    prompts: tuple[str, ...] = ()
    k: tuple[int | float, ...] = (10, 50, 100, 200, 500, 1000, 1500)
    protocol: str = ComparisonConfig.protocol
    controls: int = CONTROL_SEEDS
    baselines: tuple[str, ...] = BASELINES


def run(context: ExperimentContext, settings: GuardComparisonSettings) -> Report:
    """Label the recipient's own completions, fit a guard on each set, and test it on the other sets."""
    ranking, model = context.ranking(), context.model(context.config.safety.recipient)
    names = settings.prompts or context.config.benchmarks
    config = ComparisonConfig(
        ks=[context.num_neurons(value, ranking) for value in settings.k],
        guard=settings.config,
        protocol=settings.protocol,
        controls=settings.controls,
        baselines=settings.baselines,
        resamples=settings.resamples,
        confidence=settings.confidence,
    )
    sets = {name: label_set(context, name, settings.harm_threshold) for name in names}
    num_repeated = {name: len(context.prompts(name)) - len(labeled.prompts) for name, labeled in sets.items()}
    with context.progress("guards") as progress:
        comparison = compare_guards(context.engine, model, sets, {RANKING: ranking}, config, progress)
    summary = _summarize(comparison)
    # The largest k instead of the best one, which would be chosen on the reported sets.
    k = max(row["k"] for row in summary if row["features"] == RANKING)
    differences = [difference for difference in comparison.differences if difference.k == k]
    difference_rows = [
        {**asdict(difference), "verdict": difference.verdict, "protocol": comparison.protocol}
        for difference in comparison.differences
    ]
    (safety,) = (row for row in summary if row["features"] == RANKING and row["k"] == k)
    level = f"{settings.confidence:.0%} CI"
    means_view = TableView.from_rows(
        [row for row in summary if row["k"] in (k, None)],
        {
            "features": "features",
            f"accuracy, {level}": lambda row: format_with_interval(row, "accuracy"),
            f"AUC, {level}": lambda row: format_with_interval(row, "auc"),
        },
        title=f"guards of {model}, k = {k}: {comparison.protocol}",
    )
    differences_view = TableView.from_rows(
        [row for row in difference_rows if row["k"] == k],
        {
            f"{RANKING} less": "reference",
            f"accuracy, {level}": lambda row: format_with_interval(row, "accuracy_difference"),
            f"AUC, {level}": lambda row: format_with_interval(row, "auc_difference"),
            "guard is": "verdict",
            "seeds at least as good": lambda row: _format_seeds(row["seeds_at_least"], row["seeds"]),
        },
        title="differences (intervals over prompts and control seeds; not corrected for their number)",
    )
    tables = {
        "guard": [row.flat() for row in comparison.rows],
        "guard-summary": summary,
        "guard-differences": difference_rows,
        "guard-calibration": _calibration_rows(comparison.rows),
    }
    records = [
        {
            "set": name,
            "prompt_index": i,
            "completion": completion,
            "score": float(labeled.scores[i]),
            "harmful": bool(labeled.labels[i]),
        }
        for name, labeled in sets.items()
        for i, completion in enumerate(labeled.completions)
    ]
    return Report(
        "guard",
        tables,
        {"guard": _plot(comparison.rows, summary, k)},
        (means_view, differences_view),
        [
            f"k = {k}: mean accuracy {format_with_interval(safety, 'accuracy')}; {comparison.protocol}.",
            _describe_differences(differences, level),
        ],
        notes=[
            *(f"{name}: {num} repeated prompts are left out" for name, num in num_repeated.items() if num),
            *comparison.notes,
        ],
        records=records,
    )


def _describe_differences(differences: Sequence[GuardDifference], level: str) -> str:
    """Return what the guard is better than, worse than, and not shown to differ from."""
    phrases = {"better": "more accurate than", "unclear": "not shown to differ from", "worse": "less accurate than"}
    parts = []
    for verdict, phrase in phrases.items():
        group = [
            f"{row.reference} ({format_with_interval(asdict(row), 'accuracy_difference', '{:+.3f}'.format)})"
            for row in differences
            if row.verdict == verdict
        ]
        parts += [f"{phrase} {', '.join(group)}"] if group else []
    return f"The guard is {'; '.join(parts)} (difference of accuracy, {level})."


def _format_seeds(at_least: int | None, seeds: int | None) -> str:
    return "" if seeds is None else f"{at_least} of {seeds}"


def _calibration_rows(rows: Sequence[GuardRow]) -> list[Row]:
    names = ("features", "control", "seed", "k", "train", "test")
    return [{name: getattr(row, name) for name in names} | asdict(point) for row in rows for point in row.scores.curve]


def _summarize(comparison: Comparison) -> list[Row]:
    """Return a row per features and k: means over the splits, and over the seeds of a control."""
    has_other_sets = any(row.train != row.test for row in comparison.rows)
    groups: dict[tuple, list[GuardRow]] = {}
    for row in comparison.rows:
        if not has_other_sets or row.train != row.test:
            groups.setdefault((row.features, row.control, row.k), []).append(row)
    summary = []
    for means in comparison.means:
        group = groups.get((means.features, means.control, means.k), [])
        columns: Row = {**asdict(means), "features": f"random {means.control}" if means.control else means.features}
        for score in ROW_SCORES:
            values = [value for row in group if (value := getattr(row.scores, score)) is not None]
            columns[score] = float(np.mean(values)) if values else None
        summary.append({**columns, "protocol": comparison.protocol})
    if not any(row["features"] == RANKING for row in summary):
        raise SnpatchError("guard: k: expected at most the ranking's number of neurons, got only larger ones")
    return sorted(summary, key=lambda row: (row["k"] is None, row["k"] or 0, row["features"] != RANKING))


def _plot(rows: Sequence[GuardRow], summary: Sequence[Row], k: int) -> Figure:
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    curve_axis, matrix_axis, calibration_axis = figure.subplots(1, 3)
    for name in dict.fromkeys(row["features"] for row in summary if row["k"] is not None):
        line = [row for row in summary if row["features"] == name]
        accuracies = np.array([row["accuracy"] for row in line])
        bounds = [np.array([row[f"accuracy_{end}"] for row in line], dtype=float) for end in ("low", "high")]
        low, high = (np.nan_to_num(np.abs(accuracies - bound)) for bound in bounds)  # NaN: a control of one seed
        curve_axis.errorbar(
            [row["k"] for row in line], accuracies, [low, high], fmt="o-", capsize=2, label=to_plot_label(name)
        )
    for i, row in enumerate(row for row in summary if row["k"] is None):
        curve_axis.axhline(row["accuracy"], color=f"C{4 + i}", linestyle=":", label=to_plot_label(row["features"]))
    curve_axis.set(xlabel="neurons (k)", ylabel="mean accuracy")
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
    test = [*(name for name in test if name != MERGED), *(name for name in test if name == MERGED)]
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
