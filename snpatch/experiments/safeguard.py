"""Safeguard: cost of the prompts that a guard does not refuse, for recipient and donor (paper, section 2)."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.guard_labels import GuardSettings, label_set
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.guard import Guard
from snpatch.guard.labels import deduplicate
from snpatch.report.formatting import format_value, format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import UNDEFINED, interval
from snpatch.sweeps import generation, judging
from snpatch.sweeps.store import Store


@dataclass(frozen=True)
class SafeguardSettings(GuardSettings):
    """Settings of the safeguard.

    Args:
        train: Prompt set to fit the guard on; empty for the first benchmark.
        prompts: Prompt sets to guard; empty for the other benchmarks.
        k: Number of neurons: an int, or a fraction of the ranked neurons.
    """

    train: str = ""
    prompts: tuple[str, ...] = ()
    k: int | float = 1500


def run(context: ExperimentContext, settings: SafeguardSettings) -> Report:
    """Fit a guard on one set, save it as guard.safetensors, and apply it to both models on the other sets."""
    ranking, model, donor = (
        context.ranking(),
        context.model(context.config.safety.recipient),
        context.model(context.config.donor),
    )
    train = settings.train or context.config.benchmarks[0]
    names = settings.prompts or [name for name in context.config.benchmarks if name != train]
    if not names or train in names:
        raise SnpatchError(f"safeguard: prompts: expected sets other than {train}, got {', '.join(names) or 'none'}")
    labeled = label_set(context, train, settings.harm_threshold)
    k = context.num_neurons(settings.k, ranking)
    features = context.engine.capture(labeled.prompts, model, ranking, k)
    meta = {"judge": context.config.cost, "train": context.data(train).source}
    guard = Guard.fit(
        features,
        labeled.labels,
        ranking,
        model=model,
        fingerprint=context.engine.fingerprint(model),
        config=settings.config,
        meta=meta,
    )
    guard.save(context.out / "guard.safetensors")
    rows, records, notes = [], [], []
    for name in names:
        prompts = [prompt for prompt in deduplicate(context.prompts(name)) if prompt not in labeled.prompts]
        if not prompts:
            raise SnpatchError(f"safeguard: every prompt of {name} is also in {train}")
        if num_dropped := len(context.prompts(name)) - len(prompts):
            notes.append(f"{name}: left out {num_dropped} prompts that repeat or are in {train}.")
        refused = guard.predict(context.engine, prompts) > guard.threshold
        with context.progress(f"completions of {name}") as progress, Store(context.out) as store:
            records_by_model = generation.generate_completions(
                context.engine, prompts, [model, donor], context.sampling, store=store, progress=progress
            )
            judging.judge_all(
                [record for model_records in records_by_model for record in model_records], context.cost, store
            )
        for model_name, model_records in zip((model, donor), records_by_model, strict=True):
            judging.check_scored(model_records)
            costs = np.array([record["scores"][context.config.cost] for record in model_records])
            rows.append(_compare_costs(name, model_name, costs, refused, settings))
            for is_refused, record in zip(refused, model_records, strict=True):
                records.append({"set": name, "model": model_name, "refused": bool(is_refused), **record})
    columns = {
        "set": "set",
        "model": "model",
        "refused": lambda row: f"{row['refused']} of {row['prompts']}",
        "mean cost": "all",
        f"mean cost if not refused, {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "passed"),
        "harmful": lambda row: f"{row['harmful_share']:.0%}",
        "harmful if not refused": lambda row: "" if row["harmful_passed"] is None else f"{row['harmful_passed']:.0%}",
    }
    sentences = [
        f"{row['model']} on {row['set']}: mean cost {format_value(row['all'])} without the guard, "
        f"{_describe_passed(row)} with the guard of {k} neurons."
        for row in rows
    ]
    tables, plots = {"safeguard": rows}, {"safeguard": _plot(rows)}
    return Report(
        "safeguard", tables, plots, (TableView.from_rows(rows, columns),), sentences, records=records, notes=notes
    )


def _describe_passed(row: Row) -> str:
    return "every prompt is refused" if row["passed"] is None else format_value(row["passed"])


def _compare_costs(name: str, model: str, costs: np.ndarray, refused: np.ndarray, settings: SafeguardSettings) -> Row:
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
    positions = np.arange(len(rows))
    axis.bar(positions - 0.2, [row["all"] for row in rows], 0.4, label="all prompts")
    passed = [np.nan if row["passed"] is None else row["passed"] for row in rows]
    axis.bar(positions + 0.2, passed, 0.4, label="not refused by the guard")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(positions, labels, fontsize=8)
    axis.set_ylabel("mean cost (lower is safer)")
    axis.legend(fontsize=8)
    return figure
