"""Generic format for files of no published dataset: finds the prompt column by name, and the answers in other columns.

Why ambiguity is an error: if two columns could be the prompt, or another column may belong to it, a guess could give
another prompt. `column` chooses one.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial

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
    shorten_repr,
    split_answer,
    user,
)
from snpatch.data.source_row import is_turns_column, list_columns, normalize_column
from snpatch.utils.optional import require
from snpatch.utils.schema import parse_json

PREFERRED_COLUMNS = ("prompt", "messages")  # taken before all others
PROMPT_COLUMNS = (
    "goal", "behavior", "forbidden_prompt", "instruction", "question", "query", "conversations", "conversation",
    "turns", "transcript", "input",
)  # fmt: skip
# A column that is the prompt only if none of these exists: JailbreakBench, alpaca.
YIELDS_TO = {"behavior": ("goal",), "input": PROMPT_COLUMNS[:-1]}
PAIR_COLUMNS = ("chosen", "rejected")
# Names of columns that change what the model would read in addition to the prompt.
CONTEXT_COLUMN = re.compile(
    r"^sys(?:tem|_)|context|history|^im(?:g|age)|image|audio|video|passage|paragraph|^(?:input|choices|options|docs)$"
    r"|(?:^|_)documents?(?:_|$)|(?:^|_)tools?(?:_|$)|(?:^|_)functions?(?:_|$)"
)
HARMBENCH_CONTEXT = "contextstring"  # ignored by the paper
# Names of columns whose texts describe a row, and that are therefore ignored without a note.
METADATA_COLUMN = re.compile(
    r"(?:ids?|idx|index|hash|sources?|origins?|datasets?|subsets?|splits?|category|categories|types?|kinds?|tags?|topics?"
    r"|domains?|areas?|languages?|lang|models?|generators?|annotators?|scores?|ratings?|labels?|dates?|times?|timestamp"
    r"|urls?|links?|licen[cs]es?|authors?|versions?|difficulty|names?|notes?|focus|targets?|behaviors?|harm|safe"
    r"|policy|severity|num_params|task_description)$|^(?:scores?|meta|metadata)(?:_|$)"
)
ANSWER_COLUMNS = ("response", "completion")
TEXT_ANSWER_COLUMNS = ("output", "answer")  # of alpaca, dolly, ...: answers only if they are strings
CHAT_COLUMNS = ("messages", *PAIR_COLUMNS, *ANSWER_COLUMNS)  # may hold a chat, too
# Messages as JSON, as Python's repr, or as numpy's.
CHAT_TEXT = re.compile(r"\s*(?:array\()?\[\s*\{.*\}\s*,?\s*\](?:, dtype=object\))?\s*|\s*\{.*\}\s*", re.DOTALL)
MESSAGE_FIELDS = {"role", "content"}, {"from", "value"}
FIELD = re.compile(r"""['"](role|content|from|value)['"]\s*:""")
LABEL_COLUMNS = ("label", "labels")  # of KTO's form: whether the answer is good
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NOTES = ("no_pair", "no_answer", "left_aside")  # keys of meta that are no columns
TURNS_DIFFER, EMPTY_ANSWER, SAME_ANSWER = (
    "the texts differ before the last turn",
    "an answer is empty",
    "both answers are the same",
)  # reasons why there is no pair


def generic_format(column: str | None = None) -> Format:
    r"""Return the format of rows of no published dataset.

    The prompt is a string, or messages that end with the user's or with the answer (the response). A transcript
    ("\n\nHuman: ...") is parsed to messages; of a list of strings in `turns` the first is the prompt.

    Other columns may hold the answer (`response`, `completion`, `output`, `answer`; KTO's form has a `label`, one of
    LABELS), and `chosen` and `rejected`: strings, an assistant message, or conversations, whose common beginning is
    removed. Without a prompt column that beginning is the prompt.

    Args:
        column: Column with the prompt; None: found by its name.
    """
    required = ((column,),) if column else _find_prompt_error
    return Format(partial(parse_row, column=column), required)


def line_format() -> Format:
    """Return the format of a text file with one prompt per line."""
    return Format(_parse_line, (("text",),))


def parse_completion_prompt(row: dict, column: str | None = None) -> Chat | None:
    """Return the prompt in a completion's row, without its answer; None if the row has no prompt.

    column: see generic_format; a row without it, as `snpatch generate` writes it, has the prompt in a known column.
    """
    if column in row:
        prompts = {column: row[column]}
    else:
        column, known = None, (*PREFERRED_COLUMNS, *PROMPT_COLUMNS)
        prompts = {name: value for name, value in row.items() if normalize_column(name) in known}
    example = parse_row(prompts, column) if prompts else None
    return example.prompt if isinstance(example, Example) else None


def parse_prompt(row: dict) -> Chat:
    """Return the prompt of a row, as load_dataset reads it; raise a RowError if it has none."""
    example = parse_row(row)
    if isinstance(example, str):
        raise RowError(f"expected a prompt, got {example}")
    return example.prompt


