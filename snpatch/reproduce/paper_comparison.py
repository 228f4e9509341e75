"""Comparison of measured numbers with the paper's.

A difference is computed only if the run is the shipped preset of the same model. With another model, judge or dataset,
the two numbers come from different configs, which may agree in direction but not in size.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from snpatch import experiments
from snpatch.experiments.config import ExperimentConfig
from snpatch.report.report import Row
from snpatch.reproduce.inputs import engine_content
from snpatch.reproduce.paper import read_numbers
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import Training, load_preset

TAX_DIRECTIONS = {  # direction in published.toml -> objectives of (donor, recipient)
    "helpful-to-safe": ("safety", "helpful"),
    "safe-to-helpful": ("helpful", "safety"),
}
COMPARED_FIELDS = (
    "model", "template", "sets", "judges", "benchmarks", "max_tokens", "contrast_tokens", "settings",
)  # fmt: skip


def list_differences(pipeline: Pipeline) -> list[str]:
    """Return what differs from the shipped preset of the model whose numbers are shown."""
    preset = pipeline.preset
    if preset.published is None:
        return ["model"]
    shipped = load_preset(preset.published)
    differences = [name for name in COMPARED_FIELDS if preset.config.get(name) != shipped.config.get(name)]
    if not preset.training or not shipped.training or not _train_alike(preset.training, shipped.training):
        differences.append("training")
    if engine_content(pipeline.config.engine) != engine_content(pipeline.preset_engine):
        differences.append("engine")
    options = {
        "limit": pipeline.limit,
        "skip_invalid": pipeline.skip_invalid,
        "provided adapters": pipeline.provided_adapters,
    }
    return differences + [name for name, value in options.items() if value]


def _train_alike(a: Training, b: Training) -> bool:
    """Return whether settings, and the data of adapters that both train, are equal."""
    shared = a.data.keys() & b.data.keys()
    return (a.sft, a.dpo) == (b.sft, b.dpo) and all(a.data[name] == b.data[name] for name in shared)


def compare_with_paper(pipeline: Pipeline, finished: Sequence[str]) -> list[Row]:
    """Return one row per published number, with the measured one if there is one.

    Args:
        pipeline: Pipeline whose folder contains the tables.
        finished: Experiments with a current table.

    Returns:
        Rows with `difference` = measured - published if nothing differs from the shipped preset and the number is of
        the same model, else None.
    """
    preset, config, out = pipeline.preset, pipeline.config, pipeline.out
    curve = _read_rows(out, "curve", "curve", finished)
    if preset.published is None:
        rows = [*_full_checkpoints_rows(config, curve)]
    else:
        rows = [
            *_transfer_rows(preset.published, config, _read_rows(out, "transfer", "transfer-table", finished)),
            *_curve_rows(preset.published, config, curve),
            *_stability_rows(config, _read_rows(out, "stability", "stability", finished)),
            *_guard_rows(config, _read_rows(out, "guard", "guard-summary", finished)),
            *_tax_rows(config, _read_rows(out, "alignment_tax", "alignment_tax", finished)),
        ]
    is_shipped = not list_differences(pipeline)
    for row in rows:
        is_comparable = is_shipped and row["published_of"] == preset.published and row["measured"] is not None
        row["difference"] = row["measured"] - row["published"] if is_comparable else None
    return rows


def _read_rows(out: Path, experiment: str, stem: str, finished: Sequence[str]) -> list[Row] | None:
    """Return the rows of an experiment's table; None if it was not run."""
    if experiment not in finished:
        return None
    return json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))["rows"]


def _build_row(
    source: dict, what: str, model: str, prompt_set: str, published: float, measured: float | None, bound: str = ""
) -> Row:
    """Return a row. source: `table` that prints the number, and the model that it is `of`."""
    return {
        "what": what,
        "model": model,
        "set": prompt_set,
        "published": published,
        "bound": bound,
        "measured": measured,
        "published_of": source["of"],
        "table": source["table"],
    }


