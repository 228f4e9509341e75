"""Effects of several rankings side by side: what the top neurons of each do on the same prompts.

`model_pairs` and `specificity` share this module: they rank the same neurons in several ways and patch the first k of
each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure

from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_percent, format_value, format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.sweeps.sweep import SweepResult
from snpatch.utils.optional import require


def build_effects_report(
    context: ExperimentContext, name: str, result: SweepResult, rankings: Mapping[str, Ranking], reference: Ranking
) -> Report:
    """Build the report of a sweep over several rankings.

    Args:
        context: Open experiment config.
        name: Name of the experiment and of its table.
        result: A sweep of the rankings over one prompt set, judged by the cost.
        rankings: Rankings by name, as in the sweep.
        reference: Ranking that each is compared with, by the overlap of the top k.

    Returns:
        The report, with one row per ranking, k and recipient.
    """
    rows = [
        {
            "ranking": row.ranking,
            "recipient": row.recipient,
            "k": row.rank_hi,
            **{key: asdict(row)[key] for key in ("set", "mean", "mean_low", "mean_high")},
            **{key: asdict(row)[key] for key in ("effect", "effect_low", "effect_high")},
            "random_effect": _mean_effect(result, row),
            "overlap": rankings[row.ranking].overlap(reference, row.rank_hi) if row.rank_hi else None,
        }
        for row in result.rows
        if row.ranking is not None and row.control is None
    ]
    certainty = f"{result.config.confidence:.0%} CI"
    columns = {
        "neurons of": "ranking",
        "recipient": "recipient",
        "k": "k",
        f"mean cost {certainty}": lambda row: format_with_interval(row, "mean"),
        f"effect {certainty}": lambda row: format_with_interval(row, "effect", format_percent),
        "overlap": lambda row: format_value(row["overlap"]),
    }
    gaps = {recipient: _gap(context, result, recipient) for recipient in context.config.recipients}
    return Report(
        name,
        {name: rows},
        {name: _plot(rows, list(rankings), context.config.recipients)},
        (TableView.from_rows(rows, columns),),
        [_describe_recipient(rows, recipient, context.config.donor, gap) for recipient, gap in gaps.items()],
        records=result.records,
        notes=result.notes,
    )


def _mean_effect(result: SweepResult, row) -> float | None:
    """Return the mean effect of a row's random controls; None without any."""
    effects = [control.effect for control in result.controls(row) if control.effect is not None]
    return float(np.mean(effects)) if effects else None


def _gap(context: ExperimentContext, result: SweepResult, recipient: str) -> float:
    """Return how much less the donor costs than the recipient."""
    models = (recipient, context.config.donor)
    recipient_mean, donor_mean = (require(result.baseline(model, context.config.cost).mean) for model in models)
    return recipient_mean - donor_mean


def _describe_recipient(rows: Sequence[Row], recipient: str, donor: str, gap: float) -> str:
    """Write a recipient's effects at the largest k, best first."""
    k = max(row["k"] for row in rows)
    group = [row for row in rows if (row["recipient"], row["k"]) == (recipient, k) and row["effect"] is not None]
    ordered = sorted(group, key=lambda row: -row["effect"])
    effects = ", ".join(f"{row['ranking']} {format_percent(row['effect'])}" for row in ordered)
    way = f"the safety gain of {donor}" if gap > 0 else f"the way to {donor}, which costs {-gap:.2f} more,"
    return f"{recipient}: share of {way} that the top {k} neurons recover: {effects or 'undefined'}."


def _plot(rows: Sequence[Row], rankings: Sequence[str], recipients: Sequence[str]) -> Figure:
    """Plot the effect against k of each ranking, or bars if there is one k."""
    figure = Figure(figsize=(6 * len(recipients), 1.5 + 0.45 * len(rankings) + 2), layout="constrained")
    for axis, recipient in zip(figure.subplots(1, len(recipients), squeeze=False)[0], recipients, strict=True):
        for number, ranking in enumerate(rankings):
            line = [row for row in rows if (row["recipient"], row["ranking"]) == (recipient, ranking)]
            line = [row for row in line if row["effect"] is not None]
            if not line:
                continue
            values = np.array([row["effect"] for row in line])
            errors = np.abs([[row[f"effect_{end}"] for row in line] for end in ("low", "high")] - values)
            x = [row["k"] for row in line] if len({row["k"] for row in rows}) > 1 else [number]
            axis.errorbar(x, values, errors, fmt="o-", markersize=4, capsize=3, label=to_plot_label(ranking))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=to_plot_label(f"{recipient}, patched"), ylabel="effect (Eq. 4)")
        if len({row["k"] for row in rows}) > 1:
            axis.set_xlabel("patched neurons (k)")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        else:
            axis.set_xticks(range(len(rankings)), list(map(to_plot_label, rankings)), rotation=30, ha="right")
        axis.grid(alpha=0.3)
    return figure
