"""Report: what an experiment leaves behind: tables, plots, sentences, provenance, and a view of it for people.

Why the view is data and no printed table: the terminal is one way to show it (terminal.py), files are another
(files.py), and neither is needed to have a report.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, object]
Columns = Mapping[str, str | Callable[[Row], object]]


@dataclass(frozen=True)
class TableView:
    """A table for people. columns: headings; rows: their cells, texts that stand as they are, or values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    title: str | None = None

    @classmethod
    def from_rows(cls, rows: Sequence, columns: Columns, title: str | None = None) -> Self:
        """columns: heading -> key of the rows, or what makes a cell of a row."""
        cells = (tuple(row[how] if isinstance(how, str) else how(row) for how in columns.values()) for row in rows)
        return cls(tuple(columns), tuple(cells), title)


@dataclass(frozen=True)
class Report:
    """tables: file stem -> rows, which all have the same keys. plots: file stem -> figure. headline: what was found.

    display: what people see first. provenance: what the tables hang on. records: texts behind the figures.
    """

    name: str
    tables: dict[str, list[Row]]
    plots: dict[str, "Figure"]
    display: TableView
    headline: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
