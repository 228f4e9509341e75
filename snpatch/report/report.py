"""Report: an experiment's tables, plots, sentences and provenance, and the tables to show on screen.

Why on-screen tables are data and not printed text: a report can be shown in a terminal (terminal.py) or written to
files (files.py), and neither is needed to create one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Columns = Mapping[str, str | Callable[[Row], object]]


@dataclass(frozen=True)
class TableView:
    """A table to show on screen.

    Args:
        columns: Headings.
        rows: Cells of each row: strings, which are shown as they are, or values.
        title: Shown above the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    title: str | None = None

    @classmethod
    def from_rows(cls, rows: Sequence, columns: Columns, title: str | None = None) -> Self:
        """Build a table from rows. columns: heading -> key of the rows, or a function from a row to a cell."""
        cells = (tuple(row[how] if isinstance(how, str) else how(row) for how in columns.values()) for row in rows)
        return cls(tuple(columns), tuple(cells), title)


@dataclass(frozen=True)
class Report:
    """The results of an experiment.

    Args:
        name: Stem of the file of records.
        tables: File stem -> rows, which all have the same keys.
        plots: File stem -> figure.
        displays: Tables to show on screen.
        headline: Sentences that state the results.
        provenance: Models, data, settings and versions that the tables depend on.
        records: Completions with their scores.
        notes: Remarks about how the results were made, and failures.
    """

    name: str
    tables: dict[str, list[Row]]
    plots: dict[str, "Figure"]
    displays: tuple[TableView, ...]
    headline: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
