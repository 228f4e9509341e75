"""Report of a sweep: settings of the experiments that sweep, on-screen tables, plots and headline.

`curve`, `sliding_window`, `transfer`, `positions` and `snpatch sweep` share this module.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from snpatch.experiments.common.sweep_headline import build_headline
from snpatch.experiments.common.sweep_plots import plot_over_refusal, plot_scores
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.window import Window
from snpatch.report.formatting import (
    describe_score,
    format_p_value,
    format_percent,
    format_value,
    format_with_interval,
)
from snpatch.report.report import Report, TableView
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.rows import Row
from snpatch.sweeps.store import describe_unfinished
from snpatch.sweeps.sweep import SweepResult

MAX_FAILURES = 10  # named in the notes


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
            if not part.is_reported(judge):
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


def _build_table(result: SweepResult, judge: str, label: str) -> TableView:
    """Build the on-screen table of one judge, set, donor and strength, without the random controls.

    Five columns, so that it fits a terminal of 100 characters; the report's file has all columns.
    """
    rows = [row for row in result.rows if row.judge == judge and row.control is None]
    certainty = f"{result.config.confidence:.0%} CI"
    columns = {
        "recipient": lambda row: row.recipient,
        "neurons (of all)": lambda row: _describe_window(row, len(result.rankings) > 1),
        "mean": lambda row: format_value(row.mean),
        f"effect {certainty}": lambda row: _format_effect(row),
        "q vs random": lambda row: format_p_value(row.q_vs_random),
    }
    if any(row.broken for row in rows):
        columns["broken"] = lambda row: "" if row.broken is None else f"{row.broken:.0%}"
    if result.config.harmless:
        columns["refuses"] = lambda row: "" if row.harmless_refused is None else f"{row.harmless_refused:.0%}"
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


def _describe_failures(result: SweepResult) -> list[str]:
    """Return the number of missing completions, the first failures, and the number of failures."""
    lines = [*filter(None, [describe_unfinished(result.records)])]
    lines += [f"failed: {failure}" for failure in result.failures[:MAX_FAILURES]]
    if len(result.failures) > MAX_FAILURES:
        lines.append(f"... {len(result.failures)} in all")
    return lines
