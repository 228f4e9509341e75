"""A row of a data file with its place in it, and the columns that a format needs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from snpatch.errors import SnpatchError, one_line

MAX_NAMED = 30  # columns that an error names

# The columns that must be there: all of one of these; or what finds fault with the columns that are there.
Columns = tuple[tuple[str, ...], ...] | Callable[[Iterable[str]], str | None]


@dataclass(frozen=True)
class Row:
    file: str
    unit: str  # what number counts: line (a row's first), row or item
    number: int  # from 1
    value: Any = None
    error: str | None = None  # what is wrong with the row, which then has no value

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


def fault(got: Iterable[str], wanted: Columns) -> str | None:
    """Return what was wanted of the columns and what came; None if they are right."""
    if callable(wanted):
        return wanted(got)
    if any(set(choice) <= set(got) for choice in wanted):
        return None
    return f"{' or '.join(', '.join(choice) for choice in wanted)}, got {named(got)}"


def named(columns: Iterable[str]) -> str:
    """Return the names of columns, as many as an error can show."""
    names = [one_line(str(name)) for name in columns]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more or "none"


def check_columns(where: object, got: Iterable[str], wanted: Columns) -> None:
    """Raise a SnpatchError if columns lack what is wanted."""
    if found := fault(got, wanted):
        raise SnpatchError(f"{where}: wanted the columns {found}")
