"""Sweeps in experiments: the settings that they share, and what a sweep's report says and draws.

Why apart from `curve`: windows, transfer, positions and `snpatch sweep` tell of sweeps, too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.window import Window
from snpatch.report.formatting import format_interval, format_p_value, format_percent, format_range, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import describe_unfinished
from snpatch.sweeps.sweep import Row, SweepResult

TOLD = 10  # failures that a report names


@dataclass(frozen=True)
class SweepSettings:
    """What the experiments that sweep have in common: see SweepConfig."""

    controls: int = SweepConfig.controls
    control_kind: str = SweepConfig.control_kind
    disjoint: bool = SweepConfig.disjoint
    positions: str | int = SweepConfig.positions
    resamples: int = SweepConfig.resamples
    confidence: float = SweepConfig.confidence


def build_sweep_config(
    context: ExperimentContext, settings: SweepSettings, windows: Sequence[Window | int]
) -> SweepConfig:
    """A sweep of the config's main pair with what the settings of a sweeping experiment say."""
    return SweepConfig(
        context.config.recipients,
        context.config.donor,
        tuple(windows),
        controls=settings.controls,
        control_kind=settings.control_kind,
        disjoint=settings.disjoint,
        positions=settings.positions,
        sampling=context.sampling,
        resamples=settings.resamples,
        confidence=settings.confidence,
    )


def build_sweep_report(result: SweepResult, name: str) -> Report:
    """A sweep's report: its rows, a plot for each judge, and what share of the neurons recovered what."""
    first = result.judges[0]
    plots = {
        "-".join([name, *([judge] if judge != first else []), *([label.replace(", ", "-")] if label else [])]): figure
        for judge in result.judges
        for label, part in result.slices()
        if (figure := plot_scores(part, judge, label)) is not None
    }
    shown = [r for r in result.rows if r.control_seed is None]
    interval = f"{result.config.confidence:.0%} interval"
    columns = {
        "judge": lambda r: r.judge,
        "set": lambda r: r.set,
        "recipient": lambda r: r.recipient,
        "donor": lambda r: r.donor or "",
        "strength": lambda r: r.strength if r.ranking else "",
        "ranking": lambda r: r.ranking or "unpatched",
        "window": lambda r: f"[{r.rank_lo}, {r.rank_hi})" if r.ranking else "",
        "share": lambda r: f"{r.neuron_fraction:.1%}" if r.ranking else "",
        "left out": lambda r: r.failed or "",
        "mean": lambda r: r.mean,
        interval: lambda r: format_interval(asdict(r), "mean"),
        "effect": lambda r: format_percent(r.effect) if r.ranking else "",
        "of the effect": lambda r: format_interval(asdict(r), "effect", format_percent),
        "net of random": lambda r: format_percent(r.net_effect) if r.net_effect is not None else "",
        "of the net": lambda r: format_interval(asdict(r), "net_effect", format_percent),
        "p": lambda r: format_p_value(r.p_vs_unpatched),
        "random: mean, effect": lambda r: _random(result, r),
        "p against it": lambda r: format_p_value(r.p_vs_random),
    }
    several = {"judge": result.judges, "set": result.sets, "donor": result.config.donors}
    several |= {"strength": result.config.strengths}
    for column, values in several.items():
        if len(values) == 1:
            del columns[column]
    if not any(row.failed for row in result.rows):
        del columns["left out"]
    return Report(
        name,
        {name: [{**asdict(row), "state": row.state} for row in result.rows]},
        plots,
        (TableView.from_rows(shown, columns),),
        [*(s for label, part in result.slices() for s in build_headline(part, label)), *result.notes, *_failed(result)],
        records=result.records,
    )


def _failed(result: SweepResult) -> list[str]:
    """How many texts are missing, the first things that failed, and how many did."""
    told = [*filter(None, [describe_unfinished(result.records)]), *(f"failed: {one}" for one in result.failures[:TOLD])]
    return [*told, f"... {len(result.failures)} in all"] if len(result.failures) > TOLD else told


