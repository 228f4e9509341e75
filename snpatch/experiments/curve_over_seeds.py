"""Curve over seeds: the curve of every training seed, with intervals over seeds (the paper's Figure 2).

Why not over prompts: prompts say how well one pair's effect is known, and seeds how far it holds for another training.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.config import PAPER_K
from snpatch.experiments.context import ExperimentContext
from snpatch.report.formatting import (
    format_interval,
    format_p_value,
    format_percent,
    format_with_interval,
    to_plot_label,
)
from snpatch.report.report import Report, Row, TableView
from snpatch.significance import paired_p
from snpatch.statistics import UNDEFINED, Interval, effect_over_seeds
from snpatch.sweeps.sweep import SweepResult


@dataclass(frozen=True)
class CurveOverSeedsSettings(SweepSettings):
    """Settings of the curve over seeds.

    Args:
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        extra_controls: See SweepConfig.
    """

    prompts: str = ""
    k: tuple[int | float, ...] = PAPER_K
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: CurveOverSeedsSettings) -> Report:
    """Sweep k for the pair of each training seed, and average over seeds."""
    config = context.config
    prompts = settings.prompts or config.benchmarks[0]
    seed_models = {contrast.recipient for contrast in config.seeds.values()}
    shared_recipients = tuple(name for name in config.recipients if name not in seed_models)
    runs, records, notes = [], [], []
    for seed, contrast in config.seeds.items():
        ranking = context.ranking(contrast)
        sweep_config = replace(
            build_sweep_config(context, settings, context.top_windows(settings.k, ranking)),
            recipients=(contrast.recipient, *shared_recipients),
            donors=(contrast.donor,),
        )
        name = f"curve_over_seeds of {contrast.donor}"
        result = context.sweep(name, prompts, {"safety": ranking}, context.cost, sweep_config)
        roles = {contrast.recipient: config.safety.recipient}
        runs += _collect_runs(result, seed, roles)
        records += [{"seed": seed, **record} for record in result.records]
        notes += result.notes
    rows = average_over_seeds(runs, settings.confidence)
    certainty = f"{settings.confidence:.0%} CI"
    columns = {
        "recipient": "recipient",
        "k": "k",
        f"mean cost {certainty} over seeds": lambda row: format_with_interval(row, "mean"),
        f"effect {certainty} over seeds": lambda row: format_with_interval(row, "effect", format_percent),
        "random": lambda row: "" if row["random_effect"] is None else format_percent(row["random_effect"]),
        "p vs random": lambda row: format_p_value(row["p_vs_random"]),
    }
    return Report(
        "curve_over_seeds",
        {"curve_over_seeds": rows, "curve_over_seeds-runs": runs},
        {"curve_over_seeds": _plot(rows)},
        (TableView.from_rows(rows, columns),),
        _build_headline(rows, settings.confidence),
        records=records,
        notes=list(dict.fromkeys(notes)),
    )


def _collect_runs(result: SweepResult, seed: str, roles: dict[str, str]) -> list[Row]:
    """Return one row per recipient and k of a seed. roles: model of the seed -> its name in the table."""
    runs = []
    for row in result.rows:
        if row.ranking is None or row.control is not None:
            continue
        effects = [control.effect for control in result.controls(row) if control.effect is not None]
        figures = {key: asdict(row)[key] for key in ("neuron_fraction", "mean", "effect", "p_vs_unpatched")}
        runs.append(
            {
                "seed": seed,
                "recipient": roles.get(row.recipient, row.recipient),
                "model": row.recipient,
                "donor": row.donor,
                "k": row.rank_hi,
                **figures,
                "random_effect": float(np.mean(effects)) if effects else None,
            }
        )
    return runs


def average_over_seeds(runs: Sequence[Row], confidence: float) -> list[Row]:
    """Average the runs of all seeds by recipient and k.

    Args:
        runs: Rows with seed, recipient, k, neuron_fraction, mean, effect and random_effect.
        confidence: Level of the t-intervals, which have one degree of freedom less than seeds.

    Returns:
        One row per recipient and k. `p_vs_random` is of the paired t-test of the seeds' effects against those of their
        random neurons. A figure that a seed lacks is None.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["recipient"], run["k"]), []).append(run)
    rows = []
    for (recipient, k), group in groups.items():
        effects, random_effects = ([run[name] for run in group] for name in ("effect", "random_effect"))
        is_tested = None not in effects and None not in random_effects
        rows.append(
            {
                "recipient": recipient,
                "k": k,
                "neuron_fraction": group[0]["neuron_fraction"],
                "seeds": len(group),
                **_average([run["mean"] for run in group], confidence).columns("mean"),
                **_average(effects, confidence).columns("effect"),
                **_average(random_effects, confidence).columns("random_effect"),
                "p_vs_random": paired_p(effects, random_effects) if is_tested else None,
            }
        )
    return rows


def _average(values: Sequence[float | None], confidence: float) -> Interval:
    """Return the mean and its t-interval; without bounds for one value, undefined if one is missing."""
    defined = [value for value in values if value is not None]
    if not defined or len(defined) < len(values):
        return UNDEFINED
    return effect_over_seeds(defined, confidence=confidence)


def _build_headline(rows: Sequence[Row], confidence: float) -> list[str]:
    """Write one sentence per recipient: the effect at the largest k."""
    sentences = []
    for recipient in dict.fromkeys(row["recipient"] for row in rows):
        row = max((row for row in rows if row["recipient"] == recipient), key=lambda row: row["k"])
        bounds = format_interval(row, "effect", format_percent)
        certainty = f" ({confidence:.0%} CI over {row['seeds']} seeds {bounds})" if bounds else ""
        random = "" if row["random_effect"] is None else f"; random neurons: {format_percent(row['random_effect'])}"
        sentences.append(
            f"{recipient}: the top {row['k']} neurons of each seed's ranking ({row['neuron_fraction']:.1%}) have an "
            f"effect of {format_percent(row['effect'])}{certainty}{random}."
        )
    return sentences


def _plot(rows: Sequence[Row]) -> Figure:
    """Plot the mean cost against k, with error bars over seeds."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, recipient in enumerate(dict.fromkeys(row["recipient"] for row in rows)):
        line = [row for row in rows if row["recipient"] == recipient and row["mean"] is not None]
        for name, style in (("effect", "o-"), ("random_effect", "x:")):
            points = [row for row in line if row[name] is not None]
            values = [row[name] for row in points]
            errors = [0.0 if row[f"{name}_high"] is None else row[f"{name}_high"] - row[name] for row in points]
            label = to_plot_label(f"{recipient}, {'safety' if name == 'effect' else 'random'} neurons")
            x = [row["k"] for row in points]
            axis.errorbar(x, values, errors, fmt=style, color=f"C{number}", markersize=4, capsize=3, label=label)
    axis.set(xlabel="patched neurons (k)", ylabel="effect (Eq. 4), mean over training seeds")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
