"""Comparison of measured numbers with the paper's.

A difference is computed only if the run is the shipped preset of the same model and its protocol is the paper's. With
another model, judge, dataset or protocol, the two numbers may agree in direction but not in size.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from snpatch import experiments
from snpatch.experiments.config import ExperimentConfig
from snpatch.report.report import Row
from snpatch.reproduce.inputs import engine_content
from snpatch.reproduce.paper import list_deviations, read_numbers
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import Training, load_preset

TAX_DIRECTIONS = {  # direction in published.toml -> objectives of (donor, recipient)
    "helpful-to-safe": ("helpful", "safety"),
    "safe-to-helpful": ("safety", "helpful"),
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
    if preset.ability != shipped.ability:
        differences.append("ability")
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
        finished: Experiments and evaluations of general ability with a current table.

    Returns:
        Rows with `difference` = measured - published if nothing differs from the shipped preset, the number is of the
        same model, and published.toml lists no deviation of the experiment; else None.
    """
    preset, config = pipeline.preset, pipeline.config
    tables = _Tables(pipeline.out, finished)
    curve = tables.read("curve", "curve")
    if preset.published is None:
        sections = {"curve": _full_checkpoints_rows(config, curve)}
    else:
        sections = {
            "transfer": _transfer_rows(preset.published, config, tables.read("transfer", "transfer-table")),
            "curve": _curve_rows(preset.published, config, curve),
            "stability": _stability_rows(config, tables.read("stability", "stability")),
            "distribution": _distribution_rows(preset.published, tables.read("distribution", "distribution")),
            "guard": _guard_rows(config, tables.read("guard", "guard-summary")),
            "alignment_tax": _tax_rows(preset.published, config, tables.read("alignment_tax", "alignment_tax")),
            "competition": _competition_rows(config, tables.read("competition", "competition")),
            "judge_agreement": _judge_rows(tables.read("judge_agreement", "judge_agreement")),
            "ability": _ability_rows(pipeline, tables),
        }
    is_shipped, rows = not list_differences(pipeline), []
    for section, section_rows in sections.items():
        for row in section_rows:
            is_of_model = is_shipped and row["published_of"] == preset.published and row["measured"] is not None
            is_comparable = is_of_model and not list_deviations(section)
            row["difference"] = row["measured"] - row["published"] if is_comparable else None
            rows.append(row)
    return rows


class _Tables:
    """Tables of the finished experiments in a folder."""

    def __init__(self, out: Path, finished: Sequence[str]) -> None:
        self._out, self._finished = out, finished

    def read(self, experiment: str, stem: str) -> list[Row]:
        """Return the rows of an experiment's table; none if it was not run."""
        if experiment not in self._finished:
            return []
        return json.loads((self._out / f"{stem}.json").read_text(encoding="utf-8"))["rows"]


def _build_row(
    table: str,
    of: str,
    what: str,
    model: str,
    prompt_set: str,
    published: float,
    measured: float | None,
    bound: str = "",
) -> Row:
    """Return a row. table: table of the paper that prints the number. of: the model that the number is of."""
    return {
        "what": what,
        "model": model,
        "set": prompt_set,
        "published": published,
        "bound": bound,
        "measured": measured,
        "published_of": of,
        "table": table,
    }


def _transfer_rows(published: str, config: ExperimentConfig, measured: list[Row]) -> Iterator[Row]:
    """Yield the costs and perplexities, and the effects (Eq. 4) that follow from them."""
    costs = read_numbers()["costs"]
    columns = costs["columns"]
    paper_costs = {model: dict(zip(columns, row, strict=True)) for model, row in costs[published].items()}
    measured_costs = {row["model"]: row for row in measured}
    for model, values in paper_costs.items():
        own_costs = measured_costs.get(config.donor if model == "dpo" else model, {})
        for column, value in values.items():
            is_perplexity = column == "perplexity"
            what, prompt_set = ("perplexity", "text") if is_perplexity else ("mean cost", column)
            yield _build_row(costs["table"], published, what, model, prompt_set, value, own_costs.get(column))
    for recipient in ("base", "sft"):
        for column in columns[:-1]:
            effect, table = published_effect(published, recipient, column)
            own_effect = measured_costs.get(f"{recipient}+", {}).get(f"effect on {column}")
            yield _build_row(table, published, "effect (Eq. 4)", f"{recipient}+", column, effect, own_effect)
    yield from _baseline_rows(published)