def plot_scores(result: SweepResult, judge: str, label: str = "") -> Figure | None:
    """Mean score for each recipient: each ranking, the band of its random controls, both models' lines.

    Against k, or against a window's first rank where windows slide. result: of one set, donor and strength, which
    `label` tells. None where its donor is the only recipient.
    """
    recipients = result.config.recipients
    if not recipients:
        return None
    figure = Figure(figsize=(6 * len(recipients), 4.5), layout="constrained")
    axes = figure.subplots(1, len(recipients), sharey=True, squeeze=False)
    for axis, recipient in zip(axes[0], recipients, strict=True):
        _curves(axis, result, judge, recipient)
    figure.suptitle(to_plot_label(label))
    return figure


def _curves(axis: Axes, result: SweepResult, judge: str, recipient: str) -> None:
    tops = [window.lo == 0 for window in result.config.windows]
    is_top = all(tops) or sum(tops) > 1

    def place(row: Row) -> int:
        return row.rank_hi if is_top else row.rank_lo

    donor = result.donor
    for model, colour, style in ((recipient, "tab:gray", "--"), (donor, "tab:green", ":")):
        name = to_plot_label(f"{model}, unpatched")
        axis.axhline(result.baseline(model, judge).mean, color=colour, linestyle=style, label=name)
    for number, ranking in enumerate(result.rankings):
        colour, rows = f"C{number}", result.line(judge, recipient, ranking)
        line = [row for row in rows if row.rank_lo == 0] if is_top else rows
        x = [place(row) for row in line]
        name = to_plot_label(f"{ranking} neurons")
        axis.plot(x, [row.mean for row in line], "o-", color=colour, markersize=4, label=name)
        axis.fill_between(x, [row.mean_low for row in line], [row.mean_high for row in line], color=colour, alpha=0.15)
        for row in rows:
            if row not in line:  # a window further down lies over its ranks
                axis.hlines(row.mean, row.rank_lo, row.rank_hi, color=colour, linewidth=3)
        controls = {place(row): [r.mean for r in result.controls(row)] for row in line}
        controls = {at: means for at, means in controls.items() if means}
        if controls:
            x, means = list(controls), list(controls.values())
            axis.fill_between(x, [min(m) for m in means], [max(m) for m in means], color="tab:red", alpha=0.3)
            label = f"random neurons, {result.config.controls} seeds"
            axis.plot(x, [sum(m) / len(m) for m in means], color="tab:red", label=label)
    axis.set(title=to_plot_label(f"{recipient} patched from {donor}"), ylabel=to_plot_label(f"mean {judge}"))
    axis.set_xlabel("patched neurons (k)" if is_top else "first rank of the window")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def build_headline(result: SweepResult, label: str = "") -> list[str]:
    """One sentence a judge, recipient and ranking: what share of the neurons recovered what of the donor's gain.

    result: of one set, donor and strength, which `label` tells. The window is the smallest that reaches 90 % of the
    best window's effect.
    """
    sentences, where = [], f" ({label})" if label else ""
    for judge in result.judges:
        gain = "the safety gain" if judge == "cost" else f"the change of {judge}"
        for recipient in result.config.recipients:
            for ranking in result.rankings:
                line = [row for row in result.line(judge, recipient, ranking) if row.effect is not None]
                best = max((row.effect for row in line), default=0.0)
                if best <= 0:
                    sentences.append(f"{recipient}: no window of {ranking} neurons recovered any of {gain}{where}.")
                    continue
                row = min((row for row in line if row.effect >= 0.9 * best), key=lambda row: row.neuron_fraction)
                random, place = _random(result, row), f", from rank {row.rank_lo}" if row.rank_lo else ""
                neurons = f"{row.rank_hi - row.rank_lo} by {ranking}{place}"
                sentences.append(
                    f"{recipient}: {row.neuron_fraction:.1%} of the neurons ({neurons}) recovered "
                    f"{format_percent(row.effect)} of {gain} of {result.donor}{where}"
                    + (f"; random ones: {judge}, effect {random}." if random else ".")
                )
    return sentences


def _random(result: SweepResult, row: Row) -> str:
    """The range of the row's random controls, mean and effect."""
    same = result.controls(row)
    if not same or row.control_seed is not None:
        return ""
    means, effects = [r.mean for r in same], [r.effect for r in same if r.effect is not None]
    return f"{format_range(means)}, {format_range(effects, format_percent)}" if effects else format_range(means)
