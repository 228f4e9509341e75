"""Rows of data sources with their location, and the check of a source's columns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from snpatch.errors import SnpatchError, one_line

MAX_LISTED_COLUMNS = 30  # in an error

# Required columns: all of one of these tuples; or a function from the columns to what is wrong with them (or None).
Columns = tuple[tuple[str, ...], ...] | Callable[[Iterable[str]], str | None]


@dataclass(frozen=True)
class SourceRow:
    """A row of a file or of a hub dataset."""

    file: str
    unit: str  # meaning of `number`: line (the row's first), row or item
    number: int  # from 1
    value: Any = None
    error: str | None = None  # why the row could not be read; it has no value then

    @property
    def location(self) -> str:
        """Return the row's place as error messages give it, such as "prompts.jsonl, line 3"."""
        return f"{self.file}, {self.unit} {self.number}"


def find_column_error(columns: Iterable[str], required: Columns) -> str | None:
    """Return "<required columns>, got <columns>" if required columns are missing, else None."""
    if callable(required):
        return required(columns)
    if any(set(choice) <= set(columns) for choice in required):
        return None
    return f"{' or '.join(', '.join(choice) for choice in required)}, got {list_columns(columns)}"


@lru_cache(maxsize=4096)
def normalize_column(name: str) -> str:
    """Return a column's name in the form in which names are compared."""
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def is_turns_column(name: str) -> bool:
    """Return whether a list of strings in this column is a conversation: LIMA's, or MT-bench's user turns."""
    return normalize_column(name) in ("turns", "conversation", "conversations")


def list_columns(columns: Iterable[str]) -> str:
    """Return column names separated by commas, at most MAX_LISTED_COLUMNS of them; '' is an unnamed one."""
    names = [one_line(str(name)) or "''" for name in columns]
    more = f" and {len(names) - MAX_LISTED_COLUMNS} more" if len(names) > MAX_LISTED_COLUMNS else ""
    return ", ".join(names[:MAX_LISTED_COLUMNS]) + more or "none"


def check_columns(source: object, columns: Iterable[str], required: Columns) -> None:
    """Raise a SnpatchError if required columns are missing."""
    if error := find_column_error(columns, required):
        raise SnpatchError(f"{source}: expected the columns {error}")