def _baseline_rows(published: str) -> Iterator[Row]:
    """Yield costs and effects of the paper's two baselines, which snpatch does not measure."""
    for group, what, unit in (("baselines", "mean cost", 1), ("effects", "effect (Eq. 4)", 100)):
        numbers = read_numbers()[group]
        if numbers["of"] != published:
            continue
        for recipient, method in product(("base", "sft"), ("pruning", "sn-tune")):
            for column, value in zip(numbers["columns"], numbers[recipient][method], strict=True):
                label = f"{what}, first 5 % by {method}"
                yield _build_row(numbers["table"], published, label, recipient, column, value / unit, None)


def published_effect(published: str, recipient: str, column: str) -> tuple[float, str]:
    """Return the paper's effect on a benchmark, printed or computed from the costs, and its table."""
    effects, costs = read_numbers()["effects"], read_numbers()["costs"]
    if effects["of"] == published:
        return effects[recipient]["safety"][effects["columns"].index(column)] / 100, effects["table"]
    index = costs["columns"].index(column)
    before, after, donor = (costs[published][name][index] for name in (recipient, f"{recipient}+", "dpo"))
    return (after - before) / (donor - before), f"{costs['table']}, Eq. 4"


def _nearest_point(config: ExperimentConfig, curve: list[Row], recipient: str, fraction: float) -> Row | None:
    """Return the curve's row whose top-k is nearest to a fraction of all neurons."""
    points = [
        row
        for row in curve
        if (row["recipient"], row["judge"], row["control"]) == (recipient, config.cost, None)
        and row["ranking"]
        and row["rank_lo"] == 0
    ]
    return min(points, key=lambda row: abs(row["neuron_fraction"] - fraction), default=None)


def _describe_point(row: Row | None) -> tuple[str, float | None]:
    """Return the dataset and fraction of a curve's row, and its effect."""
    return (f"{row['set']}, {row['neuron_fraction']:.1%}", row["effect"]) if row else ("", None)


def _curve_rows(published: str, config: ExperimentConfig, curve: list[Row]) -> Iterator[Row]:
    """Yield each recipient's effect at the fraction that 20000 neurons are, on the first benchmark."""
    share = read_numbers()["share"][published]
    for recipient in ("sft", "base"):
        effect, table = published_effect(published, recipient, "beavertails")
        prompt_set, measured = _describe_point(_nearest_point(config, curve, recipient, share))
        what = f"share of the safety gain that {share:.1%} of the neurons recover"
        yield _build_row(table, published, what, recipient, prompt_set, effect, measured)


def _full_checkpoints_rows(config: ExperimentConfig, curve: list[Row]) -> Iterator[Row]:
    """Yield what an independent run measured between two full checkpoints."""
    full, recipient = read_numbers()["full"], config.recipients[0]
    for point in full["points"]:
        prompt_set, effect = _describe_point(_nearest_point(config, curve, recipient, point["share"]))
        what = f"{full['what']} of {point['share']:.1%} of the neurons"
        yield _build_row(full["table"], full["of"], what, recipient, prompt_set, point["effect"], effect)


def _finding_row(name: str, model: str, published: float, measured: float | None, bound: str = "") -> Row:
    """Return the row of a single number of the text."""
    finding = read_numbers()["finding"][name]
    return _build_row(finding["table"], finding["of"], finding["what"], model, "", published, measured, bound)


