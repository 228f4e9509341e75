"""The alignment tax: two objectives share neurons, but need other activations of them (paper, section 2).

Each objective's model is patched from the other's on the neurons that both objectives' top k share; cost and reward are
measured before and after.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import format_interval, format_p_value, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.statistics import interval, paired_p
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep import SweepResult


@dataclass(frozen=True)
class Settings:
    """objectives: two of the config's contrasts. k: whose shared neurons are patched. prompts: sets (default: the first
    benchmark and "helpful"). judges: names of the config's judges (default: all).
    """

    objectives: tuple[str, str] = ("safety", "helpful")
    k: int | float = 20_000
    prompts: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    controls: int = SweepConfig.controls
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


def run(context: ExperimentContext, settings: Settings) -> Report:
    """Patch both ways on the shared neurons, beside as many random ones."""
    contrasts = []
    for name in settings.objectives:
        if name not in context.config.contrasts:
            raise SnpatchError(
                f"alignment_tax: no contrast named {name!r}: the config has {', '.join(context.config.contrasts)}"
            )
        contrasts.append(context.config.contrasts[name])
    one, other = (context.ranking(contrast) for contrast in contrasts)
    k = context.num_neurons(settings.k, one)
    shared = shared_neurons(one, other, k)
    judges = {name: context.judge(name) for name in settings.judges or context.config.judges}
    sets = settings.prompts or (context.config.benchmarks[0], "helpful")
    for name in sets:  # an error before the long part
        context.data(name)
    rows, records = [], []
    for recipient, donor in (
        (contrasts[0].donor, contrasts[1].donor),
        (contrasts[1].donor, contrasts[0].donor),
    ):
        config = SweepConfig(
            (recipient,),
            donor,
            (len(shared),),
            controls=settings.controls,
            sampling=context.sampling,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        for prompts in sets:
            result = context.sweep(prompts, {"shared": shared}, judges, config)
            rows += _rows(result, prompts, settings)
            records += [{**record, "donor": donor} for record in result.records]
    certainty = f"{settings.confidence:.0%} interval"
    columns = {
        "patched": lambda row: f"{row['donor']} -> {row['recipient']}",
        "set": "set",
        "judge": "judge",
        "before": "before",
        "after": "after",
        "change": "change",
        certainty: lambda row: format_interval(row, "change"),
        "p": lambda row: format_p_value(row["p"]),
        "donor": "donor_mean",
        "random neurons' change": "random_change",
    }
    return Report(
        "alignment_tax",
        {"alignment_tax": rows},
        {"alignment_tax": _plot(rows)},
        (TableView.from_rows(rows, columns),),
        _sentences(rows, k),
        records=records,
    )


def shared_neurons(one: Ranking, other: Ranking, k: int) -> Ranking:
    """The neurons in both first k, in the first ranking's order."""
    both = one.intersect(other, k)
    n = round(one.overlap(other, k) * k)
    if not n:
        raise SnpatchError(f"alignment_tax: no neuron is in both first {k}: take a larger k")
    return Ranking.from_order(both.top(n), one.shape, meta={"shared_by_top": k})


def _rows(result: SweepResult, prompts: str, settings: Settings) -> list[dict]:
    """A row a judge: mean score before and after, and the change, paired over prompts."""
    (recipient,), donor = result.config.recipients, result.donor
    rows = []
    for judge in result.judges:
        before, after = (_scores(result, judge, recipient, ranking) for ranking in (None, "shared"))
        change, low, high = interval(
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            after,
            before,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        (patched,) = result.line(judge, recipient, "shared")
        random = [row.mean - before.mean() for row in result.controls(patched)]
        rows.append(
            {
                "donor": donor,
                "recipient": recipient,
                "set": prompts,
                "judge": judge,
                "k": patched.hi,
                "before": before.mean(),
                "after": after.mean(),
                "change": change,
                "change_low": low,
                "change_high": high,
                "p": paired_p(after, before),
                "donor_mean": result.baseline(donor, judge).mean,
                "random_change": float(np.mean(random)) if random else None,
            }
        )
    return rows


def _scores(result: SweepResult, judge: str, recipient: str, ranking: str | None) -> np.ndarray:
    key = recipient, ranking, None
    mine = [r for r in result.records if (r["recipient"], r["ranking"], r["control_seed"]) == key]
    return np.array([record["scores"][judge] for record in mine])


def _sentences(rows: list[dict], k: int) -> list[str]:
    """One a direction: what it changed, by judge and set."""
    sentences = []
    for donor, recipient in dict.fromkeys((row["donor"], row["recipient"]) for row in rows):
        mine = [row for row in rows if (row["donor"], row["recipient"]) == (donor, recipient)]
        changes = ", ".join(f"{row['judge']} {row['change']:+.2f} on {row['set']}" for row in mine)
        sentences.append(f"{donor} into {recipient} on the {mine[0]['k']} neurons of both top {k}: {changes}.")
    return sentences


def _plot(rows: list[dict]) -> Figure:
    """Change of every judge's mean, by set and direction."""
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    figure = Figure(figsize=(5.5 * len(judges), 4), layout="constrained")
    for axis, judge in zip(figure.subplots(1, len(judges), squeeze=False)[0], judges, strict=True):
        mine = [row for row in rows if row["judge"] == judge]
        labels = [
            to_plot_label(f"{row['donor']} -> {row['recipient']}") + f"\non {to_plot_label(row['set'])}" for row in mine
        ]
        errors = [
            [row["change"] - row["change_low"] for row in mine],
            [row["change_high"] - row["change"] for row in mine],
        ]
        axis.barh(labels, [row["change"] for row in mine], xerr=errors, color="tab:blue", alpha=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(to_plot_label(f"change of mean {judge}"))
        axis.invert_yaxis()
    return figure
