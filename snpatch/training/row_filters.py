"""Checks of training rows, and the filters that drop uninformative ones and count each.

Filters work on token ids, because two answers that differ as strings may be equal as tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any

from snpatch.data.dataset import TrainingRows
from snpatch.errors import SnpatchError
from snpatch.models.templates import ROLES
from snpatch.training.settings import DpoSettings, TrainSettings

IGNORED_LABEL = -100  # of tokens that the loss skips


@dataclass
class RowStats:
    """Counts of a dataset's rows: all, truncated, and dropped by reason."""

    rows: int
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)

    @classmethod
    def start(cls, rows: int, dropped_before: Mapping[str, int]) -> "RowStats":
        """Return the counts of `rows` rows, plus those that were dropped before, by reason."""
        return cls(rows + sum(dropped_before.values()), dropped=Counter(dropped_before))

    @property
    def summary_lines(self) -> list[str]:
        """Return one line per reason for dropped rows, and one for truncated rows."""
        lines = [f"dropped {count} of {self.rows} rows: {reason}" for reason, count in self.dropped.most_common()]
        if self.truncated:
            lines.append(f"truncated {self.truncated} of {self.rows} rows at max_length")
        return lines

    def check_dropped(self, settings: TrainSettings) -> None:
        """Raise if more rows were dropped than `max_dropped` allows, or all."""
        dropped = self.dropped.total()
        if dropped == self.rows or dropped > settings.max_dropped * self.rows:
            raise SnpatchError(
                f"training data: {'; '.join(self.summary_lines)}: more than max_dropped = {settings.max_dropped} of "
                "the rows"
            )


def count_dropped(rows: Sequence[Mapping]) -> dict[str, int]:
    """Return how many examples of a dataset gave no training row, by reason."""
    return dict(rows.dropped) if isinstance(rows, TrainingRows) else {}


def filter_conversations(
    dataset, settings: TrainSettings, context: int, dropped_before: Mapping[str, int] = MappingProxyType({})
) -> tuple[Any, RowStats]:
    """Truncate tokenized conversations at max_length and drop those without a label.

    Args:
        dataset: Tokenized dataset with columns `input_ids` and `labels`.
        settings: Limits.
        context: Longest sequence of the model in tokens; a longer row is an error.
        dropped_before: Rows that were dropped when the data was read, by reason.

    Returns:
        The filtered dataset and its counts.
    """
    stats = RowStats.start(len(dataset), dropped_before)
    limit = settings.max_length
    kept_rows = []
    for index, (ids, labels) in enumerate(_columns(dataset, "input_ids", "labels")):
        if all(label == IGNORED_LABEL for label in labels[:limit]):
            stats.dropped[f"no assistant token within max_length = {limit}"] += 1
        else:
            kept_rows.append(index)
            stats.truncated += len(ids) > limit
            _check_context(index, min(len(ids), limit), context)
    stats.check_dropped(settings)
    dataset = dataset.select(kept_rows)
    if stats.truncated:
        dataset = dataset.map(lambda row: {name: row[name][:limit] for name in ("input_ids", "labels")})
    return dataset, stats


