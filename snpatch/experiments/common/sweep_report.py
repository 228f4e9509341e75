"""Report of a sweep: settings of the experiments that sweep, on-screen tables, plots and headline.

`curve`, `sliding_window`, `transfer`, `positions` and `snpatch sweep` share this module.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.window import EXTRA_CONTROLS, Window
from snpatch.report.formatting import (
    describe_score,
    format_interval,
    format_p_value,
    format_percent,
    format_value,
    format_with_interval,
    to_plot_label,
)
from snpatch.report.report import Report, TableView
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.rows import Row
from snpatch.sweeps.store import describe_unfinished
from snpatch.sweeps.sweep import SweepResult

MAX_FAILURES = 10  # named in the notes
BROKEN_LIMIT = 0.05  # share of broken texts above which a headline names it
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


@dataclass(frozen=True)
class SweepSettings:
    """Settings that the sweeping experiments share; see SweepConfig."""

    controls: int = SweepConfig.controls
    control_kind: str = SweepConfig.control_kind
    extra_controls: tuple[str, ...] = SweepConfig.extra_controls
    disjoint: bool = SweepConfig.disjoint
    positions: str | int = SweepConfig.positions
    resamples: int = SweepConfig.resamples
    confidence: float = SweepConfig.confidence
    report_k: int | float = SweepConfig.report_k
    over_refusal: bool = False  # also patch the experiment config's harmless prompts
    cluster_by: str = SweepConfig.cluster_by


def build_sweep_config(
    context: ExperimentContext,
    settings: SweepSettings,
    windows: Sequence[Window | int],
    *,
    recipients: Sequence[str] = (),
    donors: Sequence[str] = (),
) -> SweepConfig:
    """Build the sweep of these windows. recipients, donors: default to the experiment config's."""
    return SweepConfig(
        recipients or context.config.recipients,
        donors or (context.config.donor,),
        tuple(map(Window.of, windows)),
        controls=settings.controls,
        control_kind=settings.control_kind,
        extra_controls=settings.extra_controls,
        disjoint=settings.disjoint,
        positions=settings.positions,
        sampling=context.sampling,
        resamples=settings.resamples,
        confidence=settings.confidence,
        report_k=settings.report_k,
        harmless=context.config.harmless if settings.over_refusal else "",
        cluster_by=settings.cluster_by,
    )


def build_sweep_report(result: SweepResult, name: str) -> Report:
    """Build a sweep's report: all rows as a file, and tables and plots.

    There is one table and one plot per judge, set, donor and strength.
    """
    plots, displays, headline = {}, [], []
    for judge in result.judges:
        for label, part in result.slices():
            if not _is_reported(result, judge, part):
                continue
            stem = name if judge == result.judges[0] else f"{name}-{judge}"
            if label:
                stem += "-" + label.replace(", ", "-")
            if (figure := plot_scores(part, judge, label)) is not None:
                plots[stem] = figure
            if (figure := plot_over_refusal(part, judge, label)) is not None:
                plots[f"{stem}-over-refusal"] = figure
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


def _is_reported(result: SweepResult, judge: str, part: SweepResult) -> bool:
    """Return whether a slice has a table and plots of its own.

    Scores of harmless prompts, and refusals, are columns of the other rows.
    """
    config = result.config
    return not config.harmless or (part.rows[0].set != config.harmless and judge != config.refusal_judge)


def _build_table(result: SweepResult, judge: str, label: str) -> TableView:
    """Build the on-screen table of one judge, set, donor and strength, without the random controls.

    Five columns, so that it fits a terminal of 100 characters; the report's file has all columns.
    """
    rows = [row for row in result.rows if row.judge == judge and row.control is None]
    certainty = f"{result.config.confidence:.0%} CI"
    columns = {
        "recipient": lambda row: row.recipient,
        "neurons (of all)": lambda row: _describe_window(row, len(result.rankings) > 1),
        f"mean {certainty}": lambda row: format_with_interval(asdict(row), "mean"),
        f"effect {certainty}": lambda row: _format_effect(row),
        "p (q) vs random": _format_p_vs_random,
    }
    if any(row.broken for row in rows):
        columns["broken"] = lambda row: "" if row.broken is None else f"{row.broken:.0%}"
    if result.config.harmless:
        columns["over-refusal"] = lambda row: "" if row.harmless_refused is None else f"{row.harmless_refused:.0%}"
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
    return "" if row.effect is None else format_with_interval(asdict(row), "effect", format_percent)


def _format_p_vs_random(row: Row) -> str:
    if row.p_vs_random is None:
        return ""
    return f"{format_p_value(row.p_vs_random)} ({format_p_value(row.q_vs_random)})"


def _describe_failures(result: SweepResult) -> list[str]:
    """Return the number of missing completions, the first failures, and the number of failures."""
    lines = [*filter(None, [describe_unfinished(result.records)])]
    lines += [f"failed: {failure}" for failure in result.failures[:MAX_FAILURES]]
    if len(result.failures) > MAX_FAILURES:
        lines.append(f"... {len(result.failures)} in all")
    return lines


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
    axis.set_title(to_plot_label(label))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _is_curve(result: SweepResult) -> bool:
    """Return whether the windows are drawn by their end (k) and not by their first rank."""
    starts_at_top = [window.lo == 0 for window in result.config.windows]
    return all(starts_at_top) or sum(starts_at_top) > 1


def _draw_effects(axis: Axes, result: SweepResult, judge: str, recipient: str) -> None:
    """Draw effects with and without broken texts, and the shares of broken texts and refused harmless prompts."""
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


