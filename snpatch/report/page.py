"""HTML page: a sweep, its completions and the experiments of a folder in one self-contained file.

Why completions are gzipped chunks inside the page: a page with ten thousand completions opens at once, because the
browser unpacks only the chunks that are displayed, and it needs no server and no network. A content security policy in
the page's head allows only the scripts of `assets/`, so no completion can run code.
"""

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from snpatch.errors import SnpatchError
from snpatch.utils.files import write_text

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("dom.js", "plots.js", "completions.js", "page.js")
COMPLETIONS_PER_CHUNK = 500
CASE_FIELDS = ("set", "prompt_index", "seed", "prompt")
POINT_FIELDS = ("recipient", "donor", "ranking", "control", "control_seed", "rank_lo", "rank_hi", "strength")
RECORD_FIELDS = ("state", "error", "finish_reason", "overwrites", "scores")
DATA_FIELDS = ("command", "unfinished", "headline", "notes", "provenance", "rows", "score_names", "maps", "reports")


@dataclass(frozen=True)
class Page:
    """The content of a page as plain data. NaN and infinity are shown as undefined.

    Args:
        title: Heading of the page.
        command: Command that made the results.
        unfinished: Number of completions that are written, as a sentence; None if all are.
        headline: Sentences that state the results.
        notes: Remarks about how the results were made, and failures; folded at the end of the page.
        provenance: Table -> its provenance.
        rows: One row per judge and point: judge, set, POINT_FIELDS (ranking None: unpatched), prompts, tokens,
            overwrites, state ("whole", or the number of prompts that count), the other columns of a sweep's row, and
            each estimate with its `_low` and `_high`.
        score_names: Judge -> name of its score with the direction ("cost (lower is safer)").
        maps: Ranking -> {layers, bins, values [layers][bins]}.
        reports: One per experiment: name, headline, tables (title -> columns, rows), images (data URIs).
        completions: Records with CASE_FIELDS, POINT_FIELDS, RECORD_FIELDS and completion. state: done, open or failed;
            scores: judge -> number.
    """

    title: str
    command: str
    unfinished: str | None = None
    headline: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    score_names: dict[str, str] = field(default_factory=dict)
    maps: dict[str, dict] = field(default_factory=dict)
    reports: list[dict] = field(default_factory=list)
    completions: list[dict] = field(default_factory=list)


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page as one HTML file and return its path."""
    try:
        write_text(path, _render(page))
    except RecursionError:
        raise SnpatchError(f"{path}: expected plain tables and provenance, got some nested too deep.") from None
    return Path(path)


def _render(page: Page) -> str:
    plotly, scripts = _read_asset("plotly-cartesian.min.js"), "".join(map(_read_asset, SCRIPTS))
    index, completions = _index_completions(page.completions)
    starts = range(0, len(completions), COMPLETIONS_PER_CHUNK)
    chunks = [index, *(completions[start : start + COMPLETIONS_PER_CHUNK] for start in starts)]
    return Template(_read_asset("page.html")).substitute(
        title=html.escape(page.title),
        policy=" ".join(map(_script_hash, (plotly, scripts))),
        css=_read_asset("page.css"),
        plotly=plotly,
        code=scripts,
        data=_to_json({name: getattr(page, name) for name in DATA_FIELDS}).replace("<", r"\u003c"),
        chunks="\n".join(f'<script type="application/json-gz">{_compress(chunk)}</script>' for chunk in chunks),
    )


def _read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _index_completions(records: Sequence[dict]) -> tuple[dict, list[str | None]]:
    """Sort records by prompt; return their index and the completions.

    A prompt's completions then share a chunk. The index lists each case (prompt) and point once; its records refer to
    them by number.
    """
    cases: dict[tuple, int] = {}
    points: dict[tuple, int] = {}
    numbered = []
    for record in records:
        case = cases.setdefault(tuple(record[name] for name in CASE_FIELDS), len(cases))
        point = points.setdefault(tuple(record[name] for name in POINT_FIELDS), len(points))
        numbered.append((case, point, record))
    numbered.sort(key=lambda entry: entry[:2])
    index = {
        "chunk_size": COMPLETIONS_PER_CHUNK,
        "cases": [dict(zip(CASE_FIELDS, case, strict=True)) for case in cases],
        "points": [dict(zip(POINT_FIELDS, point, strict=True)) for point in points],
        "records": [
            {"case": case, "point": point} | {name: record[name] for name in RECORD_FIELDS}
            for case, point, record in numbered
        ],
    }
    return index, [record["completion"] for *_, record in numbered]


def _compress(value: object) -> str:
    """Return gzipped JSON as base64; equal values give equal text."""
    return base64.b64encode(gzip.compress(_to_json(value).encode(), mtime=0)).decode()


def _to_json(value: object) -> str:
    return json.dumps(_replace_non_finite(value), allow_nan=False, separators=(",", ":"))


def _replace_non_finite(value: object) -> object:
    """Return the value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _replace_non_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return value


def _script_hash(script: str) -> str:
    """Return a script's hash source for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
