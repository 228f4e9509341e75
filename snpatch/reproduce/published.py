"""The paper's numbers beside the measured ones.

Why a difference is only told where the model, the sets and the judge are the paper's: of another model the two columns
are two worlds, which may agree in direction and not in size.
"""

import json
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from snpatch import experiments
from snpatch.errors import SnpatchError
from snpatch.report.report import Row
from snpatch.reproduce.preset import Preset
from snpatch.worlds.world import World

FIVE_PERCENT = 0.05  # of the neurons: what the paper's headline is about
TAX = {"helpful-to-safe": ("safety", "helpful"), "safe-to-helpful": ("helpful", "safety")}  # (donor, recipient)


@cache
def numbers() -> dict:
    """All that the paper reports, as published.toml has it."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def models() -> list[str]:
    """The paper's models."""
    return [name for name in numbers()["transfer"] if name not in ("table", "columns")]


def beside(preset: Preset, world: World, out: Path, done: list[str]) -> list[Row]:
    """A row a number that is published, or measured where a published one could stand.

    done: the experiments whose tables lie in `out`. difference: measured - published, where both are of one model.
    """
    if preset.published is None:
        return []
    if preset.published not in models():
        raise SnpatchError(f"published: there are {', '.join(models())}, got {preset.published!r}")
    found = [
        *_transfer(preset.published, world, _table(out, "transfer", "transfer-table", done)),
        *_curve(world, _table(out, "curve", "curve", done)),
        *_agreement(world, _table(out, "stability", "stability", done)),
        *_guard(_table(out, "guard", "guard-summary", done)),
        *_tax(world, _table(out, "tax", "tax", done)),
    ]
    is_same = preset.published == preset.name
    rows = []
    for row in found:
        own = row["measured"] is not None and row["published"] is not None
        difference = row["measured"] - row["published"] if own and is_same else None
        rows.append({"published_of": preset.published, **row, "difference": difference})
    return rows


def _table(out: Path, name: str, stem: str, done: list[str]) -> list[Row] | None:
    """The rows of an experiment's table; None if it was not run."""
    return json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))["rows"] if name in done else None


def _row(what: str, table: str, model: str, of: str, published: float | None, measured: float | None, bound: str = ""):
    both = {"published": published, "bound": bound, "measured": measured}
    return {"what": what, "table": table, "model": model, "set": of, **both}


def _transfer(published: str, world: World, measured: list[Row] | None) -> Iterator[Row]:
    """Table 1, with the effects (Eq. 4) that follow from it."""
    table, columns = numbers()["transfer"]["table"], numbers()["transfer"]["columns"]
    printed = {model: dict(zip(columns, row, strict=True)) for model, row in numbers()["transfer"][published].items()}
    own = {row["model"]: row for row in measured or ()}
    names = {"dpo": world.donor}
    for model, cells in printed.items():
        mine = own.get(names.get(model, model), {})
        for column, value in cells.items():
            what = "perplexity" if column == "perplexity" else "mean cost"
            yield _row(what, table, model, column, value, mine.get(column))
    for recipient in ("base", "sft"):
        for column in columns[:-1]:
            before, after, donor = (printed[name][column] for name in (recipient, f"{recipient}+", "dpo"))
            effect = (after - before) / (donor - before)
            mine = own.get(f"{recipient}+", {}).get(f"effect on {column}")
            yield _row("effect (Eq. 4)", table, f"{recipient}+", column, effect, mine)


def _curve(world: World, measured: list[Row] | None) -> Iterator[Row]:
    """The headline: what the smallest window of at least 5 % of the neurons recovers."""
    finding = numbers()["finding"]["curve"]
    for recipient in world.recipients:
        line = [
            row
            for row in measured or ()
            if row["recipient"] == recipient and row["ranking"] and row["control_seed"] is None and row["lo"] == 0
        ]
        enough = [row for row in line if row["share"] >= FIVE_PERCENT]
        row = min(enough, key=lambda row: row["share"], default={"set": "", "effect": None})
        of = f"{row['set']}, {row['share']:.1%}" if enough else ""
        yield _row(finding["what"], finding["table"], recipient, of, finding["value"], row["effect"])


def _agreement(world: World, measured: list[Row] | None) -> Iterator[Row]:
    """The least of all pairs of seeds, as the paper says that all are above."""
    k = experiments.settings_of("stability", world.settings.get("stability", {})).k
    for figure in ("overlap", "spearman"):
        finding, value = numbers()["finding"][figure], None
        if measured:
            ranked = measured[0]["k"] / measured[0]["chance"]
            wanted = k * ranked if isinstance(k, float) else k
            at = min((row["k"] for row in measured), key=lambda have: abs(have - wanted))
            values = [row[figure] for row in measured if row["k"] == at and row[figure] is not None]
            value = min(values) if values else None
        yield _row(finding["what"], finding["table"], "dpo", "", finding["least"], value, "at least")


def _guard(measured: list[Row] | None) -> Iterator[Row]:
    finding = numbers()["finding"]["guard"]
    mine = [row for row in measured or () if row["features"] == "safety"]
    value = max(mine, key=lambda row: row["k"])["accuracy"] if mine else None
    for bound in ("least", "most"):
        yield _row(finding["what"], finding["table"], "sft", "", finding[bound], value, f"at {bound}")


def _tax(world: World, measured: list[Row] | None) -> Iterator[Row]:
    """What patching the shared neurons changes, in both directions."""
    tax = numbers()["tax"]
    for direction, objectives in TAX.items():
        donor, recipient = (world.contrasts[o].against if o in world.contrasts else None for o in objectives)
        for judge, value in tax[direction].items():
            of = world.benchmarks[0] if judge == "cost" else "helpful"
            mine = [
                row["change"]
                for row in measured or ()
                if (row["donor"], row["recipient"], row["judge"], row["set"]) == (donor, recipient, judge, of)
            ]
            what = f"change of mean {judge}"
            yield _row(what, tax["table"], direction.replace("-", " "), of, value, mine[0] if mine else None)
