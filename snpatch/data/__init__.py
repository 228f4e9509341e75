"""Datasets: prompts, answers and text of the paper's datasets (hub or files) and of any file with a prompt column.

A prompt that is a string becomes one user message, which the engine renders with the chat template.
"""

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten

from snpatch.data.dataset import Chat, Dataset, Example, question
from snpatch.data.file_reader import find_files, read_rows
from snpatch.data.formats import DATASETS, RowError
from snpatch.data.generic import parse_completion_prompt
from snpatch.data.loading import load_dataset
from snpatch.data.source_row import SourceRow, list_columns
from snpatch.errors import SnpatchError, one_line

logger = logging.getLogger(__name__)
MAX_PROMPT_CHARS = 80  # in an error

__all__ = ["DATASETS", "Chat", "Dataset", "Example", "load_dataset", "question", "read_completions"]


def read_completions(
    path: str | Path, limit: int | None = None, prompts: Sequence[Chat] | None = None, column: str | None = None
) -> list[str]:
    """Return the `completion` of each row of a file, as written by `snpatch generate`.

    Args:
        path: File, or folder of files.
        limit: Maximum number of rows.
        prompts: Prompts of the completions, in the same order. Rows that name no prompt are paired by position, and a
            warning is logged.
        column: Column with the prompt, as for the prompts' own file; None, or not in a row: found by its name.

    Raises:
        SnpatchError: A row has no completion or names another prompt, or the number of rows and prompts differ.
    """
    rows = (row for file in find_files(Path(path)) for row in read_rows(file, (("completion",),)))
    completions, unnamed_rows = [], []
    for row in islice(rows, limit):
        if row.error or not isinstance(row.value, dict) or not isinstance(row.value.get("completion"), str):
            raise SnpatchError(f"{row.location}: {row.error or 'expected an object with a completion (a text)'}")
        if (
            prompts is not None
            and len(completions) < len(prompts)
            and not _check_prompt(row, prompts[len(completions)], column)
        ):
            unnamed_rows.append(row)
        completions.append(row.value["completion"])
    if prompts is not None and len(completions) != len(prompts):
        raise SnpatchError(
            f"{path}: expected one completion for each of {len(prompts)} prompts, got {len(completions)}"
        )
    if unnamed_rows:
        columns = list_columns(dict.fromkeys(name for row in unnamed_rows for name in row.value))
        logger.warning(
            one_line(
                f"{path}: {len(unnamed_rows)} of {len(completions)} rows name no prompt (columns: {columns}): they are "
                "paired with the prompts by position"
            )
        )
    return completions


def _check_prompt(row: SourceRow, chat: Chat, column: str | None) -> bool:
    """Return whether a completion's row names its prompt (as last user message, or as chat).

    Raises:
        SnpatchError: It names another prompt.
    """
    try:
        prompt = parse_completion_prompt(row.value, column)
    except RowError as error:
        raise SnpatchError(f"{row.location}: {error}") from None
    if prompt is None:
        return False
    if prompt == chat or (len(prompt) == 1 and prompt[0]["content"] == question(chat).strip()):
        return True
    expected, got = (shorten(question(turns), MAX_PROMPT_CHARS, placeholder="...") for turns in (chat, prompt))
    raise SnpatchError(f"{row.location}: expected the completion of the prompt {expected!r}, got that of {got!r}")
