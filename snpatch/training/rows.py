"""What of the data is trained on: rows that teach nothing are left out, and every one of them is counted.

Why the rows are looked at once they are token ids: two answers may differ as texts and be the same to the model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snpatch.errors import SnpatchError
from snpatch.training.settings import DpoSettings, TrainSettings

IGNORED = -100  # the label of a token that the loss passes over


@dataclass
class Counts:
    """rows: of the data. left_out: reason -> rows. cut: rows that are trained on without their end."""

    rows: int
    cut: int = 0
    left_out: Counter = field(default_factory=Counter)

    @property
    def told(self) -> list[str]:
        """What a user should know of it."""
        told = [f"left out {count} of {self.rows} rows: {why}" for why, count in self.left_out.most_common()]
        return [*told, *([f"cut {self.cut} of {self.rows} rows at max_length"] if self.cut else [])]

    def check(self, settings: TrainSettings) -> None:
        """An error if more than the settings allow are left out."""
        left = self.left_out.total()
        if left == self.rows or left > settings.max_left_out * self.rows:
            raise SnpatchError(
                f"training data: {'; '.join(self.told)}: more than max_left_out = {settings.max_left_out} of the rows"
            )


def conversations(dataset, settings: TrainSettings) -> tuple[object, Counts]:
    """A tokenized dataset (`input_ids`, `labels`), cut at max_length and without rows that have no label then."""
    counts = Counts(len(dataset))
    limit = settings.max_length
    kept = []
    for index, (ids, labels) in enumerate(_columns(dataset, "input_ids", "labels")):
        if all(label == IGNORED for label in labels[:limit]):
            counts.left_out[f"no token of the assistant's within max_length = {limit}"] += 1
        else:
            kept.append(index)
            counts.cut += len(ids) > limit
    counts.check(settings)
    dataset = dataset.select(kept)
    if counts.cut:
        dataset = dataset.map(lambda row: {name: row[name][:limit] for name in ("input_ids", "labels")})
    return dataset, counts


def pairs(dataset, rows: int, settings: DpoSettings) -> tuple[object, Counts]:
    """A tokenized dataset (`prompt_ids`, `chosen_ids`, `rejected_ids`) without pairs that teach nothing.

    rows: how many there were before TRL dropped those whose prompt alone fills max_length.
    """
    counts = Counts(rows)
    if dropped := rows - len(dataset):
        counts.left_out[f"prompt not shorter than max_length = {settings.max_length} tokens"] = dropped
    kept = []
    for index, (prompt, chosen, rejected) in enumerate(_columns(dataset, "prompt_ids", "chosen_ids", "rejected_ids")):
        room = settings.max_length - len(prompt)
        if len(prompt) > settings.max_prompt_length:
            counts.left_out[f"prompt longer than max_prompt_length = {settings.max_prompt_length} tokens"] += 1
        elif chosen == rejected:
            counts.left_out["chosen and rejected are the same tokens"] += 1
        elif chosen[:room] == rejected[:room]:
            counts.left_out["chosen and rejected are the same tokens up to max_length"] += 1
        else:
            kept.append(index)
            counts.cut += max(len(chosen), len(rejected)) > room
    counts.check(settings)
    return dataset.select(kept), counts


def check_columns(rows: Sequence[Mapping], columns: Sequence[str]) -> None:
    """An error unless there are rows, and the first has these columns."""
    missing = [column for column in columns if not len(rows) or column not in rows[0]]
    if missing:
        got = f"{len(rows)} rows" + (f" with {', '.join(rows[0])}" if len(rows) else "")
        raise SnpatchError(f"training data: wanted rows with {', '.join(columns)}, got {got}")


def check_answered(rows: Sequence[Mapping]) -> None:
    """An error for a conversation without an assistant's turn."""
    for index, row in enumerate(rows):
        if not any(turn["role"] == "assistant" for turn in row["messages"]):
            raise SnpatchError(f"training data: row {index} has no turn of the assistant's")


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
