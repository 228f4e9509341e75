"""Necessity: what is left without the top neurons, what they take from the donor, and what their factors alone do.

A curve shows whether the top neurons suffice. Here all other ranked neurons are patched (the complement), the
recipient's values are patched into the donor (the reverse), and, for IA3 pairs, the donor's factors are set on the top
neurons without any donor during generation (the masked adapter).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.report.formatting import describe_score, format_percent, format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import causal_effect

TOP, COMPLEMENT, REVERSE, MASKED = KINDS = ("top k", "all but the top k", "reverse", "masked adapter")
COLUMNS = ("mean", "effect", "effect_low", "effect_high", "broken", "effect_coherent", "prompts")


@dataclass(frozen=True)
class NecessitySettings(SweepSettings):
    """Settings of necessity.

    Args:
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        controls: Random controls.
        extra_controls: See SweepConfig.
    """

    prompts: str = ""
    k: tuple[int | float, ...] = (2_000, 20_000)
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: NecessitySettings) -> Report:
    """Patch the top k, their complement and the reverse, and set the donor's factors on the top k."""
    ranking, donor, recipients = context.ranking(), context.config.donor, context.config.recipients
    prompts = settings.prompts or context.config.benchmarks[0]
    windows = [window for window in context.top_windows(settings.k, ranking) if 0 < len(window) < len(ranking)]
    if not windows:
        raise SnpatchError(f"necessity: k: expected a number between 0 and {len(ranking)} neurons, got {settings.k}")
    complements = [Window(window.hi, len(ranking)) for window in windows]
    sweeps = {
        "necessity": build_sweep_config(context, settings, [*windows, *complements]),
        "necessity-reverse": build_sweep_config(context, settings, windows, recipients=(donor,), donors=recipients),
    }
    results = [
        context.sweep(name, prompts, {"safety": ranking}, context.cost, config) for name, config in sweeps.items()
    ]
    rows: list[Row] = []
    for row in (row for result in results for row in result.rows):
        if row.ranking is not None and row.control is None and row.set == prompts and row.judge == context.config.cost:
            kind = REVERSE if row.recipient == donor else COMPLEMENT if row.rank_lo else TOP
            figures = {name: getattr(row, name) for name in COLUMNS}
            k = row.rank_lo or row.rank_hi
            rows.append({"patch": kind, "recipient": row.recipient, "donor": row.donor, "k": k, **figures})
    masked_rows, notes = _measure_masked_adapters(context, settings, ranking, windows, prompts)
    rows = sorted([*rows, *masked_rows], key=lambda row: (_recipient(row, donor), row["k"], KINDS.index(row["patch"])))
    columns = {
        "recipient": "recipient",
        "donor": "donor",
        "k": "k",
        "patch": "patch",
        f"mean {describe_score(context.config.cost)}": "mean",
        f"effect {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "effect", format_percent),
        "broken": lambda row: "" if row["broken"] is None else format_percent(row["broken"]),
    }
    notes += [note for result in results for note in result.notes]
    return Report(
        "necessity",
        {"necessity": rows},
        {"necessity": _plot(rows, recipients, donor)},
        (TableView.from_rows(rows, columns),),
        [_describe(rows, recipient, donor) for recipient in recipients],
        records=[record for result in results for record in result.records],
        notes=list(dict.fromkeys(notes)),
    )


def _recipient(row: Row, donor: str) -> str:
    """Return the config's recipient that a row is about; a reverse patch takes its values."""
    return str(row["donor"] if row["recipient"] == donor else row["recipient"])


def _measure_masked_adapters(
    context: ExperimentContext, settings: NecessitySettings, ranking: Ranking, windows: Sequence[Window], prompts: str
) -> tuple[list[Row], list[str]]:
    """Return a row for each recipient and window, and why a recipient has none."""
    donor, cost, engine = context.config.donor, context.config.cost, context.engine
    rows: list[Row] = []
    notes = []
    for recipient in context.config.recipients:
        names = {window: f"{recipient} with factors of {donor} on {window.hi} neurons" for window in windows}
        try:
            for window, name in names.items():
                if name not in engine.models:
                    engine.add_masked_adapter(name, recipient, donor, ranking, window)
        except SnpatchError as error:
            notes.append(f"{recipient}: no masked adapter: {error}")
            continue
        recipient_scores, donor_scores, *scores = context.score([recipient, donor, *names.values()], prompts, cost)
        for window, patched in zip(windows, scores, strict=True):
            effect = causal_effect(patched, recipient_scores, donor_scores, confidence=settings.confidence)
            figures = {**dict.fromkeys(COLUMNS), "mean": float(np.mean(patched)), **effect.columns("effect")}
            labels = {"patch": MASKED, "recipient": recipient, "donor": donor, "k": window.hi}
            rows.append({**labels, **figures, "prompts": len(patched)})
    return rows, notes


def _describe(rows: Sequence[Row], recipient: str, donor: str) -> str:
    """Write the sentence of a recipient at the largest k."""
    k = max(row["k"] for row in rows)
    effects = {row["patch"]: row for row in rows if row["k"] == k and _recipient(row, donor) == recipient}
    reverse = effects[REVERSE]
    parts = [f"{kind} {_format_effect(effects[kind])}" for kind in (TOP, COMPLEMENT, MASKED) if kind in effects]
    return (
        f"{recipient}, k = {k}: effect of the {', of '.join(parts)}; the reverse patch takes "
        f"{_format_effect(reverse)} of {donor}'s difference away."
    )


def _format_effect(row: Row) -> str:
    return "not established" if row["effect"] is None else format_with_interval(row, "effect", format_percent)


def _plot(rows: Sequence[Row], recipients: Sequence[str], donor: str) -> Figure:
    figure = Figure(figsize=(5 * len(recipients), 4.2), layout="constrained")
    axes = figure.subplots(1, len(recipients), sharey=True, squeeze=False)
    for axis, recipient in zip(axes[0], recipients, strict=True):
        for number, kind in enumerate(KINDS):
            line = [row for row in rows if row["patch"] == kind and _recipient(row, donor) == recipient]
            line = [row for row in line if row["effect"] is not None]
            if not line:
                continue
            x, effects = [row["k"] for row in line], [row["effect"] for row in line]
            errors = [
                [row["effect"] - row["effect_low"] for row in line],
                [row["effect_high"] - row["effect"] for row in line],
            ]
            axis.errorbar(x, effects, errors, fmt="o-", capsize=3, color=f"C{number}", label=kind)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=to_plot_label(recipient), xlabel="k", ylabel="effect")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure
