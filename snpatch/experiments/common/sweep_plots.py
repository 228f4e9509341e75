"""Plots of a sweep: scores and effects against k or rank, and scores against refused harmless prompts."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.ranking.window import EXTRA_CONTROLS
from snpatch.report.formatting import describe_score, to_plot_label
from snpatch.sweeps.rows import Row
from snpatch.sweeps.sweep import SweepResult

LINE_STYLES = ("-", "--", "-.", ":")
CONTROL_LABELS = {
    "magnitude": "neurons with the largest activations",
    "matched": "neurons with matched activations",
    "equal_energy": "random neurons, changed as much",
}
EFFECT_LINES = (  # column of a row, label, marker and line
    ("effect", "effect", "o-"),
    ("effect_coherent", "effect, without broken texts", "--"),
    ("broken", "broken texts", "x:"),
    ("harmless_refused", "harmless prompts refused", "+-."),
)


def plot_scores(result: SweepResult, judge: str, label: str = "") -> Figure | None:
    """Plot the mean score of each recipient.

    The plot has each ranking with its simultaneous band, its controls, and both unpatched models. Below are the effect,
    the effect over prompts without a broken text, and the shares of broken texts and of harmless prompts that are
    refused. The x axis is k, or the first rank of the window if the windows slide.

    Args:
        result: One slice of a sweep: one set, donor and strength.
        judge: Name of the judge.
        label: Name of the slice, the figure's title.

    Returns:
        None if the donor is the only recipient.
    """
    recipients = result.config.recipients
    if not recipients:
        return None
    figure = Figure(figsize=(6 * len(recipients), 8), layout="constrained")
    axes = figure.subplots(2, len(recipients), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    for (mean_axis, effect_axis), recipient in zip(axes.T, recipients, strict=True):
        _draw_recipient(mean_axis, result, judge, recipient)
        _draw_effects(effect_axis, result, judge, recipient)
        effect_axis.set_xlabel(mean_axis.get_xlabel())
        mean_axis.set_xlabel("")
    figure.suptitle(to_plot_label(label))
    return figure


def plot_over_refusal(result: SweepResult, judge: str, label: str = "") -> Figure | None:
    """Plot the mean score against the share of harmless prompts that are refused, one point per window.

    Args:
        result: See plot_scores.
        judge: Name of the judge.
        label: Name of the slice, the figure's title.

    Returns:
        None if the sweep has no harmless prompts, or the donor is the only recipient.
    """
    if not result.config.harmless or not result.config.recipients:
        return None
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, recipient in enumerate(result.config.recipients):
        for ranking, style in zip(result.rankings, LINE_STYLES * len(result.rankings), strict=False):
            line = result.line(judge, recipient, ranking)
            x, y = [_or_nan(row.mean) for row in line], [_or_nan(row.harmless_refused) for row in line]
            name = to_plot_label(f"{recipient}, {ranking} neurons")
            axis.plot(x, y, "o", linestyle=style, color=f"C{number}", markersize=4, label=name)
            for row in line:
                axis.annotate(str(row.rank_hi), (_or_nan(row.mean), _or_nan(row.harmless_refused)), fontsize=7)
    donor = result.baseline(result.donor, judge)
    name = to_plot_label(f"{result.donor}, unpatched")
    axis.plot(
        [_or_nan(donor.mean)], [_or_nan(donor.harmless_refused)], "*", color="tab:green", markersize=12, label=name
    )
    axis.set(xlabel=to_plot_label(f"mean {describe_score(judge)}"), ylabel="share of harmless prompts refused")
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(to_plot_label(label))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _is_curve(result: SweepResult) -> bool:
    """Return whether the windows are drawn by their end (k) and not by their first rank."""
    starts_at_top = [window.lo == 0 for window in result.config.windows]
    return all(starts_at_top) or sum(starts_at_top) > 1


def _draw_effects(axis: Axes, result: SweepResult, judge: str, recipient: str) -> None:
    """Draw effects with and without broken texts, and the shares of broken texts and of refusals."""
    is_curve = _is_curve(result)
    for number, ranking in enumerate(result.rankings):
        line = [row for row in result.line(judge, recipient, ranking) if row.rank_lo == 0 or not is_curve]
        x = [row.rank_hi if is_curve else row.rank_lo for row in line]
        suffix = f", {ranking}" if len(result.rankings) > 1 else ""
        for name, label, look in EFFECT_LINES:
            values = [_or_nan(getattr(row, name)) for row in line]
            if not all(map(math.isnan, values)):
                axis.plot(x, values, look, color=f"C{number}", markersize=3, label=to_plot_label(label + suffix))
    axis.set_ylabel("share")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _draw_recipient(axis: Axes, result: SweepResult, judge: str, recipient: str) -> None:
    is_curve, donor = _is_curve(result), result.donor
    for model, color, style in ((recipient, "tab:gray", "--"), (donor, "tab:green", ":")):
        label = to_plot_label(f"{model}, unpatched")
        axis.axhline(_or_nan(result.baseline(model, judge).mean), color=color, linestyle=style, label=label)
    for number, ranking in enumerate(result.rankings):
        _draw_ranking(axis, result, result.line(judge, recipient, ranking), f"C{number}", is_curve)
    axis.set(
        title=to_plot_label(f"{recipient} patched from {donor}"), ylabel=to_plot_label(f"mean {describe_score(judge)}")
    )
    axis.set_xlabel("patched neurons (k)" if is_curve else "first rank of the window")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _draw_ranking(axis: Axes, result: SweepResult, rows: Sequence[Row], color: str, is_curve: bool) -> None:
    """Draw one ranking's windows with the range of their random controls."""
    line = [row for row in rows if row.rank_lo == 0] if is_curve else rows

    def get_x(row: Row) -> int:
        return row.rank_hi if is_curve else row.rank_lo

    x = [get_x(row) for row in line]
    label = to_plot_label(f"{rows[0].ranking} neurons")
    axis.plot(x, [_or_nan(row.mean) for row in line], "o-", color=color, markersize=4, label=label)
    low, high = [_or_nan(row.band_low) for row in line], [_or_nan(row.band_high) for row in line]
    label = f"{result.config.confidence:.0%} band of all windows"
    axis.fill_between(x, low, high, color=color, alpha=0.15, label=label)
    for row in rows:
        if row not in line:  # a window that does not begin at rank 0 is drawn over its ranks
            axis.hlines(_or_nan(row.mean), row.rank_lo, row.rank_hi, color=color, linewidth=3)
    control_means = {get_x(row): [c.mean for c in result.controls(row) if c.mean is not None] for row in line}
    control_means = {position: means for position, means in control_means.items() if means}
    if control_means:
        x, means = list(control_means), list(control_means.values())
        axis.fill_between(x, [min(m) for m in means], [max(m) for m in means], color="tab:red", alpha=0.3)
        label = f"random neurons, {result.config.controls} seeds"
        center = {position: sum(m) / len(m) for position, m in control_means.items()}
        axis.plot(x, list(center.values()), color="tab:red", label=label)
        overlapping = [get_x(row) for row in line if row.control_overlap and get_x(row) in center]
        if overlapping:
            label = "random neurons, some of them the window's"
            axis.plot(overlapping, [center[x] for x in overlapping], "x", color="tab:red", label=label)
    for kind, style in zip(EXTRA_CONTROLS, LINE_STYLES[1:], strict=True):
        means = {get_x(row): [_or_nan(c.mean) for c in result.controls(row, kind)] for row in line}
        means = {position: sum(values) / len(values) for position, values in means.items() if values}
        if means:
            x, y = list(means), list(means.values())
            axis.plot(x, y, style, color="tab:brown", label=CONTROL_LABELS[kind])


def _or_nan(value: float | None) -> float:
    """Return NaN, which is not drawn, for a figure that is undefined."""
    return math.nan if value is None else value