def _stability_rows(config: ExperimentConfig, measured: list[Row]) -> Iterator[Row]:
    """Yield the minimum over pairs of seeds, because the paper gives a lower bound for all pairs."""
    k = experiments.resolve_settings(config, "stability").k
    for figure in ("overlap", "spearman"):
        value = None
        if measured:
            num_ranked = measured[0]["k"] / measured[0]["chance"]
            target_k = k * num_ranked if isinstance(k, float) else k
            nearest_k = min((row["k"] for row in measured), key=lambda row_k: abs(row_k - target_k))
            values = [row[figure] for row in measured if row["k"] == nearest_k and row[figure] is not None]
            value = min(values) if values else None
        least = read_numbers()["finding"][figure]["least"]
        yield _finding_row(figure, config.donor, least, value, "at least")


def _distribution_rows(published: str, measured: list[Row]) -> Iterator[Row]:
    """Yield the skewness of the change scores, and the fraction above 0.1."""
    numbers = read_numbers()
    total: Row = next((row for row in measured if row["layer"] == "all"), {})
    if published in numbers["skewness"]:
        table, value = numbers["skewness"]["table"], numbers["skewness"][published]
        yield _build_row(table, published, "skewness of the change scores", "", "", value, total.get("skewness"))
    finding = numbers["finding"]["scores"]
    yield _finding_row("scores", "", finding["count"] / finding["neurons"], total.get("above 0.1"))


def _guard_rows(config: ExperimentConfig, measured: list[Row]) -> Iterator[Row]:
    safety_rows = [row for row in measured if row["features"] == "safety"]
    accuracy = max(safety_rows, key=lambda row: row["k"])["accuracy"] if safety_rows else None
    yield _finding_row("guard", config.safety.recipient, read_numbers()["finding"]["guard"]["value"], accuracy)


def _judge_rows(measured: list[Row]) -> Iterator[Row]:
    correlation = measured[0]["pearson"] if measured else None
    yield _finding_row("judges", "", read_numbers()["finding"]["judges"]["value"], correlation)


def _tax_rows(published: str, config: ExperimentConfig, measured: list[Row]) -> Iterator[Row]:
    """Yield the changes of both means on the first benchmark, in both directions."""
    tax, prompt_set = read_numbers()["alignment_tax"], config.benchmarks[0]
    changes = {(row["donor"], row["recipient"], row["judge"], row["set"]): row["change"] for row in measured}
    for direction, objectives in TAX_DIRECTIONS.items():
        donor, recipient = (config.contrasts[o].donor if o in config.contrasts else None for o in objectives)
        for judge, value in tax[published][direction].items():
            change = changes.get((donor, recipient, judge, prompt_set))
            what, model = f"change of mean {judge}", direction.replace("-", " ")
            yield _build_row(tax["table"], published, what, model, prompt_set, value, change)


def _competition_rows(config: ExperimentConfig, measured: list[Row]) -> Iterator[Row]:
    """Yield the mean costs of the helpful model, the same patched, and its donor."""
    numbers = read_numbers()["competition"]
    own_rows = {row["set"]: row for row in measured}
    for role, key in (("recipient", "recipient_mean"), ("patched", "patched"), ("donor", "donor_mean")):
        for name, value in zip(numbers["columns"], numbers[role], strict=True):
            own_value = own_rows.get(name, {}).get(key)
            what = "mean cost, competition"
            yield _build_row(numbers["table"], numbers["of"], what, role, name, value, own_value)


def _ability_rows(pipeline: Pipeline, tables: _Tables) -> Iterator[Row]:
    """Yield the accuracy of each model on each task."""
    numbers = read_numbers()["ability"]
    measured = {
        (row["model"], row["task"]): row["value"]
        for target in pipeline.ability_targets.values()
        for row in tables.read(target.step, target.step)
    }
    for model in ("base", "base+", "sft", "sft+", "dpo"):
        own_model = pipeline.config.donor if model == "dpo" else model
        for task, value in zip(numbers["columns"], numbers[model], strict=True):
            own_value = measured.get((own_model, task))
            yield _build_row(numbers["table"], numbers["of"], "accuracy", model, task, value, own_value)
