"""Pages: a sweep, its texts and the experiments beside it as one HTML file, to be opened anywhere and kept for good.

Why texts are gzipped pieces inside the page: ten thousand completions open at once, as a browser unpacks only those
that are looked at, and a page needs no server and no network. A policy in its head runs only the scripts of `assets/`,
so that no completion can.
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
from snpatch.files import write_text

ASSETS = Path(__file__).parent / "assets"
PIECE = 500  # texts that a browser unpacks at once
CASE = ("set", "prompt_index", "seed", "prompt")
TEXT = ("state", "error", "finish_reason", "overwrites", "scores")
SHOWN = ("command", "unfinished", "headline", "provenance", "rows", "maps", "reports")
POINT = ("recipient", "donor", "ranking", "control_seed", "lo", "hi", "strength")


@dataclass(frozen=True)
class Page:
    """What a page shows, as plain data; a figure that is no finite number is shown as undefined.

    command: what made it. unfinished: how many of its texts are written, None where all are. rows: one a judge and
    point: judge, set, recipient, donor, ranking (None: unpatched), control_seed, lo, hi, strength, share, prompts,
    tokens, overwrites, mean, effect and net (the effect without that of its random controls), each with _low and _high,
    p_unpatched, p_control, state (whole, or how many prompts it is of). maps: ranking -> layers, bins, values
    [layers][bins]. reports: name, headline, tables (title -> columns, rows), images (data URIs). texts: those of CASE
    and POINT, state (done, open or failed), completion, error, finish_reason, overwrites, scores (judge -> number).
    """

    title: str
    command: str
    unfinished: str | None = None
    headline: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    maps: dict[str, dict] = field(default_factory=dict)
    reports: list[dict] = field(default_factory=list)
    texts: list[dict] = field(default_factory=list)


def write_page(path: str | Path, page: Page) -> Path:
    """The page as one HTML file."""
    try:
        write_text(path, _document(page))
    except RecursionError:
        raise SnpatchError(f"{path}: expected plain tables and provenance, got some nested too deep.") from None
    return Path(path)


def _document(page: Page) -> str:
    plotly, *own = (_asset(name) for name in ("plotly-cartesian.min.js", "dom.js", "plots.js", "texts.js", "page.js"))
    code = "".join(own)
    shown = {name: getattr(page, name) for name in SHOWN}
    index, completions = _indexed(page.texts)
    pieces = [index, *(completions[at : at + PIECE] for at in range(0, len(completions), PIECE))]
    return Template(_asset("page.html")).substitute(
        title=html.escape(page.title),
        policy=" ".join(map(_digest, (plotly, code))),
        css=_asset("page.css"),
        plotly=plotly,
        code=code,
        data=_json(shown).replace("<", r"\u003c"),
        texts="\n".join(f'<script type="application/json-gz">{_packed(piece)}</script>' for piece in pieces),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _indexed(texts: Sequence[dict]) -> tuple[dict, list[str | None]]:
    """Texts in the order of their prompts, so that a prompt's are in one piece: all but the completions, and these."""
    cases: dict[tuple, int] = {}
    points: dict[tuple, int] = {}
    placed = []
    for text in texts:
        case = cases.setdefault(tuple(text[name] for name in CASE), len(cases))
        placed.append((case, points.setdefault(tuple(text[name] for name in POINT), len(points)), text))
    placed.sort(key=lambda place: place[:2])
    index = {
        "piece": PIECE,
        "cases": [dict(zip(CASE, case, strict=True)) for case in cases],
        "points": [dict(zip(POINT, point, strict=True)) for point in points],
        "texts": [{"case": case, "point": point} | {name: text[name] for name in TEXT} for case, point, text in placed],
    }
    return index, [text["completion"] for *_, text in placed]


def _packed(value: object) -> str:
    """Gzipped JSON as base64, the same for the same value."""
    return base64.b64encode(gzip.compress(_json(value).encode(), mtime=0)).decode()


def _json(value: object) -> str:
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: object) -> object:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _digest(script: str) -> str:
    """A script's name in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
