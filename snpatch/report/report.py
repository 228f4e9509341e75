"""Report: what an experiment leaves behind: tables (CSV, JSON with provenance), plots (PNG, SVG), sentences.

Why rows are plain dicts: every experiment's table goes through the same two writers and the same printer.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from snpatch.files import whole_file, write_text

Row = dict[str, object]
Columns = Mapping[str, str | Callable[[Row], object]]


@dataclass(frozen=True)
class Report:
    """tables: file stem -> rows, which all have the same keys. plots: file stem -> figure. headline: what was found.

    shown: the terminal's table. provenance: goes into each table's JSON file. records: texts behind the figures.
    """

    name: str
    tables: dict[str, list[Row]]
    plots: dict[str, Figure]
    shown: Table
    headline: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)

    def write(self, folder: str | Path) -> list[Path]:
        """STEM.csv and STEM.json of each table, STEM.png and STEM.svg of each plot, NAME-records.jsonl; their paths."""
        folder = Path(folder)
        texts = {}
        for stem, rows in self.tables.items():
            texts[f"{stem}.csv"] = _csv(rows)
            kept = {"provenance": self.provenance, "headline": self.headline, "rows": rows}
            texts[f"{stem}.json"] = json.dumps(kept, indent=1) + "\n"
        if self.records:
            texts[f"{self.name}-records.jsonl"] = "".join(json.dumps(record) + "\n" for record in self.records)
        for name, text in texts.items():
            write_text(folder / name, text)
        paths = [folder / name for name in texts]
        for stem, figure in self.plots.items():
            for kind in ("png", "svg"):
                paths.append(folder / f"{stem}.{kind}")
                with whole_file(paths[-1]) as partial:
                    figure.savefig(partial, format=kind, dpi=130)
        return paths

    def print(self, console: Console) -> None:
        """The table and the sentences."""
        console.print(self.shown)
        for sentence in self.headline:
            console.print(sentence, highlight=False, soft_wrap=True)


def table_of(rows: Sequence[Row], columns: Columns, title: str | None = None) -> Table:
    """The terminal's table: column's heading -> key of the rows, or what makes a cell of a row."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(cell(row[how] if isinstance(how, str) else how(row)) for how in columns.values()))
    return table


def cell(value: object) -> str:
    """A cell's text: numbers short, None empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value and (abs(value) < 0.01 or abs(value) >= 1e4) else f"{value:.2f}"
    return str(value)


def span(row: Row, name: str, form: Callable[[object], str] = cell) -> str:
    """ "low .. high" of a figure of the row, empty where it is undefined."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{form(low)} .. {form(high)}"


def between(values: Sequence[float], form: Callable[[object], str] = cell) -> str:
    """The range of several figures, or the one that they all are."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"


def percent(value: float | None) -> str:
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.0%}"  # no -0%


def p_value(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
