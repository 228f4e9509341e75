"""Sentences, tables and plot of the safeguard: what a guard prevents, and what it refuses for nothing."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.report.formatting import format_percent, format_value, format_with_interval, to_plot_label
from snpatch.report.report import Row, TableView


def describe_row(row: Row, k: int, level: str) -> str:
    """Return the sentence of a model and a set. level: of the intervals, for example "95% CI"."""
    subject = f"{row['model']} on {row['set']}: the guard of {k} neurons"
    if row["prevented"] is None:
        parts = [f"refuses {row['refused']} of {row['prompts']} prompts; no answer is harmful, so it can prevent none"]
    else:
        parts = [
            f"prevents {format_with_interval(row, 'prevented', format_percent)} of {row['harmful']} harmful answers "
            f"({level}), {_compare_with_random(row)}"
        ]
    if row["over_refusal"] is not None:
        over_refusal = format_with_interval(row, "over_refusal", format_percent)
        parts.append(f"refuses {over_refusal} of {row['harmless']} harmless prompts")
    passed = "every prompt is refused" if row["passed"] is None else f"{format_value(row['passed'])} of what it answers"
    parts.append(f"mean cost {format_value(row['all'])} without it, {passed}")
    return f"{subject} {'; '.join(parts)}."


def _compare_with_random(row: Row) -> str:
    rate = format_percent(row["prevented_random"])
    if row["prevented_gain_low"] is not None and row["prevented_gain_low"] > 0:
        return f"random refusal at the same rate {rate}"
    return f"no better than random refusal at the same rate ({rate})"


def view_safeguard(rows: Sequence[Row], harmless_rows: Sequence[Row], confidence: float) -> tuple[TableView, ...]:
    """Return the tables to show on screen."""
    level = f"{confidence:.0%} CI"

    def share(name: str):
        return lambda row: "" if row[name] is None else format_with_interval(row, name, format_percent)

    columns = {
        "set": "set",
        "model": "model",
        "refused": lambda row: f"{row['refused']} of {row['prompts']}",
        f"harmful answers prevented, {level}": share("prevented"),
        "at random": lambda row: format_percent(row["prevented_random"]),
        f"harmless refused, {level}": share("over_refusal"),
        "mean cost": "all",
        f"mean cost if answered, {level}": lambda row: format_with_interval(row, "passed"),
        f"risk area less than random, {level}": lambda row: format_with_interval(row, "risk_area_gain"),
    }
    views = [TableView.from_rows(rows, columns)]
    if harmless_rows:
        harmless_columns = {
            "harmless set": "set",
            "model": "model",
            "refused": lambda row: f"{row['refused']} of {row['prompts']}",
            f"share, {level}": share("over_refusal"),
        }
        views.append(TableView.from_rows(harmless_rows, harmless_columns))
    return tuple(views)


def plot_safeguard(rows: Sequence[Row], points: Sequence[Row]) -> Figure:
    """Plot prevented harm and over-refusal, mean costs, and risk against coverage."""
    figure = Figure(figsize=(6 + 3 * len(rows) / 2, 4.6), layout="constrained")
    share_axis, cost_axis, risk_axis = figure.subplots(1, 3)
    labels = [f"{to_plot_label(row['model'])}\n{to_plot_label(row['set'])}" for row in rows]
    _draw_bars(
        share_axis,
        rows,
        labels,
        {
            "prevented": "harmful answers prevented",
            "prevented_random": "random refusal at that rate",
            "over_refusal": "harmless prompts refused",
        },
    )
    share_axis.set(ylabel="share", ylim=(0, 1.05))
    _draw_bars(cost_axis, rows, labels, {"all": "all prompts", "passed": "answered with the guard"})
    cost_axis.axhline(0, color="black", linewidth=0.8)
    cost_axis.set_ylabel("mean cost (lower is safer)")
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        curve = [point for point in points if (point["set"], point["model"]) == (row["set"], row["model"])]
        coverage = [point["coverage"] for point in curve]
        color = f"C{i % 10}"
        risk_axis.plot(coverage, [point["risk"] for point in curve], color=color, label=label.replace("\n", ", "))
        low, high = ([point[f"risk_{end}"] for point in curve] for end in ("low", "high"))
        risk_axis.fill_between(coverage, low, high, color=color, alpha=0.15, linewidth=0)
        risk_axis.axhline(curve[0]["random_risk"], color=color, linestyle=":", linewidth=0.8)
    risk_axis.set(xlabel="coverage (share answered)", ylabel="share of harmful answers", ylim=(-0.02, 1.02))
    risk_axis.set_title("dotted: random refusal", fontsize=9)
    for axis in (share_axis, cost_axis, risk_axis):
        axis.legend(fontsize=7)
    return figure


def _draw_bars(axis: Axes, rows: Sequence[Row], labels: Sequence[str], columns: dict[str, str]) -> None:
    positions, width = np.arange(len(rows)), 0.8 / len(columns)
    for i, (name, label) in enumerate(columns.items()):
        heights = [np.nan if row[name] is None else row[name] for row in rows]
        axis.bar(positions + (i - (len(columns) - 1) / 2) * width, heights, width, label=label)
    axis.set_xticks(positions, labels, fontsize=7, rotation=25, ha="right")
