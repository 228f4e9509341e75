"""Transfer: neurons found on one prompt set, patched on every benchmark (the paper's Table 1 and Eq. 4)."""

from dataclasses import asdict, dataclass

from matplotlib.figure import Figure

from snpatch.experiments.common.sweep_headline import describe_neurons
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.context import ExperimentContext
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import describe_score, format_percent, format_range, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.sweeps.sweep import SweepResult


@dataclass(frozen=True)
class TransferSettings(SweepSettings):
    """Settings of the transfer.

    Args:
        k: Number of neurons: an int, or a fraction of the ranked neurons.
        benchmarks: Prompt sets; empty for the config's benchmarks.
        text: Text of the perplexity, see PerplexitySettings; empty to leave the perplexity out.
        window: See PerplexitySettings.
        controls: Random controls.
        extra_controls: See SweepConfig.
    """

    k: int | float = 20_000
    benchmarks: tuple[str, ...] = ()
    text: str = "text"
    window: int = 4096
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: TransferSettings) -> Report:
    """Patch the same neurons on every benchmark."""
    ranking = context.ranking()
    k = context.num_neurons(settings.k, ranking)
    config = build_sweep_config(context, settings, (k,))
    benchmarks = settings.benchmarks or context.config.benchmarks
    perplexities = _measure_perplexities(context, settings, ranking, k) if settings.text else None
    results = {name: context.sweep("transfer", name, {"safety": ranking}, context.cost, config) for name in benchmarks}
    rows: list[Row] = [{"benchmark": name, **asdict(row)} for name, result in results.items() for row in result.rows]
    table = _build_published_table(context, results)
    if perplexities:
        table = [row | {"perplexity": ppl} for row, ppl in zip(table, perplexities, strict=True)]
    title = f"mean {describe_score(context.config.cost)}; + = patched with {k} neurons"
    display = TableView.from_rows(table, {name: name for name in table[0]}, title)
    records = [{"benchmark": name, **record} for name, result in results.items() for record in result.records]
    return Report(
        "transfer",
        {"transfer": rows, "transfer-table": table},
        {"transfer": _plot(table, results)},
        (display,),
        [_describe_recipient(context, results, recipient) for recipient in context.config.recipients],
        records=records,
        notes=[*dict.fromkeys(note for result in results.values() for note in result.notes)],
    )


def _describe_recipient(context: ExperimentContext, results: dict[str, SweepResult], recipient: str) -> str:
    """Write the sentence of a recipient: its effects, and benchmarks without an established gap."""
    cost, donor = context.config.cost, context.config.donor
    rows = {name: result.line(cost, recipient, "safety")[0] for name, result in results.items()}
    effects = [row.effect for row in rows.values() if row.effect is not None]
    gaps = [row.gap for row in rows.values() if row.effect is not None and row.gap is not None]
    unknown = [name for name, row in rows.items() if row.effect is None]
    sentence = f"{recipient}: {describe_neurons(next(iter(rows.values())))} move the mean {cost} "
    if effects:
        sentence += (
            f"{format_range(effects, format_percent)} of the way to {donor} on {len(effects)} benchmarks (gap "
            f"{format_range(gaps)})"
        )
    if unknown:
        joint = "; " if effects else "by an unknown share: "
        sentence += f"{joint}the gap to {donor} is not established on {', '.join(unknown)}"
    return f"{sentence}."


def _build_published_table(context: ExperimentContext, results: dict[str, SweepResult]) -> list[Row]:
    """Return one row per model, patched ("+") or not, as in Table 1.

    A row has the mean cost and the effect on each benchmark.
    """
    table = []
    cost = context.config.cost
    for recipient in context.config.recipients:
        unpatched = {name: result.baseline(recipient, cost).mean for name, result in results.items()}
        patched = {name: result.line(cost, recipient, "safety")[0] for name, result in results.items()}
        table.append({"model": recipient, **unpatched, **dict.fromkeys((f"effect on {n}" for n in results), None)})
        effects = {f"effect on {name}": row.effect for name, row in patched.items()}
        table.append({"model": f"{recipient}+", **{name: row.mean for name, row in patched.items()}, **effects})
    donor = {name: result.baseline(context.config.donor, cost).mean for name, result in results.items()}
    table.append({"model": context.config.donor, **donor, **dict.fromkeys((f"effect on {n}" for n in results), None)})
    return table


def _measure_perplexities(
    context: ExperimentContext, settings: TransferSettings, ranking: Ranking, k: int
) -> list[float]:
    """Measure the published window-mean perplexity of each row of the table."""
    patches: list[Patch | str] = []
    for recipient in context.config.recipients:
        patches += [recipient, Patch(recipient, context.config.donor, ranking, k, settings.positions)]
    results = context.perplexity(settings.text, [*patches, context.config.donor], settings.window)
    return [result.window_mean for result in results]


def _plot(table: list[dict], results: dict[str, SweepResult]) -> Figure:
    figure = Figure(figsize=(2 + 2 * len(results), 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(table)
    for number, row in enumerate(table):
        places = [i + (number - (len(table) - 1) / 2) * width for i in range(len(results))]
        hatch = "//" if row["model"].endswith("+") else None
        model = to_plot_label(row["model"])
        axis.bar(places, [row[name] for name in results], width, label=model, hatch=hatch, edgecolor="white")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(results)), list(map(to_plot_label, results)))
    axis.set_ylabel("mean cost (lower is safer)")
    axis.legend(fontsize=8)
    return figure
