"""Formats of the paper's datasets: the fields of their published rows, and their location on the hub.

Why some rows are dropped and counted instead of being invalid: the published datasets contain them (conversations with
Bing in ShareGPT, repeated prompts in BeaverTails), and a dataset must load without `skip_invalid`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snpatch.data.dataset import Chat, Example
from snpatch.data.source_row import Columns
from snpatch.errors import is_unicode

TURN = re.compile(
    r"(?:^|\n\n)(Human|Assistant):"
)  # only at the start of a paragraph: "Human:" also occurs within messages
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKER_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}


class RowError(Exception):
    """A row is invalid; the message says why."""


@dataclass(frozen=True)
class Hub:
    """Location of a dataset, as arguments of `datasets.load_dataset`."""

    id: str
    split: str  # default split, for prompts
    train: str = "train"  # split for training
    config: str | None = None
    data_dir: str | None = None
    files: tuple[
        str, ...
    ] = ()  # URLs with {revision} and optionally {split}, read by `builder` instead of the repository
    builder: str = "json"

    @property
    def path(self) -> str:
        """Return the first argument of `load_dataset`.

        It is the repository's `id`, or the builder that reads `files`.
        """
        return self.builder if self.files else self.id


@dataclass(frozen=True)
class Format:
    """Rule that turns rows into examples."""

    parse: Callable[[dict], Example | str]  # a string: why the row is dropped. Raises RowError
    columns: Columns
    hub: Hub | None = None
    distinct: bool = False  # by default, drop later rows with the same prompt


def _beavertails(row: dict) -> Example:
    """Return an example with answer and labels; each prompt has several rows, of which the first is kept."""
    if not isinstance(row["is_safe"], bool) or not isinstance(row["category"], dict):
        raise RowError("is_safe, category: expected true or false, and an object")
    response = get_text(row, "response", empty=True)
    return Example(user(get_text(row, "prompt")), response, meta=rest(row, "prompt", "response"))


def hh(row: dict) -> Example:
    """Return an example of hh-rlhf.

    The prompt is the first human turn; the answers are the last assistant turns. meta["no_pair"] gives the reason if a
    published row has no preference pair: the texts differ before the last turn, an answer is empty, or both are the
    same.
    """
    turns = parse_transcript(row, "chosen")
    (dialogue, chosen), (other, rejected) = split_answer(turns), split_answer(parse_transcript(row, "rejected"))
    if dialogue != other:
        why = "the texts differ before the last turn"
    elif not chosen or not rejected:
        why = "an answer is empty"
    elif chosen == rejected:
        why = "both answers are the same"
    else:
        return Example(turns[:1], chosen=chosen, rejected=rejected, dialogue=dialogue)
    return Example(turns[:1], dialogue=dialogue, meta={"no_pair": why})


def red_team(row: dict) -> Example:
    """Return an example of a transcript: its first human turn and its last assistant turn."""
    turns = parse_transcript(row, "transcript")
    dialogue, response = split_answer(turns)
    return Example(turns[:1], response, dialogue=dialogue, meta=rest(row, "transcript"))


def _harmbench(row: dict) -> Example:
    """Return the behavior alone, as in the paper; the context of contextual behaviors stays in meta."""
    return Example(user(get_text(row, "Behavior")), meta=rest(row, "Behavior"))


def _jailbreak_llms(row: dict) -> Example:
    """Return the forbidden question alone, without a jailbreak prompt."""
    return Example(user(get_text(row, "question")), meta=rest(row, "question"))


def lima(row: dict) -> Example:
    """Return an example of alternating user and assistant messages (LIMA's test split has only the first)."""
    texts = row["conversations"]
    if not isinstance(texts, list) or not texts:
        raise RowError(f"conversations: expected a non-empty list of strings, got {shorten_repr(texts)}")
    contents = [get_text({"conversations": text}, "conversations") for text in texts]
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    dialogue, response = split_answer(turns)
    return Example(turns[:1], response, dialogue=dialogue, meta=rest(row, "conversations"))


def sharegpt(row: dict) -> Example | str:
    """Return an example: the first human turn as prompt, and the conversation up to its last answer.

    Reads both published forms: `messages` (role, content) and `conversations` (from, value). As in the paper,
    conversations without a human turn, or with others than a human and ChatGPT, are dropped.
    """
    turns = get_turns(row, "messages") if "messages" in row else get_turns(row, "conversations", "from", "value")
    others = {turn["role"] for turn in turns} - SPEAKER_ROLES.keys()
    if others:
        return f"a turn of {min(others)}"
    turns = [{"role": SPEAKER_ROLES[turn["role"]], "content": turn["content"]} for turn in turns]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None or not turns[first]["content"]:
        return "no human turn" if first is None else "an empty human turn"
    dialogue, response = split_answer(turns[first:])
    return Example(turns[first : first + 1], response, dialogue=dialogue, meta=rest(row, "messages", "conversations"))


def _wikitext(row: dict) -> Example:
    """Return a line of the text unchanged; empty lines count, because the paper joins all of them."""
    if not isinstance(row["text"], str) or not is_unicode(row["text"]):
        raise RowError(f"text: expected a string, got {shorten_repr(row['text'])}")
    return Example([], row["text"])


def _shp(row: dict) -> Example:
    """Return a pair: comment A is preferred if labels is 1, as in its card (the paper's code reverses it)."""
    if row["labels"] not in (0, 1):
        raise RowError(f"labels: expected 0 or 1, got {shorten_repr(row['labels'])}")
    worse, better = (get_text(row, f"human_ref_{side}") for side in ("BA" if row["labels"] else "AB"))
    meta = rest(row, "history", "human_ref_A", "human_ref_B")
    return Example(user(get_text(row, "history")), chosen=better, rejected=worse, meta=meta)


def _reward_bench(row: dict) -> Example:
    """Return a pair with its kind in meta["subset"], for `Dataset.filter`.

    Safety is refusals-dangerous, refusals-offensive, xstest-should-refuse, xstest-should-respond and donotanswer (which
    the paper's code misspells and therefore drops).
    """
    chosen, rejected = get_text(row, "chosen"), get_text(row, "rejected")
    meta = rest(row, "prompt", "chosen", "rejected")
    return Example(user(get_text(row, "prompt")), chosen=chosen, rejected=rejected, meta=meta)


def _stack_exchange(row: dict) -> Example:
    """Return a pair of answers on Math Stack Exchange; the one with more votes is chosen."""
    question, chosen, rejected = (get_text(row, name) for name in ("question", "chosen", "rejected"))
    return Example(user(question), chosen=chosen, rejected=rejected, meta=rest(row, "question", "chosen", "rejected"))


def get_text(row: dict, field: str, empty: bool = False) -> str:
    """Return a field's string, stripped.

    Raises:
        RowError: The field has another type or, unless `empty`, is an empty string.
    """
    value = row[field]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise RowError(f"{field}: expected a {'' if empty else 'non-empty '}string, got {shorten_repr(value)}")
    if not is_unicode(value):
        raise RowError(f"{field}: expected UTF-8, got half a surrogate pair or invalid bytes")
    return value.strip()


NOT_TEXT_FIELDS = (  # of a message; templates render them with its content, or instead of it
    "tool_calls", "tool_call_id", "function_call", "tools", "reasoning", "reasoning_content", "thinking", "images",
    "image", "audio", "video", "videos",
)  # fmt: skip


def get_turns(row: dict, field: str, role: str = "role", content: str = "content") -> Chat:
    """Return a field's list of messages, with contents stripped; raise a RowError if it is none."""
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(t, dict) and isinstance(t.get(role), str) for t in value):
        raise RowError(f"{field}: expected a list of {role} and {content}, got {shorten_repr(value)}")
    if not all(isinstance(turn.get(content), str) for turn in value):
        raise RowError(f"{field}: expected a list of {role} and {content}, each a string")
    if names := {name for turn in value for name in NOT_TEXT_FIELDS if turn.get(name)}:
        raise RowError(f"{field}: expected messages of text, got {', '.join(sorted(names))}, which would be lost")
    return [{"role": turn[role], "content": get_text(turn, content, empty=True)} for turn in value]


