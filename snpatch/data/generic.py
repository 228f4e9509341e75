"""Rows of no named set: the column that holds the prompt, and the answers beside it, as most files are published.

Why a column is not always taken by its name: where two could be the prompt, or a text beside it may belong to it, a
guess would be another prompt, so that it is an error and `column` says which.
"""

import math
from collections.abc import Iterable
from functools import partial

from snpatch.data.dataset import Chat, Example
from snpatch.data.formats import (
    TURN,
    Format,
    RowError,
    answered,
    hh,
    lima,
    red_team,
    rest,
    sharegpt,
    text_of,
    transcript_of,
    turns_of,
    user,
)
from snpatch.data.source_row import list_columns

FIRST = ("prompt", "messages")  # go before any other column
PROMPTS = (
    "goal", "behavior", "forbidden_prompt", "instruction", "question", "query", "conversations", "conversation",
    "turns", "transcript", "input",
)  # fmt: skip
LESS = {"behavior": ("goal",), "input": PROMPTS[:-1]}  # is the prompt only without these: JailbreakBench, alpaca
PAIR = ("chosen", "rejected")
BESIDE = ("input", "context", "choices", "options", "system", "system_prompt", "history")
CONTEXT = "contextstring"  # HarmBench's, which the paper leaves aside
ANSWERS = ("response", "completion")
OTHER_ANSWERS = ("output", "answer")  # of alpaca, dolly, ...: only where they are texts
DIFFER, EMPTY, SAME = (
    "the texts differ before the last turn",
    "an answer is empty",
    "both answers are the same",
)  # why there is no pair


def plain(column: str | None = None) -> Format:
    """Rows of no published set: the prompt in `column`, or in the one column that can hold it, and its answers.

    A prompt is a text, or turns that end with the user's or with the answer to it, which is then the response; a
    transcript ("\\n\\nHuman: ...") is read as turns, and of a list of texts ("turns") the first. Beside it there may
    be the answer (`response`, `completion`; `output`, `answer`), in KTO's form with a `label`, and `chosen` and
    `rejected`: texts, an assistant turn, or whole conversations, whose common beginning is taken off. Without a prompt
    that beginning is the prompt.
    """
    wanted = ((column,),) if column else _fault
    return Format(partial(_parse, column=column), wanted)


def lines() -> Format:
    """A text with a prompt on each line."""
    return Format(_line, (("text",),))


def asked_of(row: dict) -> Chat | None:
    """Return the prompt that a completion's row names, without its answer; None if it names none."""
    named_ones = {name: value for name, value in row.items() if _fold(name) in (*FIRST, *PROMPTS)}
    example = _parse(named_ones, None) if named_ones else None
    return example.prompt if isinstance(example, Example) else None


def _line(row: dict) -> Example | str:
    return Example(user(text_of(row, "text"))) if row["text"].strip() else "a blank line"


def _parse(row: dict, column: str | None) -> Example | str:
    field = column or _column(row)
    if field is None:
        return hh(row) if _is_transcript(row["chosen"]) else _with_answers(row, None, None, None, {})
    value, kind = row[field], _fold(field)
    aside = {} if column else _check_beside(row, field)
    if kind == "transcript" and column is None:
        return red_team(row)
    if isinstance(value, list) and value:
        if isinstance(value[0], dict) and "from" in value[0]:
            return sharegpt({**row, "conversations": value})
        if isinstance(value[0], str) and kind.startswith("conversation"):
            return lima({**row, "conversations": value})
        if isinstance(value[0], str) and len(value) > 1:
            aside |= {"left_aside": "user turns after the first"}
    prompt, response = _prompt(row, field)
    dialogue = None
    if column is None and kind == "prompt" and isinstance(value, str) and _is_filled(row.get("messages")):
        dialogue, response = answered(turns_of(row, "messages"))
        if not _begins(prompt, dialogue):
            raise RowError("messages begin with another text than prompt: choose one by column")
    return _with_answers(row, prompt, dialogue, response, aside, field)


def _prompt(row: dict, field: str) -> tuple[Chat, str | None]:
    """The prompt in a field, and the answer that follows it there: of a text, a transcript, turns, or user turns."""
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return user(text_of({field: value[0]}, field)), None
    if isinstance(value, list) or _fold(field) == "messages":
        return _asked(turns_of(row, field))
    if not _is_transcript(value):
        return user(text_of(row, field)), None
    turns = transcript_of(row, field)
    while turns[-1] == {"role": "assistant", "content": ""}:  # where the answer is to stand
        turns.pop()
    return _asked(turns)


def _column(names: Iterable[str]) -> str | None:
    """Return the one column that can hold the prompt; None where chosen and rejected hold it. Else a RowError."""
    names = list(names)
    found = _called(names, FIRST[:1]) or _called(names, FIRST[1:]) or _called(names, PROMPTS)
    kinds = {_fold(name) for name in found}
    found = [name for name in found if not kinds & {*LESS.get(_fold(name), ())}]
    if len(found) > 1:
        raise RowError(f"one prompt, got {', '.join(found)}, each of which may be it: name it by column (--column)")
    if found:
        return found[0]
    if set(PAIR) <= set(names):
        return None
    known = ", ".join(PROMPTS)
    raise RowError(
        f"prompt or messages, got {list_columns(names)}. Name the prompt's column (--column); known ones are {known}"
    )


def _fault(names: Iterable[str]) -> str | None:
    try:
        _column(names)
    except RowError as error:
        return str(error)
    return None


def _called(names: list[str], wanted: tuple[str, ...]) -> list[str]:
    return [name for name in names if _fold(name) in wanted]


