"""What of the data is trained on: rows that teach nothing are left out, and every one of them is counted.

Why the rows are looked at once they are token ids: two answers may differ as texts and be the same to the model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

from snpatch.data.dataset import TrainingRows
from snpatch.errors import SnpatchError
from snpatch.models.templates import ROLES
from snpatch.training.settings import DpoSettings, TrainSettings

IGNORED = -100  # the label of a token that the loss passes over


@dataclass
class Counts:
    """rows: of the data. dropped: reason -> rows. truncated: rows that are trained on without their end."""

    rows: int
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: int, before: Mapping[str, int]) -> "Counts":
        """Of rows that are looked at, and of those that were left out before, reason -> rows."""
        return cls(rows + sum(before.values()), dropped=Counter(before))

    @property
    def told(self) -> list[str]:
        """What a user should know of it."""
        told = [f"dropped {count} of {self.rows} rows: {why}" for why, count in self.dropped.most_common()]
        return [*told, *([f"truncated {self.truncated} of {self.rows} rows at max_length"] if self.truncated else [])]

    def check(self, settings: TrainSettings) -> None:
        """An error if more than the settings allow are left out."""
        left = self.dropped.total()
        if left == self.rows or left > settings.max_dropped * self.rows:
            raise SnpatchError(
                f"training data: {'; '.join(self.told)}: more than max_dropped = {settings.max_dropped} of the rows"
            )


def dropped_before(rows: Sequence[Mapping]) -> dict[str, int]:
    """How many rows of a data set made none of these, by reason."""
    return dict(rows.left_out) if isinstance(rows, TrainingRows) else {}


def conversations(
    dataset, settings: TrainSettings, context: int, before: Mapping[str, int] = MappingProxyType({})
) -> tuple[object, Counts]:
    """A tokenized dataset (`input_ids`, `labels`), cut at max_length and without rows that have no label then.

    context: the longest sequence that the model was made for; a longer row is an error. before: see Counts.of.
    """
    counts = Counts.of(len(dataset), before)
    limit = settings.max_length
    kept = []
    for index, (ids, labels) in enumerate(_columns(dataset, "input_ids", "labels")):
        if all(label == IGNORED for label in labels[:limit]):
            counts.dropped[f"no token of the assistant's within max_length = {limit}"] += 1
        else:
            kept.append(index)
            counts.truncated += len(ids) > limit
            _check_fits(index, min(len(ids), limit), context)
    counts.check(settings)
    dataset = dataset.select(kept)
    if counts.truncated:
        dataset = dataset.map(lambda row: {name: row[name][:limit] for name in ("input_ids", "labels")})
    return dataset, counts


def pairs(
    dataset, rows: int, settings: DpoSettings, context: int, before: Mapping[str, int] = MappingProxyType({})
) -> tuple[object, Counts]:
    """A tokenized dataset (`prompt_ids`, `chosen_ids`, `rejected_ids`) without pairs that teach nothing.

    rows: how many there were before TRL dropped those whose prompt alone fills max_length. context, before: see above.
    """
    counts = Counts.of(rows, before)
    if too_long := rows - len(dataset):
        counts.dropped[f"prompt not shorter than max_length = {settings.max_length} tokens"] = too_long
    kept, end = [], dataset[0]["prompt_ids"][-1:] if len(dataset) else []
    for index, (prompt, chosen, rejected) in enumerate(_columns(dataset, "prompt_ids", "chosen_ids", "rejected_ids")):
        room = settings.max_length - len(prompt)
        if prompt[-1:] != end:  # TRL has cut the prompt to what the answers' texts begin with
            counts.dropped["the template does not read the prompt as the beginning of its answers"] += 1
        elif len(prompt) > settings.max_prompt_length:
            counts.dropped[f"prompt longer than max_prompt_length = {settings.max_prompt_length} tokens"] += 1
        elif chosen == rejected:
            counts.dropped["chosen and rejected are the same tokens"] += 1
        elif chosen[:room] == rejected[:room]:
            counts.dropped["chosen and rejected are the same tokens up to max_length"] += 1
        else:
            kept.append(index)
            longest = max(len(chosen), len(rejected))
            counts.truncated += longest > room
            _check_fits(index, len(prompt) + min(longest, room), context)
    counts.check(settings)
    return dataset.select(kept), counts


def check_columns(rows: Sequence[Mapping], columns: Sequence[str]) -> None:
    """An error unless there are rows, and each has these columns."""
    wanted = f"training data: wanted rows with {', '.join(columns)}"
    if not len(rows):
        raise SnpatchError(f"{wanted}, got none")
    for index, row in enumerate(rows):
        if not row.keys() >= set(columns):
            raise SnpatchError(f"{wanted}, row {index} has {', '.join(row)}")


def _check_fits(index: int, length: int, context: int) -> None:
    if length > context:
        raise SnpatchError(
            f"training data: a row (number {index} of those that TRL kept) has {length} tokens, the model was made for "
            f"{context}: give max_length = {context} or less"
        )


def check_roles(rows: Sequence[Mapping], template: str) -> None:
    """An error for a role that the Tulu template does not know; a tokenizer's own template tells by itself."""
    for index, row in enumerate(rows if template == "tulu" else ()):
        for turn in chain(*(row[name] for name in ("messages", "prompt", "chosen", "rejected") if name in row)):
            if turn["role"] not in ROLES:
                known = ", ".join(ROLES)
                raise SnpatchError(f"training data: row {index}: the Tulu template knows {known}, got {turn['role']!r}")


def check_answered(rows: Sequence[Mapping]) -> None:
    """An error for a conversation without an assistant's turn."""
    for index, row in enumerate(rows):
        if not any(turn["role"] == "assistant" for turn in row["messages"]):
            raise SnpatchError(f"training data: row {index} has no turn of the assistant's")


def check_ends(row: Mapping[str, Sequence[int]], special: Sequence[int]) -> None:
    """An error where what ends an assistant's turn is not trained: the model would not learn to stop.

    row: `input_ids` and `labels` of a conversation; special: ids of the tokenizer's special tokens.
    """
    ids, labels = row["input_ids"], row["labels"]
    last = max((i for i, label in enumerate(labels) if label != IGNORED), default=len(ids))
    if last + 1 < len(ids) and ids[last] not in special and ids[last + 1] in special:
        raise SnpatchError(
            "training: the chat template has the assistant's end of turn outside of what is trained, so that the model "
            "would not learn to stop: use template = tulu"
        )


def check_read_alike(prompt_ids: Callable[[list], list[int]], chat: list, ids: Sequence[int]) -> None:
    """An error unless training reads a prompt as an engine does. prompt_ids: the engine's; ids: training's, which may
    go on."""
    wanted = prompt_ids(chat)
    if list(ids[: len(wanted)]) != wanted:
        raise SnpatchError(
            f"training would read a prompt as {list(ids[: len(wanted)])[:8]}..., an engine reads it as "
            f"{wanted[:8]}...: the tokenizer's template and what it puts around a text do not fit each other"
        )


def _columns(dataset, *names: str) -> Iterator[tuple]:
    return zip(*(dataset[name] for name in names), strict=True)