def parse_transcript(row: dict, field: str) -> Chat:
    r"""Return the turns of "\n\nHuman: ...\n\nAssistant: ...", from the first human turn on."""
    _, *parts = TURN.split(get_text(row, field))
    turns = [
        {"role": TRANSCRIPT_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None or not turns[first]["content"]:
        raise RowError(f"{field} has no human turn" if first is None else f"the first human turn of {field} is empty")
    return turns[first:]


def split_answer(turns: Chat) -> tuple[Chat, str | None]:
    """Return (turns before the last answer, answer or None).

    An answer is an assistant turn right after a user's.
    """
    for i in range(len(turns) - 1, 0, -1):
        if turns[i]["role"] == "assistant" and turns[i - 1]["role"] == "user":
            return turns[:i], turns[i]["content"]
    return turns, None


def user(text: str) -> Chat:
    """Return a chat of one user message."""
    return [{"role": "user", "content": text}]


def rest(row: dict, *used: str) -> dict[str, Any]:
    """Return the columns of a row without the used ones."""
    return {column: value for column, value in row.items() if column not in used}


def shorten_repr(value: object) -> str:
    """Return a value's repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


STACK = "prhegde/preference-data-math-stack-exchange"
HH, SHAREGPT = "Anthropic/hh-rlhf", "anon8231489123/ShareGPT_Vicuna_unfiltered"
SHAREGPT_FILE = f"hf://datasets/{SHAREGPT}@{{revision}}/HTML_cleaned_raw_dataset/sg_90k_part%d_html_cleaned.json"
HH_FILES = tuple(f"hf://datasets/{HH}@{{revision}}/{kind}-base/{{split}}.jsonl.gz" for kind in ("harmless", "helpful"))
HARMBENCH_FILE = (
    "https://raw.githubusercontent.com/centerforaisafety/HarmBench/{revision}"
    "/data/behavior_datasets/harmbench_behaviors_text_{split}.csv"
)

DATASETS: dict[str, Format] = {
    "beavertails": Format(
        _beavertails,
        (("prompt", "response", "category", "is_safe"),),
        Hub("PKU-Alignment/BeaverTails", "330k_test", "330k_train"),
        distinct=True,
    ),
    "hh-harmless": Format(hh, (("chosen", "rejected"),), Hub(HH, "test", data_dir="harmless-base")),
    "hh-helpful": Format(hh, (("chosen", "rejected"),), Hub(HH, "test", data_dir="helpful-base")),
    "hh": Format(hh, (("chosen", "rejected"),), Hub(HH, "test", files=HH_FILES)),
    "red-team-attempts": Format(red_team, (("transcript",),), Hub(HH, "train", data_dir="red-team-attempts")),
    "harmbench": Format(
        _harmbench,
        (("Behavior",),),
        Hub("centerforaisafety/HarmBench", "all", files=(HARMBENCH_FILE,), builder="csv"),
    ),
    "jailbreak-llms": Format(_jailbreak_llms, (("question",),), Hub("TrustAIRLab/forbidden_question_set", "train")),
    "lima": Format(
        lima,
        (("conversations",),),
        Hub("GAIR/lima", "train", files=("hf://datasets/GAIR/lima@{revision}/{split}.jsonl",)),
    ),
    "sharegpt": Format(
        sharegpt,
        (("messages",), ("conversations",)),
        Hub(SHAREGPT, "train", files=(SHAREGPT_FILE % 1, SHAREGPT_FILE % 2)),
    ),
    "wikitext-2": Format(_wikitext, (("text",),), Hub("Salesforce/wikitext", "test", config="wikitext-2-raw-v1")),
    "shp": Format(_shp, (("history", "human_ref_A", "human_ref_B", "labels"),), Hub("stanfordnlp/SHP", "test")),
    "reward-bench": Format(
        _reward_bench,
        (("prompt", "chosen", "rejected", "subset"),),
        Hub("allenai/reward-bench", "filtered", "filtered"),
    ),
    "stack-exchange": Format(
        _stack_exchange,
        (("question", "chosen", "rejected"),),
        Hub(STACK, "train", files=(f"hf://datasets/{STACK}@{{revision}}/math_stack_exchange.json",)),
    ),
}
