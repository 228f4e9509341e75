"""Alignment tax: two objectives share neurons but need different activations of them (paper, section 2).

Patches each objective's model from the other's on the neurons that both objectives' top k share, and measures cost and
reward before and after.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError, unknown_name
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.report.formatting import describe_score, format_p_value, format_with_interval, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.significance import paired_p
from snpatch.statistics import interval
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep import SweepResult


@dataclass(frozen=True)
class AlignmentTaxSettings:
    """Settings of the alignment tax.

    Args:
        objectives: Names of two contrasts of the experiment config.
        k: Top neurons whose intersection is patched: an int, or a fraction of the ranked neurons.
        prompts: Prompt sets; empty for the first benchmark and "helpful".
        judges: Names of the config's judges; empty for all.
        controls: Random controls.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    objectives: tuple[str, str] = ("safety", "helpful")
    k: int | float = 20_000
    prompts: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    controls: int = SweepConfig.controls
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


def run(context: ExperimentContext, settings: AlignmentTaxSettings) -> Report:
    """Patch in both directions on the shared neurons, with random controls of the same size."""
    contrasts = []
    for name in settings.objectives:
        if name not in context.config.contrasts:
            raise unknown_name("alignment_tax: contrast", name, context.config.contrasts)
        contrasts.append(context.config.contrasts[name])
    first, second = (context.ranking(contrast) for contrast in contrasts)
    k = context.num_neurons(settings.k, first)
    shared = intersect_top(first, second, k)
    judges = {name: context.judge(name) for name in settings.judges or context.config.judges}
    sets = settings.prompts or (context.config.benchmarks[0], "helpful")
    for name in sets:  # raises before anything is generated
        context.data(name)
    rows, records, notes = [], [], []
    for recipient, donor in (
        (contrasts[0].donor, contrasts[1].donor),
        (contrasts[1].donor, contrasts[0].donor),
    ):
        config = SweepConfig(
            (recipient,),
            (donor,),
            (Window(0, len(shared)),),
            controls=settings.controls,
            sampling=context.sampling,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        for prompts in sets:
            result = context.sweep(f"alignment_tax of {donor}", prompts, {"shared": shared}, judges, config)
            rows += _compare_scores(result, prompts, settings)
            notes += result.notes
            records += [{**record, "donor": donor} for record in result.records]
    columns = {
        "patched": lambda row: f"{row['donor']} -> {row['recipient']}",
        "set": "set",
        "judge": "judge",
        "before": "before",
        f"change {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "change"),
        "p": lambda row: format_p_value(row["p"]),
    }
    return Report(
        "alignment_tax",
        {"alignment_tax": rows},
        {"alignment_tax": _plot(rows)},
        (TableView.from_rows(rows, columns),),
        _build_headline(rows, k),
        records=records,
        notes=[*dict.fromkeys(notes)],
    )


def intersect_top(first: Ranking, second: Ranking, k: int) -> Ranking:
    """Return the neurons in the top k of both rankings, in the first ranking's order."""
    common = first.intersect(second, k)
    n = round(first.overlap(second, k) * k)
    if not n:
        raise SnpatchError(f"alignment_tax: no neuron is in the top {k} of both objectives. Use a larger k.")
    return Ranking.from_order(common.top(n), first.shape, meta={"shared_by_top": k})


def _compare_scores(result: SweepResult, prompts: str, settings: AlignmentTaxSettings) -> list[dict]:
    """Return one row per judge: mean score before and after, and the change, paired over prompts."""
    (recipient,), donor = result.config.recipients, result.donor
    rows = []
    for judge in result.judges:
        before, after = (_collect_scores(result, judge, recipient, ranking) for ranking in (None, "shared"))
        change = interval(
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            after,
            before,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        (patched,) = result.line(judge, recipient, "shared")
        random_changes = [control.mean - before.mean() for control in result.controls(patched)]
        rows.append(
            {
                "donor": donor,
                "recipient": recipient,
                "set": prompts,
                "judge": judge,
                "k": patched.rank_hi,
                "before": before.mean(),
                "after": after.mean(),
                **change.columns("change"),
                "p": paired_p(after, before),
                "donor_mean": result.baseline(donor, judge).mean,
                "random_change": float(np.mean(random_changes)) if random_changes else None,
            }
        )
    return rows


def _collect_scores(result: SweepResult, judge: str, recipient: str, ranking: str | None) -> np.ndarray:
    key = recipient, ranking, None
    records = [r for r in result.records if (r["recipient"], r["ranking"], r["control"]) == key]
    return np.array([record["scores"][judge] for record in records])


def _build_headline(rows: list[dict], k: int) -> list[str]:
    """Write one sentence per direction: the change of each judge's mean on each set."""
    sentences = []
    for donor, recipient in dict.fromkeys((row["donor"], row["recipient"]) for row in rows):
        group = [row for row in rows if (row["donor"], row["recipient"]) == (donor, recipient)]
        changes = ", ".join(f"{row['judge']} {row['change']:+.2f} on {row['set']}" for row in group)
        sentences.append(f"{donor} into {recipient} on the {group[0]['k']} neurons of both top {k}: {changes}.")
    return sentences


def _plot(rows: list[dict]) -> Figure:
    """Plot the change of each judge's mean, by set and direction."""
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    figure = Figure(figsize=(5.5 * len(judges), 4), layout="constrained")
    for axis, judge in zip(figure.subplots(1, len(judges), squeeze=False)[0], judges, strict=True):
        judge_rows = [row for row in rows if row["judge"] == judge]
        directions = [to_plot_label(f"{row['donor']} -> {row['recipient']}") for row in judge_rows]
        set_names = [to_plot_label(row["set"]) for row in judge_rows]
        labels = [f"{direction}\non {name}" for direction, name in zip(directions, set_names, strict=True)]
        errors = [
            [row["change"] - row["change_low"] for row in judge_rows],
            [row["change_high"] - row["change"] for row in judge_rows],
        ]
        axis.barh(labels, [row["change"] for row in judge_rows], xerr=errors, color="tab:blue", alpha=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(to_plot_label(f"change of mean {describe_score(judge)}"))
        axis.invert_yaxis()
    return figure
