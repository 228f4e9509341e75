"""Report of a sweep: settings of the experiments that sweep, on-screen tables, plots and headline.

`curve`, `sliding_window`, `transfer`, `positions` and `snpatch sweep` share this module.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.window import Window
from snpatch.report.formatting import (
    describe_score,
    format_interval,
    format_p_value,
    format_percent,
    format_range,
    format_value,
    format_with_interval,
    to_plot_label,
)
from snpatch.report.report import Report, TableView
from snpatch.statistics import interval
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import describe_unfinished
from snpatch.sweeps.sweep import Row, SweepResult
from snpatch.utils.optional import require

MAX_FAILURES = 10  # named in the notes


@dataclass(frozen=True)
class SweepSettings:
    """Settings that the sweeping experiments share; see SweepConfig."""

    controls: int = SweepConfig.controls
    control_kind: str = SweepConfig.control_kind
    disjoint: bool = SweepConfig.disjoint
    positions: str | int = SweepConfig.positions
    resamples: int = SweepConfig.resamples
    confidence: float = SweepConfig.confidence


def build_sweep_config(
    context: ExperimentContext, settings: SweepSettings, windows: Sequence[Window | int]
) -> SweepConfig:
    """Build the sweep of an experiment config's recipients and donor over these windows."""
    return SweepConfig(
        context.config.recipients,
        (context.config.donor,),
        tuple(map(Window.of, windows)),
        controls=settings.controls,
        control_kind=settings.control_kind,
        disjoint=settings.disjoint,
        positions=settings.positions,
        sampling=context.sampling,
        resamples=settings.resamples,
        confidence=settings.confidence,
    )


def build_sweep_report(result: SweepResult, name: str) -> Report:
    """Build a sweep's report: all rows as a file, and tables and plots.

    There is one table and one plot per judge, set, donor and strength.
    """
    plots, displays, headline = {}, [], []
    for judge in result.judges:
        for label, part in result.slices():
            stem = name if judge == result.judges[0] else f"{name}-{judge}"
            if label:
                stem += "-" + label.replace(", ", "-")
            if (figure := plot_scores(part, judge, label)) is not None:
                plots[stem] = figure
            displays.append(_build_table(part, judge, label))
    for label, part in result.slices():
        headline += build_headline(part, label)
    return Report(
        name,
        {name: [{**asdict(row), "state": row.state} for row in result.rows]},
        plots,
        tuple(displays),
        headline,
        records=result.records,
        notes=[*result.notes, *_describe_failures(result)],
    )


def _build_table(result: SweepResult, judge: str, label: str) -> TableView:
    """Build the on-screen table of one judge, set, donor and strength, without the random controls.

    Five columns, so that it fits a terminal of 100 characters; the report's file has all columns.
    """
    rows = [row for row in result.rows if row.judge == judge and row.control_seed is None]
    certainty = f"{result.config.confidence:.0%} CI"
    columns = {
        "recipient": lambda row: row.recipient,
        "neurons": lambda row: _describe_window(row, len(result.rankings) > 1),
        f"mean {certainty}": lambda row: format_with_interval(asdict(row), "mean"),
        f"effect {certainty}": lambda row: _format_effect(row),
        "p vs random": lambda row: format_p_value(row.p_vs_random),
    }
    if any(row.control_overlap for row in rows):
        columns["overlap"] = lambda row: f"{row.control_overlap:.1%}" if row.control_overlap else ""
    if any(row.failed for row in rows):
        columns["failed"] = lambda row: row.failed or ""
    title = f"mean {describe_score(judge)}" + (f", {label}" if label else "")
    return TableView.from_rows(rows, columns, title)


def _describe_window(row: Row, names_ranking: bool) -> str:
    if row.ranking is None:
        return "unpatched"
    window = f"[{row.rank_lo}, {row.rank_hi})" if row.rank_lo else str(row.rank_hi)
    return f"{window} ({row.neuron_fraction:.1%})" + (f" {row.ranking}" if names_ranking else "")


def _format_effect(row: Row) -> str:
    return "" if row.ranking is None else format_with_interval(asdict(row), "effect", format_percent)


def _describe_failures(result: SweepResult) -> list[str]:
    """Return the number of missing completions, the first failures, and the number of failures."""
    lines = [*filter(None, [describe_unfinished(result.records)])]
    lines += [f"failed: {failure}" for failure in result.failures[:MAX_FAILURES]]
    if len(result.failures) > MAX_FAILURES:
        lines.append(f"... {len(result.failures)} in all")
    return lines


