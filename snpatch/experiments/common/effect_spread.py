"""Spread of effects: the top neurons of several rankings patched into the same models on the same prompts.

Why the main pair runs all of them: only the neurons differ, so a difference of effects is one of the rankings.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config, build_sweep_report
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_interval, format_percent, format_range, format_value, format_with_interval
from snpatch.report.report import Report, Row, TableView


@dataclass(frozen=True)
class EffectSettings(SweepSettings):
    """Settings of the patches of several rankings.

    Args:
        effect_k: Numbers of first neurons of each ranking to patch: ints, or fractions of the ranked neurons.
        prompts: Prompt set of the experiment config to patch on; empty for its first benchmark.
        controls: Random controls of each patch.
        extra_controls: See SweepConfig.
    """

    effect_k: tuple[int | float, ...] = (20_000,)
    prompts: str = ""
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def build_effect_report(
    context: ExperimentContext, name: str, rankings: Mapping[str, Ranking], settings: EffectSettings
) -> Report:
    """Patch the first neurons of each ranking and report the effects and their spread.

    Args:
        context: The experiment config, whose recipients are patched from its donor.
        name: Name of the experiment.
        rankings: Rankings by name.
        settings: The settings.

    Returns:
        A report with the tables `{name}-effects` (rows of the sweep) and `{name}-spread`.
    """
    first_name, first_ranking = next(iter(rankings.items()))
    config = build_sweep_config(context, settings, context.top_windows(settings.effect_k, first_ranking))
    prompts = settings.prompts or context.config.benchmarks[0]
    result = context.sweep(name, prompts, dict(rankings), context.cost, config)
    report = build_sweep_report(result, f"{name}-effects")
    patched = [asdict(row) for row in result.rows if row.ranking is not None and row.control is None]
    rows = summarize_effects(patched)

    def format_overlap(row: Row) -> str:
        return format_value(rankings[row["ranking"]].overlap(first_ranking, row["rank_hi"])) if row["rank_hi"] else ""

    columns = {
        "recipient": "recipient",
        "ranking": "ranking",
        "k": "rank_hi",
        "mean cost": "mean",
        f"effect {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "effect", format_percent),
        f"overlap with {first_name}": format_overlap,
    }
    return Report(
        name,
        report.tables | {f"{name}-spread": rows},
        report.plots,
        (TableView.from_rows(patched, columns, f"effects on {prompts}"),),
        [_describe_spread(row, patched, context.config.donor) for row in rows if row["k"]],
        records=result.records,
        notes=report.notes,
    )


def summarize_effects(rows: list[Row]) -> list[Row]:
    """Summarize the effects of several rankings at each recipient and k.

    Args:
        rows: Rows of a sweep, one per recipient, ranking and k.

    Returns:
        One row per recipient and k: rankings (the number with a defined effect), mean, unbiased standard deviation
        (None for one ranking), smallest and largest effect.
    """
    summaries = []
    for recipient, k in dict.fromkeys((row["recipient"], row["rank_hi"]) for row in rows):
        effects = [row["effect"] for row in rows if (row["recipient"], row["rank_hi"]) == (recipient, k)]
        defined = [effect for effect in effects if effect is not None]
        summaries.append(
            {
                "recipient": recipient,
                "k": k,
                "rankings": len(defined),
                "effect_mean": float(np.mean(defined)) if defined else None,
                "effect_std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
                "effect_min": min(defined, default=None),
                "effect_max": max(defined, default=None),
            }
        )
    return summaries


def _describe_spread(summary: Row, rows: list[Row], donor: str) -> str:
    recipient, k = summary["recipient"], summary["k"]
    if summary["effect_mean"] is None:
        return f"{recipient}: the effect of the first {k} neurons from {donor} is undefined for every ranking."
    effects = [
        f"{row['ranking']} {format_percent(row['effect'])}"
        + (f" [{bounds}]" if (bounds := format_interval(row, "effect", format_percent)) else "")
        for row in rows
        if (row["recipient"], row["rank_hi"]) == (recipient, k)
    ]
    spread = format_range([summary["effect_min"], summary["effect_max"]], format_percent)
    return (
        f"{recipient}: the first {k} neurons of {summary['rankings']} rankings, patched from {donor}, have an effect "
        f"of {spread}, mean {format_percent(summary['effect_mean'])} ({'; '.join(effects)})."
    )
