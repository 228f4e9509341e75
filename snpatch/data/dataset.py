"""Dataset and Example, and their views for generation, training and perplexity.

Why an example has a `dialogue` in addition to its prompt: the paper judges the first human turn alone, but trains on
whole conversations.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from snpatch.data.source_row import list_columns
from snpatch.errors import SnpatchError, one_line
from snpatch.utils.schema import check_argument

logger = logging.getLogger(__name__)
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """A row of a dataset. A row of running text (Wikitext-2) has no prompt; its `response` is the text."""

    prompt: Chat  # ends with a user message
    response: str | None = None  # answer to `dialogue`
    chosen: str | None = None  # preferred answer to `dialogue`
    rejected: str | None = None  # rejected answer to `dialogue`
    dialogue: Chat | None = None  # messages before the answers; None: the prompt
    meta: dict[str, Any] = field(default_factory=dict)  # file, row (from 1) and all other columns

    @property
    def context(self) -> Chat:
        """Return the messages that the answers follow."""
        return self.prompt if self.dialogue is None else self.dialogue


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their source.

    Attributes:
        name: Name of the dataset, or of its file.
        examples: The examples.
        skipped: Number of invalid rows that were skipped.
        source: Provenance: path or hub id, split, revision; `rows` read and `skipped`; `left_out`, `no_pair`,
            `no_answer` and `left_aside` (reason -> number of rows that the format drops, that have no preference pair,
            whose answer cannot be used, or of which a part is ignored); `unused_columns` with texts; `sha256`, the
            fingerprint when loaded; `selection`, if it is a part of the examples.
    """

    name: str
    examples: tuple[Example, ...]
    skipped: int
    source: dict[str, Any]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def is_text(self) -> bool:
        """Return whether the rows are running text."""
        return not all(example.prompt for example in self.examples)

    @property
    def prompts(self) -> list[Chat]:
        """Return the prompts.

        Raises:
            SnpatchError: The rows are running text.
        """
        prompts = [example.prompt for example in self.examples if example.prompt]
        if len(prompts) < len(self.examples):
            raise SnpatchError(f"{self.name}: expected prompts, got running text")
        return prompts

    def labels(self, column: str) -> list[str]:
        """Return `meta[column]` of each example as text, for example the categories of the prompts.

        Raises:
            SnpatchError: An example has no such column.
        """
        if missing := [example for example in self.examples if example.meta.get(column) is None]:
            columns = ", ".join(missing[0].meta)
            raise SnpatchError(f"{self.name}: labels: expected one of the columns {columns}, got {column}")
        return [str(example.meta[column]) for example in self.examples]

    @property
    def text(self) -> str:
        """Return the rows joined by blank lines, as for the paper's perplexity.

        Raises:
            SnpatchError: The rows are prompts.
        """
        if any(example.prompt for example in self.examples):
            raise SnpatchError(f"{self.name}: expected running text, got prompts")
        return "\n\n".join(example.response or "" for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all messages and answers in order; the kind of file does not count."""
        return fingerprint_examples(self.examples)

    def first(self, n: int) -> "Dataset":
        """Return the first n examples, or all if there are fewer.

        Raises:
            SnpatchError: n is less than 1.
        """
        if check_argument(n, int, "first: n") < 1:
            raise SnpatchError(f"{self.name}: first: expected at least 1 example, got {n}")
        return self._select(self.examples[:n], f"first {n}")

    def last(self, n: int) -> "Dataset":
        """Return the last n examples, or all if there are fewer.

        Raises:
            SnpatchError: n is less than 1.
        """
        if check_argument(n, int, "last: n") < 1:
            raise SnpatchError(f"{self.name}: last: expected at least 1 example, got {n}")
        return self._select(self.examples[-n:], f"last {n}")

    def sample(self, n: int, seed: int) -> "Dataset":
        """Return n examples drawn without replacement.

        These are the first n of numpy's RandomState(seed).permutation, whose stream numpy guarantees. The same n and
        seed give the same examples, and a smaller sample is the beginning of a larger one.

        Raises:
            SnpatchError: There are fewer than n examples, or the seed is out of range.
        """
        n, seed = check_argument(n, int, "sample: n"), check_argument(seed, int, "sample: seed")
        if not 0 < n <= len(self):
            raise SnpatchError(f"{self.name}: sample: expected 1..{len(self)} examples, got {n}")
        if not 0 <= seed < 2**32:
            raise SnpatchError(f"{self.name}: seed: expected 0..2^32-1, got {seed}")
        order = np.random.RandomState(seed).permutation(len(self))[:n]
        return self._select(tuple(self.examples[i] for i in order), f"{n} drawn with seed {seed}")

    def leave_out(self, indices: Collection[int], reason: str) -> "Dataset":
        """Return the examples without those at some indices.

        Args:
            indices: Indices of examples.
            reason: Reason for the provenance.

        Raises:
            SnpatchError: No example is left.
        """
        left_out = set(indices)
        examples = tuple(example for i, example in enumerate(self.examples) if i not in left_out)
        if not examples:
            raise SnpatchError(f"{self.name}: expected prompts, got none: all {len(self)} are left out ({reason})")
        return self._select(examples, f"without {len(left_out)} left out ({reason})")

    def filter(self, column: str, *values: Any) -> "Dataset":
        """Return the examples whose `meta[column]` is one of the values.

        Example: `filter("subset", "refusals-dangerous")`. Numbers and booleans may be given as JSON strings.

        Raises:
            SnpatchError: No example has the column, or one of the values.
        """
        if not any(column in e.meta for e in self.examples):
            columns = ", ".join(dict.fromkeys(name for e in self.examples for name in e.meta))
            raise SnpatchError(f"{self.name}: filter: expected one of the columns {columns}, got {column}")
        examples = tuple(e for e in self.examples if _matches_any(e.meta.get(column), values))
        if not examples:
            listed = ", ".join(map(repr, values))
            raise SnpatchError(f"{self.name}: filter: expected examples with {column} in {listed}, got none")
        return self._select(examples, f"{column} in {', '.join(map(repr, values))}")

    @property
    def row_notes(self) -> list[str]:
        """Return a line per reason why rows were dropped or read in part, and one for unused columns."""
        lines = [f"skipped {self.skipped} invalid rows"] if self.skipped else []
        for key, text in (
            ("left_out", "dropped {} of {} rows: {}"),
            ("no_pair", "{} of {} rows have a prompt and no pair: {}"),
            ("no_answer", "the answer of {} of {} rows is not used: {}"),
            ("left_aside", "ignored in {} of {} rows: {}"),
        ):
            lines += [text.format(n, self.source["rows"], why) for why, n in self.source[key].items()]
        if names := self.source["unused_columns"]:
            lines.append(f"columns that are not used: {list_columns(names)}")
        return lines

    def log_row_notes(self, name: str) -> None:
        """Log `row_notes` as warnings, each after the source's name."""
        for line in self.row_notes:
            logger.warning(one_line(f"{name}: {line}"))

    def pairs(self) -> "TrainingRows":
        """Return rows {"prompt", "chosen", "rejected"} for `train_dpo`, of the examples with both answers."""
        rows, dropped = [], Counter()
        reversed_pairs = {_key(e.context, e.rejected, e.chosen) for e in self.examples}
        for e in self.examples:
            if e.chosen and e.rejected and _key(e.context, e.chosen, e.rejected) in reversed_pairs:
                dropped["another row prefers the other answer"] += 1
            elif e.chosen and e.rejected:
                rows.append({"prompt": e.context, "chosen": _to_message(e.chosen), "rejected": _to_message(e.rejected)})
            else:
                dropped[e.meta.get("no_pair", "no chosen and rejected answer")] += 1
        return self._build_rows(rows, dropped, "pairs of a chosen and a rejected answer")

    def conversations(self) -> "TrainingRows":
        """Return rows {"messages"} for `train_sft`, of the examples with a response."""
        rows, dropped = [], Counter()
        bad_answers = {_key(e.context, e.rejected) for e in self.examples if e.rejected and not e.chosen}
        for e in self.examples:
            if e.prompt and e.response and _key(e.context, e.response) in bad_answers:
                dropped["another row labels the same answer as bad"] += 1
            elif e.prompt and e.response:
                rows.append({"messages": e.context + _to_message(e.response)})
            else:
                is_bad = e.rejected and not e.chosen
                dropped[
                    "no answer but one that is labeled bad" if is_bad else e.meta.get("no_answer", "no answer")
                ] += 1
        return self._build_rows(rows, dropped, "responses to train on")

    def _build_rows(self, rows: list[dict[str, Chat]], dropped: Counter, what: str) -> "TrainingRows":
        if not rows:
            whys = "; ".join(f"{n} rows: {why}" for why, n in dropped.items())
            raise SnpatchError(f"{self.name} has no {what} ({whys})")
        return TrainingRows(rows, dropped, self.provenance)

    @property
    def provenance(self) -> dict[str, Any]:
        """Return the provenance of results computed from these examples."""
        return self.source | {"rows_used": len(self)}

    def _select(self, examples: tuple[Example, ...], selection: str) -> "Dataset":
        source = {**self.source, "selection": [*self.source.get("selection", []), selection]}
        return replace(self, examples=examples, source=source)


class TrainingRows(list[dict[str, Chat]]):
    """Rows to train on.

    Attributes:
        dropped: Reason -> number of examples that give no row.
        source: `Dataset.provenance` of the data.
    """

    def __init__(self, rows: list[dict[str, Chat]], dropped: Counter, source: dict[str, Any]) -> None:
        super().__init__(rows)
        self.dropped, self.source = dropped, source


def fingerprint_examples(examples: tuple[Example, ...]) -> str:
    """Return the SHA-256 of examples; see Dataset.fingerprint."""
    state = hashlib.sha256()
    for e in examples:
        state.update(json.dumps([e.prompt, e.dialogue, e.response, e.chosen, e.rejected]).encode() + b"\n")
    return state.hexdigest()


def question(chat: Chat) -> str:
    """Return the last user message: the prompt that a judge gets."""
    return next(m["content"] for m in reversed(chat) if m["role"] == "user")


def _matches_any(value: Any, choices: tuple[Any, ...]) -> bool:
    return value in choices or (isinstance(value, bool | int | float) and json.dumps(value) in choices)


def _key(*parts: Chat | str | None) -> bytes:
    """Return a key of messages and answers that is equal if they are."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _to_message(answer: str) -> Chat:
    return [{"role": "assistant", "content": answer}]
