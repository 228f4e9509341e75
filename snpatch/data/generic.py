"""Generic format for files of no published dataset: finds the prompt column by name, and the answers in other columns.

Why ambiguity is an error: if two columns could be the prompt, or another column may belong to it, a guess could give
another prompt. `column` chooses one.
"""

import math
from collections.abc import Iterable
from functools import partial

from snpatch.data.dataset import Chat, Example
from snpatch.data.formats import (
    TURN,
    Format,
    RowError,
    get_text,
    get_turns,
    hh,
    lima,
    parse_transcript,
    red_team,
    rest,
    sharegpt,
    split_answer,
    user,
)
from snpatch.data.source_row import list_columns
from snpatch.utils.optional import require

PREFERRED_COLUMNS = ("prompt", "messages")  # taken before all others
PROMPT_COLUMNS = (
    "goal", "behavior", "forbidden_prompt", "instruction", "question", "query", "conversations", "conversation",
    "turns", "transcript", "input",
)  # fmt: skip
# A column that is the prompt only if none of these exists: JailbreakBench, alpaca.
YIELDS_TO = {"behavior": ("goal",), "input": PROMPT_COLUMNS[:-1]}
PAIR_COLUMNS = ("chosen", "rejected")
CONTEXT_COLUMNS = ("input", "context", "choices", "options", "system", "system_prompt", "history")
HARMBENCH_CONTEXT = "contextstring"  # ignored by the paper
ANSWER_COLUMNS = ("response", "completion")
TEXT_ANSWER_COLUMNS = ("output", "answer")  # of alpaca, dolly, ...: answers only if they are strings
TURNS_DIFFER, EMPTY_ANSWER, SAME_ANSWER = (
    "the texts differ before the last turn",
    "an answer is empty",
    "both answers are the same",
)  # reasons why there is no pair


def generic_format(column: str | None = None) -> Format:
    r"""Return the format of rows of no published dataset.

    The prompt is a string, or messages that end with the user's or with the answer (the response). A transcript
    ("\n\nHuman: ...") is parsed to messages; of a list of strings ("turns") the first is the prompt.

    Other columns may hold the answer (`response`, `completion`, `output`, `answer`; KTO's form has a `label`), and
    `chosen` and `rejected`: strings, an assistant message, or conversations, whose common beginning is removed. Without
    a prompt column that beginning is the prompt.

    Args:
        column: Column with the prompt; None: found by its name.
    """
    required = ((column,),) if column else _find_prompt_error
    return Format(partial(_parse_row, column=column), required)


def line_format() -> Format:
    """Return the format of a text file with one prompt per line."""
    return Format(_parse_line, (("text",),))


def parse_completion_prompt(row: dict) -> Chat | None:
    """Return the prompt in a completion's row, without its answer; None if the row has no prompt."""
    prompts = {name: value for name, value in row.items() if _normalize(name) in (*PREFERRED_COLUMNS, *PROMPT_COLUMNS)}
    example = _parse_row(prompts, None) if prompts else None
    return example.prompt if isinstance(example, Example) else None


def parse_prompt(row: dict) -> Chat:
    """Return the prompt of a row, as load_dataset reads it; raise a RowError if it has none."""
    example = _parse_row(row, None)
    if isinstance(example, str):
        raise RowError(f"expected a prompt, got {example}")
    return example.prompt


def _parse_line(row: dict) -> Example | str:
    return Example(user(get_text(row, "text"))) if row["text"].strip() else "a blank line"


def _parse_row(row: dict, column: str | None) -> Example | str:
    field = column or _find_prompt_column(row)
    if field is None:
        return hh(row) if _is_transcript(row["chosen"]) else _build_example(row, None, None, None, {})
    value, kind = row[field], _normalize(field)
    ignored = {} if column else _check_other_columns(row, field)
    if kind == "transcript" and column is None:
        return red_team(row)
    if isinstance(value, list) and value:
        if isinstance(value[0], dict) and "from" in value[0]:
            return sharegpt({**row, "conversations": value})
        if isinstance(value[0], str) and kind.startswith("conversation"):
            return lima({**row, "conversations": value})
        if isinstance(value[0], str) and len(value) > 1:
            ignored |= {"left_aside": "user turns after the first"}
    prompt, response = _parse_prompt(row, field)
    dialogue = None
    if column is None and kind == "prompt" and isinstance(value, str) and _is_filled(row.get("messages")):
        dialogue, response = split_answer(get_turns(row, "messages"))
        if not _starts_with(dialogue, prompt):
            raise RowError("messages begin with another text than prompt: choose one by column")
    return _build_example(row, prompt, dialogue, response, ignored, field)


