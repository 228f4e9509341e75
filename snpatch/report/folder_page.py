"""Loader of a results folder's page: tables, plots, completions and rankings, collected for report.page.

Why it reads files and the store instead of a result object: a page can be made from any folder at any time, also from
a sweep that is still running or was killed.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import chain
from pathlib import Path

import torch

from snpatch.errors import SnpatchError, first_line
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import describe_score
from snpatch.report.page import Page
from snpatch.sweeps.rows import Row
from snpatch.sweeps.store import STORE_FILE, Store, describe_unfinished
from snpatch.sweeps.sweep_file import SPEC_FILE, SweepSpec
from snpatch.utils.schema import parse_json

RANK_BINS = 50
SWEEP_COLUMNS = tuple(f.name for f in fields(Row))
REQUIRED_COLUMNS = {f.name for f in fields(Row) if f.default is MISSING}  # tables of an older snpatch lack the others
MAX_TABLE_ROWS = 500


def load_page(folder: str | Path) -> Page:
    """Read a folder's tables, plots, completions with scores, and rankings.

    Raises:
        SnpatchError: The folder has neither tables nor completions, or one of its files is damaged.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    tables = {path.stem: table for path in paths if (table := _load_table(path)) is not None}
    completions, runs = _load_completions(folder)
    if not tables and not completions:
        raise SnpatchError(f"{folder} holds no table and no completions of a sweep or an experiment")
    sweeps = {stem: table for stem, table in tables.items() if _is_sweep(table["rows"])}
    all_rows = [row for table in sweeps.values() for row in table["rows"]]
    rows = {tuple(row.get(name) for name in SWEEP_COLUMNS): row for row in all_rows}.values()
    unfinished = describe_unfinished(completions)
    headline = _join_distinct(table["headline"] for table in sweeps.values() if _is_drawn(table["rows"]))
    notes = _join_distinct(table.get("notes", []) for table in tables.values())
    commands = [table["provenance"].get("command") for table in tables.values()] + [run["command"] for run in runs[-1:]]
    judges = {row["judge"] for row in rows} | {judge for record in completions for judge in record["scores"]}
    return Page(
        title=f"snpatch: {folder.resolve().name}",
        command="\n".join(dict.fromkeys(filter(None, commands))),
        unfinished=unfinished,
        headline=headline,
        notes=[note for note in notes if note != unfinished],
        provenance={stem: table["provenance"] for stem, table in tables.items()},
        rows=[{name: row.get(name) for name in (*SWEEP_COLUMNS, "state")} for row in rows],
        score_names={judge: describe_score(judge) for judge in sorted(map(str, judges))},
        maps={name: build_rank_map(ranking) for name, ranking in _load_rankings(folder).items()},
        reports=_build_sections(folder, tables, headline),
        completions=completions,
    )


def build_rank_map(ranking: Ranking, bins: int = RANK_BINS) -> dict:
    """Compute the mean change score of each layer's neurons in each bin of ranks.

    Returns:
        {layers, bins, values [layers][bins]}. A value is NaN where a layer has no neuron in a bin, and 1 where it has
        if the ranking has no scores.
    """
    neurons, bins = ranking.top(len(ranking)), min(bins, len(ranking))
    scores = torch.ones(len(neurons)) if ranking.scores is None else ranking.scores[tuple(neurons.T)]
    cells = neurons[:, 0] * bins + torch.arange(len(neurons)) * bins // len(neurons)
    num_cells = ranking.shape[0] * bins
    total = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, cells, scores.double())
    mean = (total / torch.bincount(cells, minlength=num_cells)).view(-1, bins)
    return {"layers": ranking.shape[0], "bins": bins, "values": mean.tolist()}


def _load_table(path: Path) -> dict | None:
    """Read a table that report.files wrote; None for any other file."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{path}: cannot be read: {first_line(error)}") from error
    parts = ("provenance", "headline", "rows")
    if not (isinstance(data, dict) and set(parts) <= data.keys() and data["rows"]):
        return None
    if not _is_valid_table(**{name: data[name] for name in parts}, notes=data.get("notes", [])):
        raise SnpatchError(f"{path}: damaged: expected the table of a report. Restore a copy, or move it away.")
    return data


def _is_valid_table(provenance: object, headline: object, rows: object, notes: object) -> bool:
    """Return True if the parts of a table have the types that report.files writes."""
    if not (isinstance(provenance, dict) and isinstance(rows, list)):
        return False
    if not isinstance(provenance.get("command"), str | None):
        return False
    if not all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in (headline, notes)):
        return False
    if not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        return False
    if not _is_sweep(rows):
        return True
    return all(isinstance(row.get(name), str | int | float | None) for row in rows for name in SWEEP_COLUMNS)


def _is_sweep(rows: list[dict]) -> bool:
    return rows[0].keys() >= REQUIRED_COLUMNS


def _is_drawn(rows: list[dict]) -> bool:
    """Return True for the rows of a sweep's own report: the page's figure shows all that its plot does."""
    return _is_sweep(rows) and rows[0].keys() <= {*SWEEP_COLUMNS, "state"}


def _join_distinct(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(lists)))


def _load_completions(folder: Path) -> tuple[list[dict], Sequence[dict]]:
    """Read the completions of the folder's store as a page's records, and the store's runs."""
    if not (folder / STORE_FILE).is_file():
        return [], ()
    with Store(folder, must_exist=True) as store:
        records, runs = store.records(), store.status().runs
    for record in records:
        record["seed"] = record.pop("sample")
    return records, runs


def _load_rankings(folder: Path) -> dict[str, Ranking]:
    """Load the rankings that were computed in this folder, and those of its sweep file that still exist."""
    paths = {path.stem: path for path in sorted((folder / "rankings").glob("*.safetensors"))}
    if (folder / SPEC_FILE).is_file():
        rankings = SweepSpec.load(folder / SPEC_FILE, trust=True).rankings  # trusted: nothing else of the file is used
        sources = {name: Path(source) for name, source in rankings.items() if isinstance(source, str)}
        paths |= {name: path for name, path in sources.items() if path.is_file()}
    return {name: Ranking.load(path) for name, path in paths.items()}


def _build_sections(folder: Path, tables: Mapping[str, dict], headline: Sequence[str]) -> list[dict]:
    """Build the experiments' sections.

    Rows of sweeps and sentences that the page shows elsewhere are left out.
    """
    sections, shown = [], set(headline)
    for stem, table in tables.items():
        section = {
            "name": stem,
            "headline": [sentence for sentence in table["headline"] if sentence not in shown],
            "tables": {} if _is_sweep(table["rows"]) else {stem: _build_table(table["rows"])},
            "images": [] if _is_drawn(table["rows"]) else _load_images(folder, stem),
        }
        shown.update(section["headline"])
        if section["headline"] or section["tables"] or section["images"]:
            sections.append(section)
    return sections


def _build_table(rows: list[dict]) -> dict:
    columns = list(rows[0])
    return {"columns": columns, "rows": [[_to_cell(row[name]) for name in columns] for row in rows[:MAX_TABLE_ROWS]]}


def _load_images(folder: Path, stem: str) -> list[str]:
    """Return the data URI of a table's plot, if it has one in the folder."""
    image = folder / f"{stem}.png"
    is_inside = image.is_file() and image.resolve().is_relative_to(folder.resolve())  # a link may lead to any file
    return [_to_data_uri(image)] if is_inside else []


def _to_cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _to_data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
