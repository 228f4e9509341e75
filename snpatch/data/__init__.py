"""Prompts, answers and texts: the paper's data sets, from the hub or from files, and any file with a prompt column.

A prompt that is a text becomes one user turn: the engine puts it into the chat template.
"""

from itertools import islice
from pathlib import Path

from snpatch.data.dataset import Chat, Dataset, Example, question
from snpatch.data.files import find_files, read_rows
from snpatch.data.formats import SETS
from snpatch.data.loading import load
from snpatch.errors import SnpatchError

__all__ = ["SETS", "Chat", "Dataset", "Example", "load", "question", "read_completions"]


def read_completions(path: str | Path, limit: int | None = None) -> list[str]:
    """The `completion` of each row of a file, as `snpatch generate` writes them; limit: only the first so many."""
    rows = (row for file in find_files(Path(path)) for row in read_rows(file, (("completion",),)))
    texts = []
    for row in islice(rows, limit):
        if row.error or not isinstance(row.value, dict) or not isinstance(row.value.get("completion"), str):
            raise SnpatchError(f"{row.where}: {row.error or 'wanted an object with a completion (a text)'}")
        texts.append(row.value["completion"])
    return texts
