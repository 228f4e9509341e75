"""A row of a data file with its place in it, and the columns that a format needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snpatch.errors import SnpatchError

Columns = tuple[tuple[str, ...], ...]  # the columns that must be there: all of one of these


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


def check_columns(where: object, got: Sequence[str], wanted: Columns) -> None:
    """SnpatchError unless all columns of one of the choices are there."""
    if not any(set(choice) <= set(got) for choice in wanted):
        choices = " or ".join(", ".join(choice) for choice in wanted)
        raise SnpatchError(f"{where}: wanted the columns {choices}, got {', '.join(got) or 'none'}")
