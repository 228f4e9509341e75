"""Competition: a model of one objective, patched from a model that was trained on two (the paper's E.4).

The neurons are the recipient's own, so the patch shows whether they can also serve the donor's other objective.
"""

from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.context import ExperimentContext
from snpatch.report.formatting import describe_score, format_percent, format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.sweeps.sweep import SweepResult
from snpatch.utils.optional import require


@dataclass(frozen=True)
class CompetitionSettings(SweepSettings):
    """Settings of the competition.

    Args:
        recipient: Name of the contrast whose donor is patched, on the contrast's own top neurons.
        donor: Name of the contrast whose donor is copied from.
        k: Number of neurons: an int, or a fraction of the ranked neurons.
        benchmarks: Prompt sets; empty for the config's benchmarks.
        extra_controls: See SweepConfig.
    """

    recipient: str = "helpful"
    donor: str = "harmless-helpful"
    k: int | float = 20_000
    benchmarks: tuple[str, ...] = ()
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: CompetitionSettings) -> Report:
    """Patch the model of one objective from that of both, on every benchmark."""
    contrasts = context.config.contrasts
    recipient, donor = contrasts[settings.recipient].donor, contrasts[settings.donor].donor
    ranking = context.ranking(contrasts[settings.recipient])
    k = context.num_neurons(settings.k, ranking)
    config = replace(build_sweep_config(context, settings, (k,)), recipients=(recipient,), donors=(donor,))
    benchmarks = settings.benchmarks or context.config.benchmarks
    results = {
        name: context.sweep(f"competition of {donor}", name, {settings.recipient: ranking}, context.cost, config)
        for name in benchmarks
    }
    rows = [
        _build_row(context.config.cost, name, result, recipient, settings.recipient) for name, result in results.items()
    ]
    certainty = f"{settings.confidence:.0%} CI"
    columns = {
        "set": "set",
        recipient: "recipient_mean",
        f"patched {certainty}": lambda row: format_with_interval(row, "patched"),
        donor: "donor_mean",
        f"effect {certainty}": lambda row: format_with_interval(row, "effect", format_percent),
    }
    changes = "; ".join(
        f"{row['recipient_mean']:.2f} to {row['patched']:.2f} on {row['set']} ({donor}: {row['donor_mean']:.2f})"
        for row in rows
    )
    return Report(
        "competition",
        {"competition": rows},
        {"competition": _plot(rows, recipient, donor, context.config.cost)},
        (TableView.from_rows(rows, columns, f"mean {describe_score(context.config.cost)}"),),
        [f"{recipient} patched from {donor} on its own top {k} neurons: mean {context.config.cost} {changes}."],
        records=[{"benchmark": name, **record} for name, result in results.items() for record in result.records],
        notes=list(dict.fromkeys(note for result in results.values() for note in result.notes)),
    )


def _build_row(judge: str, name: str, result: SweepResult, recipient: str, ranking: str) -> Row:
    """Return a benchmark's row: the means of the three models, the effect, and the random controls."""
    (patched,) = result.line(judge, recipient, ranking)
    control_means = [require(control.mean) for control in result.controls(patched)]
    return {
        "set": name,
        "recipient": recipient,
        "donor": result.donor,
        "k": patched.rank_hi,
        "recipient_mean": result.baseline(recipient, judge).mean,
        "patched": patched.mean,
        "patched_low": patched.mean_low,
        "patched_high": patched.mean_high,
        "donor_mean": result.baseline(result.donor, judge).mean,
        "effect": patched.effect,
        "effect_low": patched.effect_low,
        "effect_high": patched.effect_high,
        "random_mean": sum(control_means) / len(control_means) if control_means else None,
    }


def _plot(rows: list[Row], recipient: str, donor: str, judge: str) -> Figure:
    figure = Figure(figsize=(2 + 2 * len(rows), 4.2), layout="constrained")
    axis = figure.subplots()
    bars = ((recipient, "recipient_mean"), (f"{recipient}, patched", "patched"), (donor, "donor_mean"))
    for number, (label, key) in enumerate(bars):
        places = [i + (number - 1) * 0.27 for i in range(len(rows))]
        axis.bar(places, [row[key] for row in rows], 0.27, label=to_plot_label(label))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [to_plot_label(row["set"]) for row in rows])
    axis.set_ylabel(to_plot_label(f"mean {describe_score(judge)}"))
    axis.legend(fontsize=8)
    return figure
