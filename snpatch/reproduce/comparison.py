"""The paper's numbers beside the measured ones.

Why a difference is only told where the run is the shipped preset of that very model: of another model, judge or set the
two columns are two configs, which may agree in direction and not in size.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from snpatch import experiments
from snpatch.experiments.config import ExperimentConfig
from snpatch.report.report import Row
from snpatch.reproduce.inputs import engine_content
from snpatch.reproduce.paper import numbers
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import Training, load_preset

TAX = {"helpful-to-safe": ("safety", "helpful"), "safe-to-helpful": ("helpful", "safety")}  # (donor, recipient)
COMPARED = ("model", "template", "sets", "judges", "benchmarks", "max_tokens", "contrast_tokens", "settings")


def differs(pipeline: Pipeline) -> list[str]:
    """What of the run is not as in the shipped preset of the model whose numbers are shown; nothing: it is that."""
    preset = pipeline.preset
    if preset.published is None:
        return ["model"]
    shipped = load_preset(preset.published)
    other = [name for name in COMPARED if preset.config.get(name) != shipped.config.get(name)]
    if preset.training is None or _trained(preset.training, shipped.training) != _trained(
        shipped.training, preset.training
    ):
        other.append("training")
    if engine_content(pipeline.config.engine) != engine_content(pipeline.own_engine):
        other.append("engine")
    options = {"limit": pipeline.limit, "skip_invalid": pipeline.skip_invalid, "taken adapters": pipeline.taken}
    return other + [name for name, value in options.items() if value]


def _trained(one: Training, other: Training) -> list:
    """How the adapters are trained that both train."""
    return [one.sft, one.dpo, {name: rows for name, rows in one.data.items() if name in other.data}]


def beside(pipeline: Pipeline, done: Sequence[str]) -> list[Row]:
    """A row a number that is published, with what was measured, if it was.

    done: the experiments whose tables lie in the folder. difference: measured - published, where `differs` is empty and
    the number is of the same model.
    """
    preset, config, out = pipeline.preset, pipeline.config, pipeline.out
    curve = _table(out, "curve", "curve", done)
    if preset.published is None:
        found = [*_full(config, curve)]
    else:
        found = [
            *_transfer(preset.published, config, _table(out, "transfer", "transfer-table", done)),
            *_curve(preset.published, config, curve),
            *_agreement(config, _table(out, "stability", "stability", done)),
            *_guard(config, _table(out, "guard", "guard-summary", done)),
            *_tax(config, _table(out, "alignment_tax", "alignment_tax", done)),
        ]
    is_same = not differs(pipeline)
    rows = []
    for row in found:
        is_own = is_same and row["published_of"] == preset.published and row["measured"] is not None
        rows.append({**row, "difference": row["measured"] - row["published"] if is_own else None})
    return rows


def _table(out: Path, name: str, stem: str, done: Sequence[str]) -> list[Row] | None:
    """The rows of an experiment's table; None if it was not run."""
    return json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))["rows"] if name in done else None


def _row(
    source: dict, what: str, model: str, of: str, published: float, measured: float | None, bound: str = ""
) -> Row:
    """source: where the number stands (table), and of which model it is (of)."""
    row = {"what": what, "model": model, "set": of, "published": published, "bound": bound, "measured": measured}
    return {**row, "published_of": source["of"], "table": source["table"]}


def _transfer(published: str, config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """Table 1, with the effects (Eq. 4) that follow from it."""
    source = {"table": numbers()["transfer"]["table"], "of": published}
    columns = numbers()["transfer"]["columns"]
    printed = {model: dict(zip(columns, row, strict=True)) for model, row in numbers()["transfer"][published].items()}
    own = {row["model"]: row for row in measured or ()}
    for model, cells in printed.items():
        mine = own.get(config.donor if model == "dpo" else model, {})
        for column, value in cells.items():
            what = "perplexity" if column == "perplexity" else "mean cost"
            yield _row(source, what, model, "text" if column == "perplexity" else column, value, mine.get(column))
    for recipient in ("base", "sft"):
        for column in columns[:-1]:
            before, after, donor = (printed[name][column] for name in (recipient, f"{recipient}+", "dpo"))
            mine = own.get(f"{recipient}+", {}).get(f"effect on {column}")
            effect = (after - before) / (donor - before)
            yield _row(source, "effect (Eq. 4)", f"{recipient}+", column, effect, mine)


def _nearest(config: ExperimentConfig, measured: list[Row] | None, recipient: str, share: float) -> Row | None:
    """The curve's row of the first k neurons that are nearest to a share of all."""
    line = [
        row
        for row in measured or ()
        if (row["recipient"], row["judge"], row["control_seed"]) == (recipient, config.cost, None)
        and row["ranking"]
        and row["rank_lo"] == 0
    ]
    return min(line, key=lambda row: abs(row["neuron_fraction"] - share), default=None)


def _told(row: Row | None) -> tuple[str, float | None]:
    """What a curve's row is of, and its effect."""
    return (f"{row['set']}, {row['neuron_fraction']:.1%}", row["effect"]) if row else ("", None)


def _curve(published: str, config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """The headline, at the share of the neurons that 20000 are."""
    finding = numbers()["finding"]["curve"]
    of, effect = _told(_nearest(config, measured, config.safety.recipient, numbers()["share"][published]))
    yield _row(finding, finding["what"], config.safety.recipient, of, finding["value"], effect)


def _full(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """What others found between two full checkpoints."""
    full = numbers()["full"]
    for point in full["points"]:
        of, effect = _told(_nearest(config, measured, config.recipients[0], point["share"]))
        what = f"{full['what']} of {point['share']:.1%} of the neurons"
        yield _row(full, what, config.recipients[0], of, point["effect"], effect)


def _agreement(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """The least of all pairs of seeds, as the paper says that all are above."""
    k = experiments.resolve_settings(config, "stability").k
    for figure in ("overlap", "spearman"):
        finding, value = numbers()["finding"][figure], None
        if measured:
            ranked = measured[0]["k"] / measured[0]["chance"]
            wanted = k * ranked if isinstance(k, float) else k
            at = min((row["k"] for row in measured), key=lambda have: abs(have - wanted))
            values = [row[figure] for row in measured if row["k"] == at and row[figure] is not None]
            value = min(values) if values else None
        yield _row(finding, finding["what"], config.donor, "", finding["least"], value, "at least")


def _guard(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    finding = numbers()["finding"]["guard"]
    mine = [row for row in measured or () if row["features"] == "safety"]
    value = max(mine, key=lambda row: row["k"])["accuracy"] if mine else None
    for bound in ("least", "most"):
        yield _row(finding, finding["what"], config.safety.recipient, "", finding[bound], value, f"at {bound}")


def _tax(config: ExperimentConfig, measured: list[Row] | None) -> Iterator[Row]:
    """What patching the shared neurons changes, in both directions."""
    tax = numbers()["alignment_tax"]
    for direction, objectives in TAX.items():
        donor, recipient = (config.contrasts[o].donor if o in config.contrasts else None for o in objectives)
        for judge, value in tax[direction].items():
            of = config.benchmarks[0] if judge == "cost" else "helpful"
            mine = [
                row["change"]
                for row in measured or ()
                if (row["donor"], row["recipient"], row["judge"], row["set"]) == (donor, recipient, judge, of)
            ]
            what = f"change of mean {judge}"
            yield _row(tax, what, direction.replace("-", " "), of, value, mine[0] if mine else None)
