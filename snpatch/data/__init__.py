"""Datasets: prompts, answers and text of the paper's datasets (hub or files) and of any file with a prompt column.

A prompt that is a string becomes one user message, which the engine renders with the chat template.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten

from snpatch.data.dataset import Chat, Dataset, Example, question
from snpatch.data.file_reader import find_files, read_rows
from snpatch.data.formats import DATASETS, RowError
from snpatch.data.generic import parse_completion_prompt
from snpatch.data.loading import load_dataset
from snpatch.data.source_row import SourceRow
from snpatch.errors import SnpatchError

MAX_PROMPT_CHARS = 80  # in an error

__all__ = ["DATASETS", "Chat", "Dataset", "Example", "load_dataset", "question", "read_completions"]


def read_completions(path: str | Path, limit: int | None = None, prompts: Sequence[Chat] | None = None) -> list[str]:
    """Return the `completion` of each row of a file, as written by `snpatch generate`.

    Args:
        path: File, or folder of files.
        limit: Maximum number of rows.
        prompts: Prompts of the completions, in the same order.

    Raises:
        SnpatchError: A row has no completion or names another prompt, or the number of rows and prompts differ.
    """
    rows = (row for file in find_files(Path(path)) for row in read_rows(file, (("completion",),)))
    completions = []
    for row in islice(rows, limit):
        if row.error or not isinstance(row.value, dict) or not isinstance(row.value.get("completion"), str):
            raise SnpatchError(f"{row.location}: {row.error or 'expected an object with a completion (a text)'}")
        if prompts is not None and len(completions) < len(prompts):
            _check_prompt(row, prompts[len(completions)])
        completions.append(row.value["completion"])
    if prompts is not None and len(completions) != len(prompts):
        raise SnpatchError(
            f"{path}: expected one completion for each of {len(prompts)} prompts, got {len(completions)}"
        )
    return completions


def _check_prompt(row: SourceRow, chat: Chat) -> None:
    """Raise a SnpatchError if a completion's row names another prompt (as last user message, or as chat)."""
    try:
        prompt = parse_completion_prompt(row.value)
    except RowError as error:
        raise SnpatchError(f"{row.location}: {error}") from None
    if prompt is None or prompt == chat or (len(prompt) == 1 and prompt[0]["content"] == question(chat).strip()):
        return
    expected, got = (shorten(question(turns), MAX_PROMPT_CHARS, placeholder="...") for turns in (chat, prompt))
    raise SnpatchError(f"{row.location}: expected the completion of the prompt {expected!r}, got that of {got!r}")