def _parse_prompt(row: dict, field: str) -> tuple[Chat, str | None]:
    """Return (prompt, answer that follows it or None) of a field.

    The field is a string, a transcript, or a list of messages or of strings.
    """
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return user(get_text({field: value[0]}, field)), None
    if isinstance(value, list) or _normalize(field) == "messages":
        return _split_response(get_turns(row, field))
    if not _is_transcript(value):
        return user(get_text(row, field)), None
    turns = parse_transcript(row, field)
    while turns[-1] == {"role": "assistant", "content": ""}:  # place for the answer
        turns.pop()
    return _split_response(turns)


def _find_prompt_column(names: Iterable[str]) -> str | None:
    """Return the column with the prompt; None if chosen and rejected contain it.

    Raises:
        RowError: The column is unclear.
    """
    names = list(names)
    candidates = (
        _select(names, PREFERRED_COLUMNS[:1]) or _select(names, PREFERRED_COLUMNS[1:]) or _select(names, PROMPT_COLUMNS)
    )
    kinds = {_normalize(name) for name in candidates}
    candidates = [name for name in candidates if not kinds & {*YIELDS_TO.get(_normalize(name), ())}]
    if len(candidates) > 1:
        raise RowError(
            f"one prompt, got {', '.join(candidates)}, each of which may be it: name it by column (--column)"
        )
    if candidates:
        return candidates[0]
    if set(PAIR_COLUMNS) <= set(names):
        return None
    known = ", ".join(PROMPT_COLUMNS)
    raise RowError(
        f"prompt or messages, got {list_columns(names)}. Name the prompt's column (--column); known ones are {known}"
    )


def _find_prompt_error(names: Iterable[str]) -> str | None:
    try:
        _find_prompt_column(names)
    except RowError as error:
        return str(error)
    return None


def _select(names: list[str], choices: tuple[str, ...]) -> list[str]:
    return [name for name in names if _normalize(name) in choices]


def _normalize(name: str) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _check_other_columns(row: dict, field: str) -> dict[str, str]:
    """Return a note on an ignored column; raise a RowError for a column that may belong to the prompt."""
    ignored = {}
    for name, value in row.items():
        if name == field or not _is_filled(value):
            continue
        if _normalize(name) in CONTEXT_COLUMNS:
            raise RowError(
                f"{name} may belong to the prompt in {field}. Ignore it with --column {field}, or write both into one "
                "column"
            )
        if _normalize(name) == HARMBENCH_CONTEXT:
            ignored = {"left_aside": f"{name}, the context of a prompt"}
    return ignored


def _is_filled(value: object) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return False
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {}, ())


def _is_transcript(value: object) -> bool:
    """Return whether a string has hh-rlhf's form: it starts with Human and has an assistant turn."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return "Assistant" in TURN.findall(value.strip())


def _split_response(turns: Chat) -> tuple[Chat, str | None]:
    """Return (turns up to the last user turn, the assistant turn after it or None)."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None or not turns[last]["content"]:
        raise RowError("expected turns with a user turn, the last of them not empty")
    after = turns[last + 1 :]
    if after and [turn["role"] for turn in after] != ["assistant"]:
        raise RowError("expected nothing but one assistant turn after the last user turn")
    return turns[: last + 1], after[0]["content"] if after else None


