"""Safeguard: what prompts cost that a guard lets through, for the generator and the donor (paper, section 2)."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.guard_labels import GuardSettings, label_set
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.guard import Guard
from snpatch.guard.labels import deduplicate
from snpatch.report.formatting import format_interval, format_value, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import UNDEFINED, interval
from snpatch.sweeps import generation, judging
from snpatch.sweeps.store import Store


@dataclass(frozen=True)
class Settings(GuardSettings):
    """train: the set to fit on (default: the first benchmark). prompts: sets to guard (default: the other benchmarks).
    k: neurons, an int or a share.
    """

    train: str = ""
    prompts: tuple[str, ...] = ()
    k: int | float = 1500


def run(context: ExperimentContext, settings: Settings) -> Report:
    """Fit a guard on one set, save it as guard.safetensors, and let it stand before both models on the others."""
    ranking, model, donor = (
        context.ranking(),
        context.model(context.config.safety.recipient),
        context.model(context.config.donor),
    )
    train = settings.train or context.config.benchmarks[0]
    names = settings.prompts or [name for name in context.config.benchmarks if name != train]
    if not names or train in names:
        raise SnpatchError(f"safeguard: wanted sets to guard other than {train}, got {', '.join(names) or 'none'}")
    known = label_set(context, train, settings.harm_threshold)
    k = context.num_neurons(settings.k, ranking)
    features = context.engine.capture(known.prompts, model, ranking, k)
    meta = {"judge": context.config.cost, "train": context.data(train).source}
    guard = Guard.fit(
        features,
        known.labels,
        ranking,
        model=model,
        fingerprint=context.engine.fingerprint(model),
        config=settings.config,
        meta=meta,
    )
    guard.save(context.out / "guard.safetensors")
    rows, records, notes = [], [], []
    for name in names:
        prompts = [prompt for prompt in deduplicate(context.prompts(name)) if prompt not in known.prompts]
        if not prompts:
            raise SnpatchError(f"safeguard: every prompt of {name} is in {train}, too")
        if len(prompts) < len(context.prompts(name)):
            notes.append(
                f"{name}: {len(context.prompts(name)) - len(prompts)} prompts repeat or are in {train}, left out."
            )
        refused = guard.predict(context.engine, prompts) > guard.threshold
        with context.progress(f"answers to {name}") as progress, Store(context.out) as store:
            written = generation.generate_completions(
                context.engine, prompts, [model, donor], context.sampling, store=store, progress=progress
            )
            judging.judge_all([record for mine in written for record in mine], context.cost, store)
        for who, mine in zip((model, donor), written, strict=True):
            judging.check_scored(mine)
            costs = np.array([record["scores"][context.config.cost] for record in mine])
            rows.append(_row(name, who, costs, refused, settings))
            records += [
                {"set": name, "model": who, "refused": bool(r), **m} for r, m in zip(refused, mine, strict=True)
            ]
    columns = {
        "set": "set",
        "model": "model",
        "refused": lambda row: f"{row['refused']} of {row['prompts']}",
        "mean cost, all": "all",
        "mean cost, let through": "passed",
        f"{settings.confidence:.0%} interval": lambda row: format_interval(row, "passed"),
        "harmful, all": lambda row: f"{row['harmful_share']:.0%}",
        "harmful, let through": lambda row: "" if row["harmful_passed"] is None else f"{row['harmful_passed']:.0%}",
    }
    sentences = [
        f"{row['model']} on {row['set']}: cost {format_value(row['all'])} unguarded, "
        f"{format_value(row['passed']) or 'nothing let through'} of what the guard of {k} neurons lets through."
        for row in rows
    ]
    tables, plots = {"safeguard": rows}, {"safeguard": _plot(rows)}
    return Report(
        "safeguard", tables, plots, (TableView.from_rows(rows, columns),), [*sentences, *notes], records=records
    )


def _row(name: str, model: str, costs: np.ndarray, refused: np.ndarray, settings: Settings) -> Row:
    passed, mean = costs[~refused], UNDEFINED
    if len(passed):
        mean = interval(np.mean, passed, resamples=settings.resamples, confidence=settings.confidence)
    is_harmful = costs > settings.harm_threshold
    return {
        "set": name,
        "model": model,
        "prompts": len(costs),
        "refused": int(refused.sum()),
        "all": float(costs.mean()),
        **mean.columns("passed"),
        "harmful_share": float(is_harmful.mean()),
        "harmful_passed": float(is_harmful[~refused].mean()) if len(passed) else None,
        "harmful_refused": int(is_harmful[refused].sum()),
    }


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(2 + 2.2 * len(rows) / 2, 4.2), layout="constrained")
    axis = figure.subplots()
    labels = [f"{to_plot_label(row['model'])}\n{to_plot_label(row['set'])}" for row in rows]
    places = np.arange(len(rows))
    axis.bar(places - 0.2, [row["all"] for row in rows], 0.4, label="all prompts")
    passed = [np.nan if row["passed"] is None else row["passed"] for row in rows]
    axis.bar(places + 0.2, passed, 0.4, label="let through by the guard")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(places, labels, fontsize=8)
    axis.set_ylabel("mean cost (lower is safer)")
    axis.legend(fontsize=8)
    return figure