def build_headline(result: SweepResult, label: str = "") -> list[str]:
    """Write one sentence per judge, recipient and ranking: the change of the mean at a k that was fixed in advance.

    The window is the same for all rankings; `choose_window` does not look at scores. If the gap of donor and recipient
    is not established, the sentence says so instead, because an effect is a fraction of that gap.

    Args:
        result: One slice of a sweep: one set, donor and strength.
        label: Name of the slice.
    """
    sentences, suffix = [], f" ({label})" if label else ""
    for judge in result.judges:
        if not _is_reported(result, judge, result):
            continue
        for recipient in result.config.recipients:
            for ranking in result.rankings:
                row = choose_window(result.line(judge, recipient, ranking), result.config.report_k)
                sentences.append(f"{recipient}: {_describe_row(result, row)}{suffix}.")
    return list(dict.fromkeys(sentences))


def choose_window(rows: Sequence[Row], k: int | float) -> Row:
    """Return the row whose number of neurons is nearest to k, whatever its scores.

    Windows that begin at the top come first, and the window of no neurons comes last.

    Args:
        rows: Rows of one ranking.
        k: Number of neurons, or a float: a fraction of the ranked neurons.
    """

    def distance(row: Row) -> float:
        return abs((row.ranked_fraction or 0.0) - k) if isinstance(k, float) else abs(row.num_patched - k)

    return min(rows, key=lambda row: (row.num_patched == 0, row.rank_lo, distance(row), row.num_patched))


def describe_neurons(row: Row) -> str:
    """Return a row's neurons with both of their fractions."""
    neurons = f"ranks {row.rank_lo} to {row.rank_hi - 1}" if row.rank_lo else f"the top {row.rank_hi} neurons"
    ranked = "" if row.ranked_fraction is None else f", {row.ranked_fraction:.1%} of the ranked"
    return f"{neurons} ({row.neuron_fraction:.1%} of all{ranked})"


def describe_gap(row: Row, donor: str, confidence: float) -> str:
    """Return why a row has no effect: the gap of donor and recipient with its interval."""
    if row.gap is None:
        return f"no prompt has scores of both models, so there is no effect of {donor}"
    bounds = format_interval(asdict(row), "gap")
    certainty = f"{confidence:.0%} CI {bounds}, " if bounds else ""
    t = "" if row.gap_t is None else f": t = {row.gap_t:.1f}"
    return (
        f"the difference of {donor}'s mean {row.judge}, {row.gap:+.2f} ({certainty}{row.prompts} prompts), is not "
        f"established{t}, so no effect is given"
    )


def describe_change(row: Row, baseline: float | None) -> str:
    """Return in which direction, and by how much, a row moves the recipient's mean."""
    change = (row.mean or 0.0) - (baseline or 0.0)
    if not change:
        return f"leave the mean {row.judge} unchanged"
    return f"{'raise' if change > 0 else 'lower'} the mean {row.judge} by {format_value(abs(change))}"


def _describe_row(result: SweepResult, row: Row) -> str:
    if row.effect is None:
        return describe_gap(row, result.donor, result.config.confidence)
    baseline = result.baseline(row.recipient, row.judge).mean
    certainty = f"{result.config.confidence:.0%} CI"
    side = "higher" if (row.gap or 0.0) > 0 else "lower"
    bounds = format_interval(asdict(row), "effect", format_percent)
    return (
        f"{describe_neurons(row)} of ranking {row.ranking} {describe_change(row, baseline)}, "
        f"{format_percent(row.effect)} ({certainty} {bounds}) of the way to {result.donor}, whose mean is "
        f"{format_value(abs(row.gap or 0.0))} {side}; {_describe_controls(row, certainty)}"
        f"{_describe_ceiling(result, row)}{_describe_side_effects(result, row)}"
    )


def _describe_side_effects(result: SweepResult, row: Row) -> str:
    """Return the share of broken texts if it is above BROKEN_LIMIT, and that of harmless prompts that are refused."""
    text = ""
    if row.broken is not None and row.broken > BROKEN_LIMIT:
        effect = "none" if row.effect_coherent is None else format_percent(row.effect_coherent)
        text += f"; {format_percent(row.broken)} of its texts are broken (effect over the other prompts: {effect})"
    if row.harmless_refused is not None:
        before = result.baseline(row.recipient, row.judge).harmless_refused
        text += (
            f"; it refuses {format_percent(row.harmless_refused)} of the harmless prompts (unpatched: "
            f"{format_percent(before)})"
        )
    return text


def _describe_controls(row: Row, certainty: str) -> str:
    """Return the effect net of a row's random controls, with their overlap, and of its magnitude control."""
    magnitude = ""
    if row.net_of_magnitude is not None:
        bounds = format_interval(asdict(row), "net_of_magnitude", format_percent)
        share = f"{format_percent(row.net_of_magnitude)} ({certainty} {bounds})"
        magnitude = f"; net of the neurons with the largest activations: {share}"
    if not row.controls:
        return f"no random control{magnitude}"
    controls = "1 random control" if row.controls == 1 else f"{row.controls} random controls"
    overlap = f" ({row.control_overlap:.1%} of them in the window: conservative)" if row.control_overlap else ""
    bounds = format_interval(asdict(row), "net_effect", format_percent)
    bounds = f" ({certainty} {bounds})" if bounds else ""
    return f"net of {controls}{overlap}: {format_percent(row.net_effect)}{bounds}{magnitude}"


def _describe_ceiling(result: SweepResult, row: Row) -> str:
    """Return the effect of all ranked neurons, if the grid has them: what the row's effect can reach at most."""
    line = result.line(row.judge, row.recipient, row.ranking or "")
    effects = [other.effect for other in line if other.ranked_fraction == 1 and other is not row]
    return f"; all ranked neurons: {format_percent(effects[0])}" if effects and effects[0] is not None else ""