def _fold(name: str) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _check_beside(row: dict, field: str) -> dict[str, str]:
    """Return what is left aside of a row; a RowError for what may belong to the prompt."""
    aside = {}
    for name, value in row.items():
        if name == field or not _is_filled(value):
            continue
        if _fold(name) in BESIDE:
            raise RowError(
                f"{name} stands beside {field} and may belong to the prompt. Leave it aside with --column {field}, or "
                "write both into one"
            )
        if _fold(name) == CONTEXT:
            aside = {"left_aside": f"{name}, the context of a prompt"}
    return aside


def _is_filled(value: object) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return False
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {}, ())


def _is_transcript(value: object) -> bool:
    """Whether a text is in hh-rlhf's form: it begins with Human and has an assistant's turn."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return "Assistant" in TURN.findall(value.strip())


def _asked(turns: Chat) -> tuple[Chat, str | None]:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None or not turns[last]["content"]:
        raise RowError("wanted turns with a user turn, the last of them not empty")
    after = turns[last + 1 :]
    if after and [turn["role"] for turn in after] != ["assistant"]:
        raise RowError("wanted nothing but one assistant turn after the last user turn")
    return turns[: last + 1], after[0]["content"] if after else None


def _with_answers(
    row: dict, prompt: Chat | None, dialogue: Chat | None, response: str | None, meta: dict, field: str | None = None
) -> Example:
    """An example of a prompt (None: what chosen and rejected begin with) and of the answers beside it."""
    for name in ANSWERS:
        response = _answer(row, name, response)
    for name in OTHER_ANSWERS:
        if response is None and name != field and isinstance(row.get(name), str):
            response = text_of(row, name, empty=True)
    meta = {**rest(row, *filter(None, (field,)), *ANSWERS, *PAIR), **meta}
    chosen, rejected = (_said(row, name) for name in PAIR)
    if lacking := [name for name, said in zip(PAIR, (chosen, rejected), strict=True) if not said]:
        meta |= {"no_pair": f"no {' and '.join(lacking)} answer"} if row.keys() & {*PAIR} else {}
    if isinstance(chosen, list) or isinstance(rejected, list):
        begin, chosen, rejected, why = _split(chosen, rejected)
        prompt = _prompt_of(prompt, begin)
        if response is None or dialogue is None:
            dialogue = begin
        elif dialogue != begin:
            raise RowError("messages and chosen are different conversations: choose the prompt by column")
        meta |= {"no_pair": why} if why else {}
    elif prompt is None:
        raise RowError("chosen and rejected hold no prompt: wanted conversations that begin alike")
    if response is not None and rejected is None and _is_bad(row):
        response, rejected = None, response
    return Example(prompt, response, chosen, rejected, None if dialogue == prompt else dialogue, meta)


def _is_bad(row: dict) -> bool:
    """Whether a row in KTO's form (a completion and a label) says that its answer is a bad one."""
    label = str(row.get("label")).strip().lower()
    return label == "false" or (label == "0" and row.get("completion") is not None)


def _answer(row: dict, field: str, otherwise: str | None = None) -> str | None:
    if row.get(field) is None:
        return otherwise
    said = _said(row, field)
    if isinstance(said, list):
        raise RowError(f"{field} must be a text or one assistant turn")
    return said


def _said(row: dict, field: str) -> str | Chat | None:
    """An answer: the text of a text or of one assistant turn; a conversation that ends with it as its turns."""
    value = row.get(field)
    if value is None:
        return None
    if _is_transcript(value):
        return transcript_of(row, field)
    if not isinstance(value, list):
        return text_of(row, field, empty=True)
    turns = turns_of(row, field)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(f"{field} must be a text or one assistant turn, or turns that end with one")
    return turns[0]["content"] if len(turns) == 1 else turns


def _split(chosen: str | Chat | None, rejected: str | Chat | None) -> tuple[Chat, str | None, str | None, str | None]:
    """Return what both conversations begin with, both answers, and why there is no pair; as TRL takes them apart."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("chosen and rejected must be of one form, got a conversation and a text")
    if chosen is None or rejected is None:
        dialogue, answer = answered(chosen or rejected)
        return dialogue, *((answer, None) if rejected is None else (None, answer)), None
    alike = 0
    while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
        alike += 1
    begin, answers = chosen[:alike], (chosen[alike:], rejected[alike:])
    if not begin or begin[-1]["role"] != "user" or any([t["role"] for t in one] != ["assistant"] for one in answers):
        while begin and begin[-1]["role"] != "user":
            begin.pop()
        return begin, None, None, DIFFER
    better, worse = (one[0]["content"] for one in answers)
    if not better or not worse:
        return begin, None, None, EMPTY
    return (begin, None, None, SAME) if better == worse else (begin, better, worse, None)


def _prompt_of(prompt: Chat | None, begin: Chat) -> Chat:
    """The prompt of a pair of conversations, which must be of it."""
    if prompt is None:
        if not begin:
            raise RowError("chosen and rejected begin with different turns, and there is no prompt")
        return begin
    if not begin or not _begins(prompt, begin):
        raise RowError("chosen and rejected do not both begin with the prompt")
    return begin if begin[0]["role"] == "system" else prompt


def _begins(prompt: Chat, turns: Chat) -> bool:
    """Whether turns begin with a prompt, after a system's turn that it may lack."""
    own = turns[1:] if prompt[0]["role"] != "system" and turns[:1] and turns[0]["role"] == "system" else turns
    return own[: len(prompt)] == prompt
