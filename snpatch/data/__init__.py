"""Prompts, answers and texts: the paper's data sets, from the hub or from files, and any file with a prompt column.

A prompt that is a text becomes one user turn: the engine puts it into the chat template.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten

from snpatch.data.dataset import Chat, Dataset, Example, question
from snpatch.data.file_reader import find_files, read_rows
from snpatch.data.formats import DATASETS, RowError
from snpatch.data.generic import asked_of
from snpatch.data.loading import load_dataset
from snpatch.data.source_row import Row
from snpatch.errors import SnpatchError

SHOWN = 80  # characters of a prompt in an error

__all__ = ["DATASETS", "Chat", "Dataset", "Example", "load_dataset", "question", "read_completions"]


def read_completions(path: str | Path, limit: int | None = None, prompts: Sequence[Chat] | None = None) -> list[str]:
    """The `completion` of each row of a file, as `snpatch generate` writes them.

    limit: only the first so many. prompts: whose completions they are; a row that names another prompt, and another
    number of rows, are errors.
    """
    rows = (row for file in find_files(Path(path)) for row in read_rows(file, (("completion",),)))
    texts = []
    for row in islice(rows, limit):
        if row.error or not isinstance(row.value, dict) or not isinstance(row.value.get("completion"), str):
            raise SnpatchError(f"{row.where}: {row.error or 'wanted an object with a completion (a text)'}")
        if prompts is not None and len(texts) < len(prompts):
            _check_prompt(row, prompts[len(texts)])
        texts.append(row.value["completion"])
    if prompts is not None and len(texts) != len(prompts):
        raise SnpatchError(f"{path}: {len(prompts)} prompts and {len(texts)} completions: wanted one for each")
    return texts


def _check_prompt(row: Row, chat: Chat) -> None:
    """Raise a SnpatchError if a completion's row names another prompt: its last question, or all of its turns."""
    try:
        told = asked_of(row.value)
    except RowError as error:
        raise SnpatchError(f"{row.where}: {error}") from None
    if told is None or told == chat or (len(told) == 1 and told[0]["content"] == question(chat).strip()):
        return
    wanted, got = (shorten(question(one), SHOWN, placeholder="...") for one in (chat, told))
    raise SnpatchError(f"{row.where}: wanted the completion of the prompt {wanted!r}, got that of {got!r}")