def _transfer_rows(published: str, config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """Yield Table 1 and the effects (Eq. 4) that follow from it."""
    transfer = read_numbers()["transfer"]
    source, columns = {"table": transfer["table"], "of": published}, transfer["columns"]
    paper_costs = {model: dict(zip(columns, row, strict=True)) for model, row in transfer[published].items()}
    measured_costs = {row["model"]: row for row in measured or ()}
    for model, costs in paper_costs.items():
        own_costs = measured_costs.get(config.donor if model == "dpo" else model, {})
        for column, value in costs.items():
            is_perplexity = column == "perplexity"
            what, prompt_set = ("perplexity", "text") if is_perplexity else ("mean cost", column)
            yield _build_row(source, what, model, prompt_set, value, own_costs.get(column))
    for recipient in ("base", "sft"):
        for column in columns[:-1]:
            before, after, donor = (paper_costs[name][column] for name in (recipient, f"{recipient}+", "dpo"))
            effect = (after - before) / (donor - before)
            own_effect = measured_costs.get(f"{recipient}+", {}).get(f"effect on {column}")
            yield _build_row(source, "effect (Eq. 4)", f"{recipient}+", column, effect, own_effect)


def _nearest_point(config: ExperimentConfig, curve: list[Row] | None, recipient: str, fraction: float) -> Row | None:
    """Return the curve's row whose top-k is nearest to a fraction of all neurons."""
    points = [
        row
        for row in curve or ()
        if (row["recipient"], row["judge"], row["control"]) == (recipient, config.cost, None)
        and row["ranking"]
        and row["rank_lo"] == 0
    ]
    return min(points, key=lambda row: abs(row["neuron_fraction"] - fraction), default=None)


def _describe_point(row: Row | None) -> tuple[str, float | None]:
    """Return the dataset and fraction of a curve's row, and its effect."""
    return (f"{row['set']}, {row['neuron_fraction']:.1%}", row["effect"]) if row else ("", None)


def _curve_rows(published: str, config: ExperimentConfig, curve: list[Row] | None) -> Iterator[Row]:
    """Yield the headline, at the fraction that 20000 neurons are."""
    finding, recipient = read_numbers()["finding"]["curve"], config.safety.recipient
    point = _nearest_point(config, curve, recipient, read_numbers()["share"][published])
    prompt_set, effect = _describe_point(point)
    yield _build_row(finding, finding["what"], recipient, prompt_set, finding["value"], effect)


def _full_checkpoints_rows(config: ExperimentConfig, curve: list[Row] | None) -> Iterator[Row]:
    """Yield what an independent run measured between two full checkpoints."""
    full, recipient = read_numbers()["full"], config.recipients[0]
    for point in full["points"]:
        prompt_set, effect = _describe_point(_nearest_point(config, curve, recipient, point["share"]))
        what = f"{full['what']} of {point['share']:.1%} of the neurons"
        yield _build_row(full, what, recipient, prompt_set, point["effect"], effect)


def _stability_rows(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """Yield the minimum over pairs of seeds, because the paper gives a lower bound for all pairs."""
    k = experiments.resolve_settings(config, "stability").k
    for figure in ("overlap", "spearman"):
        finding, value = read_numbers()["finding"][figure], None
        if measured:
            num_ranked = measured[0]["k"] / measured[0]["chance"]
            target_k = k * num_ranked if isinstance(k, float) else k
            nearest_k = min((row["k"] for row in measured), key=lambda row_k: abs(row_k - target_k))
            values = [row[figure] for row in measured if row["k"] == nearest_k and row[figure] is not None]
            value = min(values) if values else None
        yield _build_row(finding, finding["what"], config.donor, "", finding["least"], value, "at least")


def _guard_rows(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    finding = read_numbers()["finding"]["guard"]
    safety_rows = [row for row in measured or () if row["features"] == "safety"]
    accuracy = max(safety_rows, key=lambda row: row["k"])["accuracy"] if safety_rows else None
    for bound in ("least", "most"):
        recipient = config.safety.recipient
        yield _build_row(finding, finding["what"], recipient, "", finding[bound], accuracy, f"at {bound}")


def _tax_rows(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """Yield the changes of the mean when the shared neurons are patched, in both directions."""
    tax = read_numbers()["alignment_tax"]
    for direction, objectives in TAX_DIRECTIONS.items():
        donor, recipient = (config.contrasts[o].donor if o in config.contrasts else None for o in objectives)
        for judge, value in tax[direction].items():
            prompt_set = config.benchmarks[0] if judge == "cost" else "helpful"
            key = (donor, recipient, judge, prompt_set)
            changes = [
                row["change"]
                for row in measured or ()
                if (row["donor"], row["recipient"], row["judge"], row["set"]) == key
            ]
            what = f"change of mean {judge}"
            yield _build_row(tax, what, direction.replace("-", " "), prompt_set, value, next(iter(changes), None))
