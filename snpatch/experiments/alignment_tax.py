"""Alignment tax: two objectives share neurons but need different activations of them (the paper's Table 3).

The models of two objectives patch each other on the neurons that two other objectives share, because neurons of the
patched models themselves would be chosen for the change that is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.report.formatting import (
    describe_score,
    format_interval,
    format_p_value,
    format_with_interval,
    to_plot_label,
)
from snpatch.report.report import Report, Row, TableView
from snpatch.significance import paired_p
from snpatch.statistics import UNDEFINED, Interval, interval
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep import SweepResult

MEANINGS = {"cost": ("less safe", "safer"), "reward": ("more helpful", "less helpful")}  # of a rise and of a fall


@dataclass(frozen=True)
class AlignmentTaxSettings:
    """Settings of the alignment tax.

    Args:
        objectives: Names of two contrasts of the experiment config, whose donors patch each other.
        neurons: Names of two contrasts, whose shared top neurons are patched.
        k: Top neurons of `neurons` whose intersection is patched: an int, or a fraction of the ranked neurons.
        prompts: Prompt sets; empty for the first benchmark.
        judges: Names of the config's judges; empty for all.
        controls: Random controls.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    objectives: tuple[str, str] = ("safety", "helpful")
    neurons: tuple[str, str] = ("reward-bench-safety", "shp")
    k: int | float = 20_000
    prompts: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    controls: int = SweepConfig.controls
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


def run(context: ExperimentContext, settings: AlignmentTaxSettings) -> Report:
    """Patch in both directions on the shared neurons, with random controls of the same size."""
    models = [context.config.contrasts[name].donor for name in settings.objectives]
    first, second = (context.ranking(context.config.contrasts[name]) for name in settings.neurons)
    k = context.num_neurons(settings.k, first)
    shared = intersect_top(first, second, k)
    judges = {name: context.judge(name) for name in settings.judges or context.config.judges}
    sets = settings.prompts or context.config.benchmarks[:1]
    for name in sets:  # raises before anything is generated
        context.data(name)
    rows, records, notes = [], [], []
    for recipient, donor in (models, models[::-1]):
        config = SweepConfig(
            (recipient,),
            (donor,),
            (Window(0, len(shared)),),
            controls=settings.controls,
            extra_controls=(),
            sampling=context.sampling,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        for prompts in sets:
            result = context.sweep(f"alignment_tax of {donor}", prompts, {"shared": shared}, judges, config)
            rows += _compare_scores(result, prompts, settings)
            notes += result.notes
            records += [{**record, "donor": donor} for record in result.records]
    certainty = f"{settings.confidence:.0%} CI"
    columns = {
        "patched": lambda row: f"{row['donor']} -> {row['recipient']}",
        "set": "set",
        "judge": "judge",
        "before": "before",
        f"change {certainty}": lambda row: format_with_interval(row, "change"),
        f"random {certainty}": lambda row: format_with_interval(row, "random_change"),
        "p": lambda row: format_p_value(row["p"]),
    }
    return Report(
        "alignment_tax",
        {"alignment_tax": rows},
        {"alignment_tax": _plot(rows)},
        (TableView.from_rows(rows, columns),),
        build_headline(rows, f"{settings.neurons[0]} and {settings.neurons[1]} share in their top {k}"),
        records=records,
        notes=list(dict.fromkeys(notes)),
    )


def intersect_top(first: Ranking, second: Ranking, k: int) -> Ranking:
    """Return the neurons in the top k of both rankings, in the first ranking's order."""
    common = first.intersect(second, k)
    n = round(first.overlap(second, k) * k)
    if not n:
        raise SnpatchError(f"alignment_tax: no neuron is in the top {k} of both objectives. Use a larger k.")
    return Ranking.from_order(common.top(n), first.shape, meta={"shared_by_top": k})


def _compare_scores(result: SweepResult, prompts: str, settings: AlignmentTaxSettings) -> list[Row]:
    """Return one row per judge: mean score before and after, and the change, paired over prompts."""
    (recipient,), donor = result.config.recipients, result.donor
    rows = []
    for judge in result.judges:
        before, after = (_collect_scores(result, judge, recipient, ranking) for ranking in (None, "shared"))
        (patched,) = result.line(judge, recipient, "shared")
        controls = [
            _collect_scores(result, judge, recipient, "shared", row.control, row.control_seed)
            for row in result.controls(patched)
        ]
        random_change = _measure_change(np.mean(controls, axis=0), before, settings) if controls else UNDEFINED
        rows.append(
            {
                "donor": donor,
                "recipient": recipient,
                "set": prompts,
                "judge": judge,
                "k": patched.rank_hi,
                "before": before.mean(),
                "after": after.mean(),
                **_measure_change(after, before, settings).columns("change"),
                "p": paired_p(after, before),
                "donor_mean": result.baseline(donor, judge).mean,
                **random_change.columns("random_change"),
            }
        )
    return rows


def _measure_change(after: np.ndarray, before: np.ndarray, settings: AlignmentTaxSettings) -> Interval:
    """Return the change of the mean with its bootstrap interval over prompts."""
    return interval(
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        after,
        before,
        resamples=settings.resamples,
        confidence=settings.confidence,
    )


def _collect_scores(
    result: SweepResult,
    judge: str,
    recipient: str,
    ranking: str | None,
    control: str | None = None,
    control_seed: int | None = None,
) -> np.ndarray:
    key = recipient, ranking, control, control_seed
    records = [r for r in result.records if (r["recipient"], r["ranking"], r["control"], r["control_seed"]) == key]
    return np.array([record["scores"][judge] for record in records])


def build_headline(rows: Sequence[Row], neurons: str) -> list[str]:
    """Write one sentence per direction: the change of each judge's mean and what its sign means.

    Args:
        rows: Rows of the table.
        neurons: Description of the patched neurons.
    """
    sentences = []
    for donor, recipient in dict.fromkeys((row["donor"], row["recipient"]) for row in rows):
        group = [row for row in rows if (row["donor"], row["recipient"]) == (donor, recipient)]
        changes = "; ".join(f"{row['judge']} {_describe_change(row)} on {row['set']}" for row in group)
        sentences.append(f"{recipient} patched from {donor} on the {group[0]['k']} neurons that {neurons}: {changes}.")
    return sentences


def _describe_change(row: Row) -> str:
    """Return a change with its interval and its meaning, which is unclear if the interval contains zero."""
    low, high = row["change_low"], row["change_high"]
    rise, fall = MEANINGS.get(row["judge"], ("higher", "lower"))
    meaning = rise if low > 0 else fall if high < 0 else "no clear change"
    return f"{row['change']:+.2f} ({format_interval(row, 'change')}: {meaning})"


def _plot(rows: list[Row]) -> Figure:
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
