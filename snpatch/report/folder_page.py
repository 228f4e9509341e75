"""The page of a folder: what a sweep or experiments left there, gathered for report.page.

Why from files and the store and not from a result: a page can be made of any folder, at any time, also of a sweep that
is still running or was killed.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from snpatch.errors import SnpatchError, first_line
from snpatch.ranking.ranking import Ranking
from snpatch.report.page import Page
from snpatch.schema import parse_json
from snpatch.sweeps.store import NAME, Store, describe_unfinished
from snpatch.sweeps.sweep import Row
from snpatch.sweeps.sweep_file import FILE, SweepSpec

BINS = 50  # of ranks, in the map of a ranking
ROW = {f.name for f in fields(Row)}
LISTED = 500  # rows of an experiment's table that a page shows


def load_page(folder: str | Path) -> Page:
    """All that a folder holds: tables and plots of every report, texts with their scores, rankings."""
    folder = Path(folder)
    tables = {path.stem: found for path in sorted(folder.glob("*.json")) if (found := _table(path)) is not None}
    texts, runs = _texts(folder)
    if not tables and not texts:
        raise SnpatchError(f"{folder} holds no table and no texts of a sweep or an experiment")
    swept = {stem: one for stem, one in tables.items() if one["rows"][0].keys() >= ROW}
    rows = {tuple(row[name] for name in sorted(ROW)): row for one in swept.values() for row in one["rows"]}
    commands = [one["provenance"].get("command") for one in tables.values()] + [run["command"] for run in runs[-1:]]
    return Page(
        title=f"snpatch: {folder.resolve().name}",
        command="\n".join(dict.fromkeys(filter(None, commands))),
        unfinished=describe_unfinished(texts),
        headline=[sentence for one in swept.values() for sentence in one["headline"]],
        provenance={stem: one["provenance"] for stem, one in tables.items()},
        rows=[{name: row.get(name) for name in (*ROW, "state")} for row in rows.values()],
        maps={name: build_rank_map(ranking) for name, ranking in _rankings(folder).items()},
        reports=[_report(folder, stem, one, stem in swept) for stem, one in tables.items()],
        texts=texts,
    )


def build_rank_map(ranking: Ranking, bins: int = BINS) -> dict:
    """Layer x rank: the mean change score of a layer's neurons in each bin of ranks, NaN where it has none there."""
    places, bins = ranking.top(len(ranking)), min(bins, len(ranking))
    scores = torch.ones(len(places)) if ranking.scores is None else ranking.scores[tuple(places.T)]
    cell = places[:, 0] * bins + torch.arange(len(places)) * bins // len(places)
    size = ranking.shape[0] * bins
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, cell, scores.double())
    mean = (total / torch.bincount(cell, minlength=size)).view(-1, bins)
    return {"layers": ranking.shape[0], "bins": bins, "values": mean.tolist()}


def _table(path: Path) -> dict | None:
    """What report.files wrote, or None where the file is something else."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{path}: cannot be read: {first_line(error)}") from error
    if not (isinstance(found, dict) and {"provenance", "headline", "rows"} <= found.keys() and found["rows"]):
        return None
    if not _is_whole(**{name: found[name] for name in ("provenance", "headline", "rows")}):
        raise SnpatchError(f"{path}: damaged: expected the table of a report. Restore a copy, or move it away.")
    return found


def _is_whole(provenance: object, headline: object, rows: object) -> bool:
    """Return True if the parts of a table have the types that report.files writes."""
    if not (isinstance(provenance, dict) and isinstance(headline, list) and isinstance(rows, list)):
        return False
    if not isinstance(provenance.get("command"), str | None) or not all(isinstance(one, str) for one in headline):
        return False
    if not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        return False
    is_swept = rows[0].keys() >= ROW
    return not is_swept or all(isinstance(row[name], str | int | float | None) for row in rows for name in ROW)


def _texts(folder: Path) -> tuple[list[dict], Sequence[dict]]:
    """Texts of the folder's store as a page has them, and its runs."""
    if not (folder / NAME).is_file():
        return [], ()
    with Store(folder, must_exist=True) as store:
        records, runs = store.records(), store.status().runs
    for record in records:
        record["seed"] = record.pop("sample")
    return records, runs


def _rankings(folder: Path) -> dict[str, Ranking]:
    """The rankings that were made here, and those that the sweep's file names, where they still are."""
    paths = {path.stem: path for path in sorted((folder / "rankings").glob("*.safetensors"))}
    if (folder / FILE).is_file():
        rankings = SweepSpec.load(folder / FILE, trust=True).rankings  # nothing else of it is used
        named = {name: one for name, one in rankings.items() if isinstance(one, str)}
        paths |= {name: Path(path) for name, path in named.items() if Path(path).is_file()}
    return {name: Ranking.load(path) for name, path in paths.items()}


def _report(folder: Path, stem: str, table: dict, is_swept: bool) -> dict:
    """An experiment's section: its sentences and plots, and its table where the page has no better view of it."""
    columns = list(table["rows"][0])
    rows = [[_cell(row[name]) for name in columns] for row in table["rows"][:LISTED]]
    image = folder / f"{stem}.png"
    is_own = image.is_file() and image.resolve().is_relative_to(folder.resolve())  # a link may lead to any file
    return {
        "name": stem,
        "headline": table["headline"],
        "tables": {} if is_swept else {stem: {"columns": columns, "rows": rows}},
        "images": [_data_uri(image)] if is_own else [],
    }


def _cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