def filter_pairs(
    dataset, rows: int, settings: DpoSettings, context: int, dropped_before: Mapping[str, int] = MappingProxyType({})
) -> tuple[Any, RowStats]:
    """Drop uninformative tokenized preference pairs.

    Args:
        dataset: Tokenized dataset with columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        rows: Number of rows before TRL dropped those whose prompt fills max_length.
        settings: Limits.
        context: Longest sequence of the model in tokens; a longer row is an error.
        dropped_before: Rows that were dropped when the data was read, by reason.

    Returns:
        The filtered dataset and its counts.
    """
    stats = RowStats.start(rows, dropped_before)
    if too_long := rows - len(dataset):
        stats.dropped[f"prompt not shorter than max_length = {settings.max_length} tokens"] = too_long
    kept_rows, prompt_end = [], dataset[0]["prompt_ids"][-1:] if len(dataset) else []
    for index, (prompt, chosen, rejected) in enumerate(_columns(dataset, "prompt_ids", "chosen_ids", "rejected_ids")):
        remaining = settings.max_length - len(prompt)
        if prompt[-1:] != prompt_end:  # TRL has cut the prompt to the common beginning of both answers' texts
            stats.dropped["the template does not render the prompt as the beginning of its answers"] += 1
        elif len(prompt) > settings.max_prompt_length:
            stats.dropped[f"prompt longer than max_prompt_length = {settings.max_prompt_length} tokens"] += 1
        elif chosen == rejected:
            stats.dropped["chosen and rejected are the same tokens"] += 1
        elif chosen[:remaining] == rejected[:remaining]:
            stats.dropped["chosen and rejected are the same tokens up to max_length"] += 1
        else:
            kept_rows.append(index)
            longest = max(len(chosen), len(rejected))
            stats.truncated += longest > remaining
            _check_context(index, len(prompt) + min(longest, remaining), context)
    stats.check_dropped(settings)
    return dataset.select(kept_rows), stats


def check_columns(rows: Sequence[Mapping], columns: Sequence[str]) -> None:
    """Raise unless there are rows and each has these columns."""
    expected = f"training data: expected rows with {', '.join(columns)}"
    if not len(rows):
        raise SnpatchError(f"{expected}, got none")
    for index, row in enumerate(rows):
        if not row.keys() >= set(columns):
            raise SnpatchError(f"{expected}, row {index} has {', '.join(row)}")


def _check_context(index: int, length: int, context: int) -> None:
    if length > context:
        raise SnpatchError(
            f"training data: expected at most {context} tokens, the model's context, got {length} in row {index} of "
            f"those that TRL kept. Set max_length = {context} or less"
        )


def check_roles(rows: Sequence[Mapping], template: str) -> None:
    """Raise for a role that the Tulu template does not have; a tokenizer's own template raises itself."""
    for index, row in enumerate(rows if template == "tulu" else ()):
        for turn in chain(*(row[name] for name in ("messages", "prompt", "chosen", "rejected") if name in row)):
            if turn["role"] not in ROLES:
                roles = ", ".join(ROLES)
                raise SnpatchError(
                    f"training data: row {index}: expected a role of the Tulu template ({roles}), got {turn['role']!r}"
                )


def check_answered(rows: Sequence[Mapping]) -> None:
    """Raise for a conversation without an assistant turn."""
    for index, row in enumerate(rows):
        if not any(turn["role"] == "assistant" for turn in row["messages"]):
            raise SnpatchError(f"training data: row {index} has no assistant turn")


def check_ends(row: Mapping[str, Sequence[int]], special: Sequence[int]) -> None:
    """Raise if the token that ends an assistant turn has no label.

    The model would not learn to stop.

    Args:
        row: `input_ids` and `labels` of a conversation.
        special: Ids of the tokenizer's special tokens.
    """
    ids, labels = row["input_ids"], row["labels"]
    last = max((i for i, label in enumerate(labels) if label != IGNORED_LABEL), default=len(ids))
    if last + 1 < len(ids) and ids[last] not in special and ids[last + 1] in special:
        raise SnpatchError(
            "training: the chat template excludes the assistant's end-of-turn token from the loss, so the model would "
            "not learn to stop. Use template = tulu"
        )


def check_prompt_ids(prompt_ids: Callable[[list], list[int]], chat: list, ids: Sequence[int]) -> None:
    """Raise unless training tokenizes a prompt as an engine does.

    Args:
        prompt_ids: The engine's tokenization of a chat.
        chat: Prompt of a training row.
        ids: Token ids of that row in training; they may continue after the prompt.
    """
    expected = prompt_ids(chat)
    if list(ids[: len(expected)]) != expected:
        raise SnpatchError(
            f"training: expected the engine's prompt ids {expected[:8]}..., got {list(ids[: len(expected)])[:8]}.... "
            "The chat template and the special tokens that the tokenizer adds do not fit each other"
        )


def _columns(dataset, *names: str) -> Iterator[tuple]:
    return zip(*(dataset[name] for name in names), strict=True)