def _build_example(
    row: dict, prompt: Chat | None, dialogue: Chat | None, response: str | None, meta: dict, field: str | None = None
) -> Example:
    """Return an example of a prompt and the answers in other columns.

    prompt: None if it is the beginning of chosen and rejected.
    """
    for name in ANSWER_COLUMNS:
        response = _get_response(row, name, response)
    for name in TEXT_ANSWER_COLUMNS:
        if response is None and name != field and isinstance(row.get(name), str):
            response = get_text(row, name, empty=True)
    meta = {**rest(row, *filter(None, (field,)), *ANSWER_COLUMNS, *PAIR_COLUMNS), **meta}
    chosen, rejected = (_parse_answer(row, name) for name in PAIR_COLUMNS)
    if missing := [name for name, answer in zip(PAIR_COLUMNS, (chosen, rejected), strict=True) if not answer]:
        meta |= {"no_pair": f"no {' and '.join(missing)} answer"} if row.keys() & {*PAIR_COLUMNS} else {}
    if isinstance(chosen, list) or isinstance(rejected, list):
        beginning, chosen, rejected, reason = _split_pair(chosen, rejected)
        prompt = _check_pair_prompt(prompt, beginning)
        if response is None or dialogue is None:
            dialogue = beginning
        elif dialogue != beginning:
            raise RowError("messages and chosen are different conversations: choose the prompt by column")
        meta |= {"no_pair": reason} if reason else {}
    elif prompt is None:
        raise RowError("chosen and rejected hold no prompt: expected conversations that begin alike")
    if response is not None and rejected is None and _is_bad(row):
        response, rejected = None, response
    return Example(prompt, response, chosen, rejected, None if dialogue == prompt else dialogue, meta)


def _is_bad(row: dict) -> bool:
    """Return whether a row in KTO's form (completion and label) labels its answer as bad."""
    label = str(row.get("label")).strip().lower()
    return label == "false" or (label == "0" and row.get("completion") is not None)


def _get_response(row: dict, field: str, default: str | None) -> str | None:
    if row.get(field) is None:
        return default
    answer = _parse_answer(row, field)
    if isinstance(answer, list):
        raise RowError(f"{field} must be a text or one assistant turn")
    return answer


def _parse_answer(row: dict, field: str) -> str | Chat | None:
    """Return an answer: the string of a string or of one assistant turn, or the turns of a conversation."""
    value = row.get(field)
    if value is None:
        return None
    if _is_transcript(value):
        return parse_transcript(row, field)
    if not isinstance(value, list):
        return get_text(row, field, empty=True)
    turns = get_turns(row, field)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(f"{field} must be a text or one assistant turn, or turns that end with one")
    return turns[0]["content"] if len(turns) == 1 else turns


def _split_pair(
    chosen: str | Chat | None, rejected: str | Chat | None
) -> tuple[Chat, str | None, str | None, str | None]:
    """Return (common beginning, chosen answer, rejected answer, why there is no pair), split as TRL does."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("chosen and rejected must be of one form, got a conversation and a text")
    if chosen is None or rejected is None:
        dialogue, answer = split_answer(require(chosen or rejected))
        return (dialogue, answer, None, None) if rejected is None else (dialogue, None, answer, None)
    n_common = 0
    while n_common < min(len(chosen), len(rejected)) - 1 and chosen[n_common] == rejected[n_common]:
        n_common += 1
    beginning, endings = chosen[:n_common], (chosen[n_common:], rejected[n_common:])
    has_answers = all([turn["role"] for turn in ending] == ["assistant"] for ending in endings)
    if not beginning or beginning[-1]["role"] != "user" or not has_answers:
        while beginning and beginning[-1]["role"] != "user":
            beginning.pop()
        return beginning, None, None, TURNS_DIFFER
    better, worse = (ending[0]["content"] for ending in endings)
    if not better or not worse:
        return beginning, None, None, EMPTY_ANSWER
    return (beginning, None, None, SAME_ANSWER) if better == worse else (beginning, better, worse, None)


def _check_pair_prompt(prompt: Chat | None, beginning: Chat) -> Chat:
    """Return the prompt of a pair of conversations; raise a RowError if they do not start with it."""
    if prompt is None:
        if not beginning:
            raise RowError("chosen and rejected begin with different turns, and there is no prompt")
        return beginning
    if not beginning or not _starts_with(beginning, prompt):
        raise RowError("chosen and rejected do not both begin with the prompt")
    return beginning if beginning[0]["role"] == "system" else prompt


def _starts_with(turns: Chat, prompt: Chat) -> bool:
    """Return whether turns start with a prompt, after a system message that the prompt may lack."""
    has_extra_system = prompt[0]["role"] != "system" and turns[:1] and turns[0]["role"] == "system"
    return turns[bool(has_extra_system) :][: len(prompt)] == prompt