def _parse_line(row: dict) -> Example | str:
    return Example(user(get_text(row, "text"))) if row["text"].strip() else "a blank line"


def parse_row(row: dict, column: str | None = None) -> Example | str:
    """Return the example in a row that has a prompt column, or why the row is dropped; see generic_format.

    Raises:
        RowError: The row is invalid.
    """
    field = column or _find_prompt_column(tuple(row))
    row = {name: _decode_chat(name, value) if _holds_chat(name, field) else value for name, value in row.items()}
    ignored = _check_other_columns(row, field, is_named=column is not None)
    if field is None:
        _check_first_speaker(row)
        if _is_transcript(row["chosen"]):
            example = hh(row)
            return replace(example, meta={**rest(row, *PAIR_COLUMNS), **example.meta})
        return _build_example(row, None)
    value, kind = row[field], normalize_column(field)
    if kind == "transcript" and column is None:
        return red_team(row)
    if isinstance(value, list) and value:
        if isinstance(value[0], dict) and "from" in value[0]:
            return sharegpt({**rest(row, field, "messages"), "conversations": value})
        if isinstance(value[0], str) and kind.startswith("conversation"):
            return lima({**rest(row, field), "conversations": value})
        if isinstance(value[0], str) and not is_turns_column(field):
            raise RowError(f"{field}: expected a text or messages, got a list of texts. Write one row for each text")
        if isinstance(value[0], str) and len(value) > 1:
            ignored |= {"left_aside": "user turns after the first"}
    prompt, response = _parse_prompt(row, field)
    dialogue = None
    if column is None and kind == "prompt" and isinstance(value, str) and _is_filled(row.get("messages")):
        dialogue, response = split_answer(get_turns(row, "messages"))
        if not _starts_with(dialogue, prompt):
            raise RowError("messages begin with another text than prompt: choose one by column")
    return _build_example(row, prompt, dialogue, response, ignored, field, is_named=column is not None)


def _check_first_speaker(row: dict) -> None:
    """Raise a RowError for a transcript whose first turn is the assistant's."""
    for name in PAIR_COLUMNS:
        value = row[name]
        if isinstance(value, str) and (TURN.findall(value.strip()) or [None])[0] == "Assistant":
            raise RowError(
                f"{name}: expected a transcript that begins with 'Human:', got one that begins with 'Assistant:'. "
                "Remove the turns before the first human turn, or give --format hh-harmless, which ignores them"
            )


def _holds_chat(name: str, field: str | None) -> bool:
    return name == field or normalize_column(name) in CHAT_COLUMNS


