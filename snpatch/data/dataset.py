"""What a data set is once it is read: examples, and the shapes that generation, training and perplexity take.

Why an example has a `dialogue` beside its prompt: the paper judges the first human turn alone, but trains on whole
conversations.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from snpatch.errors import SnpatchError, one_line

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One row. A row of a text (Wikitext-2) has no prompt: its `response` is the text."""

    prompt: Chat  # what is asked; ends with the user's turn
    response: str | None = None  # the answer to `dialogue`
    chosen: str | None = None  # the better and
    rejected: str | None = None  # the worse answer to `dialogue`
    dialogue: Chat | None = None  # the turns before the answers, where they are not just the prompt
    meta: dict[str, Any] = field(default_factory=dict)  # file and row (from 1), and the other columns as published

    @property
    def asked(self) -> Chat:
        """The turns that the answers follow."""
        return self.prompt if self.dialogue is None else self.dialogue


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of the source.

    skipped: bad rows that `skip_bad` skipped. source: where it comes from (path or hub id, split, revision), `rows`
    read, `skipped`; `left_out`, `no_pair` and `left_aside` (reason -> how many rows the set's rules leave out, have no
    pair, or are read in part), `sha256` (the digest as loaded), and `selection` if these are not all of the examples.
    """

    name: str
    examples: tuple[Example, ...]
    skipped: int
    source: dict[str, Any]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def prompts(self) -> list[Chat]:
        if not all(example.prompt for example in self.examples):
            raise SnpatchError(f"{self.name} is a text: it has no prompts")
        return [example.prompt for example in self.examples]

    @property
    def text(self) -> str:
        """The rows joined by blank lines, as the paper's perplexity takes them."""
        if any(example.prompt for example in self.examples):
            raise SnpatchError(f"{self.name} holds prompts: it is not a text")
        return "\n\n".join(example.response for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the turns and answers in their order, whatever kind of file they came from."""
        return fingerprint(self.examples)

    def first(self, n: int) -> "Dataset":
        """The first n examples, or all if there are not so many."""
        if n < 1:
            raise SnpatchError(f"{self.name}: cannot take the first {n} examples")
        return self._select(self.examples[:n], f"first {n}")

    def sample(self, n: int, seed: int) -> "Dataset":
        """n examples drawn without replacement; SnpatchError if there are fewer.

        The first n of numpy's RandomState(seed).permutation, whose stream numpy keeps for ever: the same n and seed
        give the same examples, and a smaller sample is the start of a larger one.
        """
        if not 0 < n <= len(self):
            raise SnpatchError(f"{self.name}: cannot draw {n} examples, it has {len(self)}")
        if not 0 <= seed < 2**32:
            raise SnpatchError(f"{self.name}: seed must be at least 0 and less than 2^32, got {seed}")
        order = np.random.RandomState(seed).permutation(len(self))[:n]
        return self._select(tuple(self.examples[i] for i in order), f"{n} drawn with seed {seed}")

    def filter(self, column: str, *values: Any) -> "Dataset":
        """The examples whose `meta[column]` is one of the values, such as filter("subset", "refusals-dangerous").

        A number, true or false may be given as JSON's text.
        """
        if not any(column in e.meta for e in self.examples):
            there = ", ".join(dict.fromkeys(name for e in self.examples for name in e.meta))
            raise SnpatchError(f"{self.name}: no example has a column {column}: there are {there}")
        kept = tuple(e for e in self.examples if _is_one_of(e.meta.get(column), values))
        if not kept:
            raise SnpatchError(f"{self.name}: no example has {column} in {', '.join(map(repr, values))}")
        return self._select(kept, f"{column} in {', '.join(map(repr, values))}")

    @property
    def row_notes(self) -> list[str]:
        """Return a line for each reason why rows of the source are not read, or not in full."""
        lines = [f"left out {self.skipped} broken rows"] if self.skipped else []
        for counted, text in (
            ("left_out", "left out {} of {} rows: {}"),
            ("no_pair", "{} of {} rows have a prompt and no pair: {}"),
            ("left_aside", "left aside in {} of {} rows: {}"),
        ):
            lines += [text.format(n, self.source["rows"], why) for why, n in self.source[counted].items()]
        return lines

    def print_row_notes(self, name: str) -> None:
        """Print `row_notes` on stderr. name: the source, as the user calls it."""
        for line in self.row_notes:
            print(one_line(f"{name}: {line}"), file=sys.stderr)

    def pairs(self) -> "TrainingRows":
        """Rows {"prompt", "chosen", "rejected"} for `train_dpo`, of the examples that have both answers."""
        rows, left_out = [], Counter()
        for e in self.examples:
            if e.chosen and e.rejected:
                rows.append({"prompt": e.asked, "chosen": _said(e.chosen), "rejected": _said(e.rejected)})
            else:
                left_out[e.meta.get("no_pair", "no chosen and rejected answer")] += 1
        return self._rows(rows, left_out, "pairs of a chosen and a rejected answer")

    def conversations(self) -> "TrainingRows":
        """Rows {"messages"} for `train_sft`, of the examples that have a response."""
        rows, left_out = [], Counter()
        for e in self.examples:
            if e.prompt and e.response:
                rows.append({"messages": e.asked + _said(e.response)})
            else:
                left_out["no answer but one that is labelled bad" if e.rejected and not e.chosen else "no answer"] += 1
        return self._rows(rows, left_out, "responses to train on")

    def _rows(self, rows: list[dict[str, Chat]], left_out: Counter, what: str) -> "TrainingRows":
        if not rows:
            whys = "; ".join(f"{n} rows: {why}" for why, n in left_out.items())
            raise SnpatchError(f"{self.name} has no {what} ({whys})")
        return TrainingRows(rows, left_out, self.provenance)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a table that hangs on these rows says of them."""
        return self.source | {"rows_used": len(self)}

    def _select(self, examples: tuple[Example, ...], how: str) -> "Dataset":
        source = {**self.source, "selection": [*self.source.get("selection", []), how]}
        return replace(self, examples=examples, source=source)


class TrainingRows(list[dict[str, Chat]]):
    """Rows to train on. left_out: reason -> examples that make no row. source: of the data, as `Dataset.provenance`."""

    def __init__(self, rows: list[dict[str, Chat]], left_out: Counter, source: dict[str, Any]) -> None:
        super().__init__(rows)
        self.left_out, self.source = left_out, source


def fingerprint(examples: tuple[Example, ...]) -> str:
    """See Dataset.digest."""
    state = hashlib.sha256()
    for e in examples:
        state.update(json.dumps([e.prompt, e.dialogue, e.response, e.chosen, e.rejected]).encode() + b"\n")
    return state.hexdigest()


def question(chat: Chat) -> str:
    """What the user asked last: the prompt that a judge sees."""
    return next(m["content"] for m in reversed(chat) if m["role"] == "user")


def _is_one_of(value: Any, wanted: tuple[Any, ...]) -> bool:
    return value in wanted or (isinstance(value, bool | int | float) and json.dumps(value) in wanted)


def _said(answer: str) -> Chat:
    return [{"role": "assistant", "content": answer}]