def plot_scores(result: SweepResult, judge: str, label: str = "") -> Figure | None:
    """Plot the mean score of each recipient.

    The plot has each ranking, the range of its random controls, and both unpatched models. The x axis is k, or the
    first rank of the window if the windows slide.

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
    figure = Figure(figsize=(6 * len(recipients), 4.5), layout="constrained")
    axes = figure.subplots(1, len(recipients), sharey=True, squeeze=False)
    for axis, recipient in zip(axes[0], recipients, strict=True):
        _draw_recipient(axis, result, judge, recipient)
    figure.suptitle(to_plot_label(label))
    return figure


def _draw_recipient(axis: Axes, result: SweepResult, judge: str, recipient: str) -> None:
    starts_at_top = [window.lo == 0 for window in result.config.windows]
    is_curve = all(starts_at_top) or sum(starts_at_top) > 1
    donor = result.donor
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
    low, high = [_or_nan(row.mean_low) for row in line], [_or_nan(row.mean_high) for row in line]
    axis.fill_between(x, low, high, color=color, alpha=0.15)
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


def _or_nan(value: float | None) -> float:
    """Return NaN, which is not drawn, for a figure that is undefined."""
    return math.nan if value is None else value


def build_headline(result: SweepResult, label: str = "") -> list[str]:
    """Write one sentence per judge, recipient and ranking: the gain of the donor that patching recovers.

    A sentence is about the smallest window that reaches 90 % of the best window's effect. If the donor's gain over the
    recipient has an interval that contains zero, or a cost that is not lower, the sentence says so instead, because an
    effect is a fraction of that gain.

    Args:
        result: One slice of a sweep: one set, donor and strength.
        label: Name of the slice.
    """
    sentences, suffix = [], f" ({label})" if label else ""
    for judge in result.judges:
        for recipient in result.config.recipients:
            no_gain = _describe_no_gain(result, judge, recipient)
            for ranking in result.rankings:
                sentence = no_gain or _describe_recovery(result, judge, recipient, ranking)
                sentences.append(f"{recipient}: {sentence}{suffix}.")
    return list(dict.fromkeys(sentences))


def _describe_no_gain(result: SweepResult, judge: str, recipient: str) -> str | None:
    """Return why the donor has no gain over the recipient, or None if it has one."""
    recipient_scores, donor_scores = (_scores_by_prompt(result, judge, model) for model in (recipient, result.donor))
    shared = [prompt for prompt in recipient_scores if prompt in donor_scores]
    if not shared:
        return f"no prompt has scores of both {recipient} and {result.donor}"
    differences = np.array([donor_scores[prompt] - recipient_scores[prompt] for prompt in shared])
    config = result.config
    figures = interval(np.mean, differences, resamples=config.resamples, confidence=config.confidence)
    value, low, high = map(require, figures)  # all are defined for a mean of at least one difference
    if (low > 0 or high < 0) and not (judge == "cost" and value > 0):
        return None
    certainty = f"{config.confidence:.0%} CI {format_value(low)} .. {format_value(high)}, {len(shared)} prompts"
    return f"the mean {judge} of {result.donor} differs by {value:+.2f} ({certainty}): no gain to recover"


def _scores_by_prompt(result: SweepResult, judge: str, model: str) -> dict[int, float]:
    """Return prompt index -> mean score of an unpatched model, for the prompts that have all their scores."""
    set_name = result.rows[0].set
    scores: dict[int, list] = {}
    for record in result.records:
        if (record["set"], record["recipient"], record["ranking"]) == (set_name, model, None):
            scores.setdefault(record["prompt_index"], []).append(record["scores"][judge])
    return {prompt: float(np.mean(values)) for prompt, values in scores.items() if None not in values}


def _describe_recovery(result: SweepResult, judge: str, recipient: str, ranking: str) -> str:
    gain = "the safety gain" if judge == "cost" else f"the change of {judge}"
    effects = [(row, row.effect) for row in result.line(judge, recipient, ranking) if row.effect is not None]
    best = max((effect for _, effect in effects), default=0.0)
    if best <= 0:
        return f"no window of ranking {ranking} recovers any of {gain}"
    row = min((row for row, effect in effects if effect >= 0.9 * best), key=lambda row: row.neuron_fraction)
    neurons = f"neurons {row.rank_lo} to {row.rank_hi - 1}" if row.rank_lo else f"top {row.rank_hi} neurons"
    effect_interval = format_interval(asdict(row), "effect", format_percent)
    certainty = f" ({result.config.confidence:.0%} CI {effect_interval})" if effect_interval else ""
    return (
        f"{neurons} of ranking {ranking} ({row.neuron_fraction:.1%}) recover {format_percent(row.effect)}{certainty} "
        f"of {gain} of {result.donor}; {_describe_controls(result, row)}"
    )


def _describe_controls(result: SweepResult, row: Row) -> str:
    """Return the range of effects of a row's random controls, and their overlap with the window."""
    effects = [control.effect for control in result.controls(row) if control.effect is not None]
    if not effects:
        return "no random control"
    overlap = f" ({row.control_overlap:.1%} of them in the window: conservative)" if row.control_overlap else ""
    return f"random neurons: {format_range(effects, format_percent)}{overlap}"