def _decode_chat(name: str, value: object) -> object:
    """Return the messages that a text holds as JSON, as in CSV cells, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    is_list = is_turns_column(name) and value.lstrip().startswith("[")
    is_chat = CHAT_TEXT.fullmatch(value) and any(names <= {*FIELD.findall(value)} for names in MESSAGE_FIELDS)
    if not is_list and not is_chat:
        return value
    try:
        return parse_json(value)
    except ValueError:
        raise RowError(
            f"{name}: expected a text, or messages as JSON, got {shorten_repr(value)}. Write them with json.dumps"
        ) from None


def _parse_prompt(row: dict, field: str) -> tuple[Chat, str | None]:
    """Return (prompt, answer that follows it or None) of a field.

    The field is a string, a transcript, or a list of messages or of strings.
    """
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return user(get_text({field: value[0]}, field)), None
    if isinstance(value, list) or normalize_column(field) == "messages":
        return _split_response(get_turns(row, field))
    if not _is_transcript(value):
        return user(get_text(row, field)), None
    turns = parse_transcript(row, field)
    while turns[-1] == {"role": "assistant", "content": ""}:  # place for the answer
        turns.pop()
    return _split_response(turns)


@lru_cache(maxsize=256)  # it is called for each row, and rows of a file have the same columns
def _find_prompt_column(names: tuple[str, ...]) -> str | None:
    """Return the column with the prompt; None if chosen and rejected contain it.

    Raises:
        RowError: The column is unclear.
    """
    candidates = (
        _select(names, PREFERRED_COLUMNS[:1]) or _select(names, PREFERRED_COLUMNS[1:]) or _select(names, PROMPT_COLUMNS)
    )
    kinds = {normalize_column(name) for name in candidates}
    candidates = [name for name in candidates if not kinds & {*YIELDS_TO.get(normalize_column(name), ())}]
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
        _find_prompt_column(tuple(names))
    except RowError as error:
        return str(error)
    return None


def _select(names: Iterable[str], choices: tuple[str, ...]) -> list[str]:
    return [name for name in names if normalize_column(name) in choices]


def find_unused_columns(examples: Iterable[Example]) -> list[str]:
    """Return the columns with texts that neither are used nor describe a row by their name."""
    names = dict.fromkeys(name for e in examples for name, value in e.meta.items() if _is_filled_text(value))
    return [name for name in names if name not in (*NOTES, "file") and not _is_metadata(normalize_column(name))]


def _is_metadata(kind: str) -> bool:
    """Return whether a column describes a row by its normalized name."""
    return kind == HARMBENCH_CONTEXT or bool(METADATA_COLUMN.search(kind) and not CONTEXT_COLUMN.search(kind))


def _check_other_columns(row: dict, field: str | None, is_named: bool) -> dict[str, str]:
    """Return a note on HarmBench's context, which the paper ignores.

    Raises:
        RowError: A column may belong to the prompt, which the user did not name.
    """
    ignored = {}
    for name, value in row.items():
        kind = normalize_column(name)
        if name == field or not _is_filled_text(value):
            continue
        if kind == HARMBENCH_CONTEXT:
            ignored = {"left_aside": f"{name}, the context of a prompt"}
        elif not is_named and CONTEXT_COLUMN.search(kind):
            place, remedy = (field, f"Ignore it with --column {field}, or") if field else ("chosen", "Drop it, or")
            raise RowError(
                f"{name} may belong to the prompt in {place}. {remedy} write both into one column (as messages)"
            )
    return ignored


def _is_filled_text(value: object) -> bool:
    """Return whether a value is a text, an object or a list, and not empty."""
    return isinstance(value, (str, bytes, dict, list)) and _is_filled(value)


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
    row: dict,
    prompt: Chat | None,
    dialogue: Chat | None = None,
    response: str | None = None,
    meta: dict[str, str] | None = None,
    field: str | None = None,
    is_named: bool = False,
) -> Example:
    """Return an example of a prompt and the answers in other columns.

    Args:
        row: The row.
        prompt: None if it is the beginning of chosen and rejected.
        dialogue: Messages before the answer in `messages`; None: the prompt.
        response: Answer after the prompt or the dialogue.
        meta: Notes on the row.
        field: Column with the prompt.
        is_named: The user named the column, and so wants nothing but the prompt of an ambiguous row.
    """
    answers = _find_answers(row, field)
    if response is not None:
        answers[require(field) if dialogue is None else "messages"] = response
    response, conflict = _choose_answer(answers, field, is_named)
    used = [*answers, *PAIR_COLUMNS, *([field] if field else []), *(["messages"] if dialogue else [])]
    meta = {**rest(row, *used), **(meta or {})}
    meta |= {"no_answer": conflict} if conflict else {}
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
        raise RowError("chosen and rejected: expected conversations that begin with the same prompt, got none")
    if chosen and chosen == rejected:
        chosen, rejected, meta["no_pair"] = None, None, SAME_ANSWER
    if response is not None and rejected is None and (label_columns := _select(row, LABEL_COLUMNS)):
        labels = {LABELS.get(str(row[name]).strip().lower()) for name in label_columns}
        if labels == {False}:
            response, rejected = None, response
        elif labels != {True}:
            response = None
            meta |= {"no_answer": f"{' and '.join(label_columns)} is not true, false, 1 or 0"}
    return Example(prompt, response, chosen, rejected, None if dialogue == prompt else dialogue, meta)


def _find_answers(row: dict, field: str | None) -> dict[str, str]:
    """Return the answers in the columns of a row other than the prompt's."""
    answers = {}
    for name, value in row.items():
        kind = normalize_column(name)
        if name == field or value is None:
            continue
        if kind in ANSWER_COLUMNS:
            answers[name] = _parse_answer(row, name)
            if isinstance(answers[name], list):
                raise RowError(f"{name}: expected a string or one assistant turn")
        elif kind in TEXT_ANSWER_COLUMNS and isinstance(value, str):
            answers[name] = get_text(row, name, empty=True)
    return answers


def _choose_answer(answers: dict[str, str], field: str | None, is_named: bool) -> tuple[str | None, str | None]:
    """Return (the answer or None, why none of several is used or None); raise a RowError if they differ."""
    different = {answer: name for name, answer in reversed(answers.items()) if answer}
    if len(different) <= 1:
        return next(iter(different), "" if answers else None), None
    names = ", ".join(reversed(different.values()))
    if is_named:
        return None, f"several answers ({names})"
    remedy = f", or read the prompt alone with --column {field}" if field else ""
    raise RowError(f"expected one answer, got {names}, which differ. Remove all but one{remedy}")


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
        raise RowError(f"{field}: expected a string or one assistant turn, or turns that end with one")
    return turns[0]["content"] if len(turns) == 1 else turns


def _split_pair(
    chosen: str | Chat | None, rejected: str | Chat | None
) -> tuple[Chat, str | None, str | None, str | None]:
    """Return (common beginning, chosen answer, rejected answer, why there is no pair), split as TRL does."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("chosen and rejected: expected the same form, got a conversation and a string")
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
