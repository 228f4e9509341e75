"""The sets of the paper: which fields of their published rows count, and where the hub has them.

Why some rows are left out rather than broken: the published sets themselves hold them (conversations with Bing in
ShareGPT, a prompt many times over in BeaverTails), so that a set must load without `skip_bad`; they are counted.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snpatch.data.dataset import Chat, Example
from snpatch.data.source_row import Columns
from snpatch.errors import is_unicode

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # only where a paragraph starts: people write "Human:" in texts
ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}


class RowError(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Hub:
    """What `datasets.load_dataset` is asked for."""

    id: str
    split: str  # the default: what prompts are taken from
    train: str = "train"  # the split to train on
    config: str | None = None
    data_dir: str | None = None
    files: tuple[str, ...] = ()  # URLs with {revision} and maybe {split}, read by `builder` instead of the repository
    builder: str = "json"

    @property
    def path(self) -> str:
        return self.builder if self.files else self.id


@dataclass(frozen=True)
class Format:
    """How rows become examples."""

    parse: Callable[[dict], Example | str]  # a text: why the row is left out. Raises RowError if it is broken
    columns: Columns
    hub: Hub | None = None
    distinct: bool = False  # later rows with the same prompt are left out


def _beavertails(row: dict) -> Example:
    """A prompt comes with several answers: the first row of each prompt is kept, with its answer and labels."""
    if not isinstance(row["is_safe"], bool) or not isinstance(row["category"], dict):
        raise RowError("is_safe must be true or false, and category an object")
    response = text_of(row, "response", empty=True)
    return Example(user(text_of(row, "prompt")), response, meta=rest(row, "prompt", "response"))


def hh(row: dict) -> Example:
    """The prompt is the first human turn of `chosen`; chosen and rejected are the last assistant turns.

    meta["no_pair"] says why there is no pair where the published rows have none: the texts differ before the last
    turn, or an answer is empty, or both are the same.
    """
    turns = transcript_of(row, "chosen")
    (dialogue, chosen), (other, rejected) = answered(turns), answered(transcript_of(row, "rejected"))
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
    """The prompt is the first human turn of the transcript; the response is its last assistant turn."""
    turns = transcript_of(row, "transcript")
    dialogue, response = answered(turns)
    return Example(turns[:1], response, dialogue=dialogue, meta=rest(row, "transcript"))


def _harmbench(row: dict) -> Example:
    """The behaviour alone, as the paper takes it: the context of contextual behaviours stays in meta."""
    return Example(user(text_of(row, "Behavior")), meta=rest(row, "Behavior"))


def _jailbreak_llms(row: dict) -> Example:
    """The forbidden question alone, without a jailbreak prompt."""
    return Example(user(text_of(row, "question")), meta=rest(row, "question"))


def lima(row: dict) -> Example:
    """The prompt is the first of the texts, which user and assistant say in turn (in LIMA's test split it is alone)."""
    texts = row["conversations"]
    if not isinstance(texts, list) or not texts:
        raise RowError(f"conversations must be a list of texts that is not empty, got {short(texts)}")
    said = [text_of({"conversations": text}, "conversations") for text in texts]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    dialogue, response = answered(turns)
    return Example(turns[:1], response, dialogue=dialogue, meta=rest(row, "conversations"))


def sharegpt(row: dict) -> Example | str:
    """The prompt is the first human turn; the conversation ends with its last answer.

    Both published forms: `messages` (role, content) and `conversations` (from, value). As in the paper, a conversation
    with anybody else than a human and ChatGPT is left out, and one without a human turn.
    """
    turns = turns_of(row, "messages") if "messages" in row else turns_of(row, "conversations", "from", "value")
    strangers = {turn["role"] for turn in turns} - SPEAKERS.keys()
    if strangers:
        return f"a turn of {min(strangers)}"
    turns = [{"role": SPEAKERS[turn["role"]], "content": turn["content"]} for turn in turns]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None or not turns[first]["content"]:
        return "no human turn" if first is None else "an empty human turn"
    dialogue, response = answered(turns[first:])
    return Example(turns[first : first + 1], response, dialogue=dialogue, meta=rest(row, "messages", "conversations"))


def _wikitext(row: dict) -> Example:
    """A line of the text, as it is; empty lines count, because the paper joins all of them."""
    if not isinstance(row["text"], str) or not is_unicode(row["text"]):
        raise RowError(f"text must be a text, got {short(row['text'])}")
    return Example([], row["text"])


def _shp(row: dict) -> Example:
    """Comment A is the preferred one if labels is 1, as the set's card says (the paper's code has it reversed)."""
    if row["labels"] not in (0, 1):
        raise RowError(f"labels must be 0 or 1, got {short(row['labels'])}")
    worse, better = (text_of(row, f"human_ref_{side}") for side in ("BA" if row["labels"] else "AB"))
    meta = rest(row, "history", "human_ref_A", "human_ref_B")
    return Example(user(text_of(row, "history")), chosen=better, rejected=worse, meta=meta)


def _reward_bench(row: dict) -> Example:
    """meta["subset"] tells the kind, for `Dataset.filter`.

    Safety is refusals-dangerous, refusals-offensive, xstest-should-refuse, xstest-should-respond and donotanswer (which
    the paper's code misspells, and so leaves out).
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    meta = rest(row, "prompt", "chosen", "rejected")
    return Example(user(text_of(row, "prompt")), chosen=chosen, rejected=rejected, meta=meta)


def _stack_exchange(row: dict) -> Example:
    """Answers to questions on Math Stack Exchange, the better voted one chosen."""
    question, chosen, rejected = (text_of(row, name) for name in ("question", "chosen", "rejected"))
    return Example(user(question), chosen=chosen, rejected=rejected, meta=rest(row, "question", "chosen", "rejected"))


def text_of(row: dict, field: str, empty: bool = False) -> str:
    """A field's text, stripped."""
    value = row[field]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise RowError(f"{field} must be a text{'' if empty else ' that is not empty'}, got {short(value)}")
    if not is_unicode(value):
        raise RowError(f"{field} holds half a surrogate pair, or bytes that are not UTF-8")
    return value.strip()


def turns_of(row: dict, field: str, role: str = "role", content: str = "content") -> Chat:
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(t, dict) and isinstance(t.get(role), str) for t in value):
        raise RowError(f"{field} must be a list of {role} and {content}, got {short(value)}")
    if not all(isinstance(turn.get(content), str) for turn in value):
        raise RowError(f"{field} must be a list of {role} and {content}, each a text")
    return [{"role": turn[role], "content": text_of(turn, content, empty=True)} for turn in value]


def transcript_of(row: dict, field: str) -> Chat:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", from the first human turn on."""
    _, *parts = TURN.split(text_of(row, field))
    turns = [
        {"role": ROLES[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None or not turns[first]["content"]:
        raise RowError(f"{field} has no human turn" if first is None else f"the first human turn of {field} is empty")
    return turns[first:]


def answered(turns: Chat) -> tuple[Chat, str | None]:
    """(the turns before the last answer, the answer or None): an assistant turn right after a user's."""
    for i in range(len(turns) - 1, 0, -1):
        if turns[i]["role"] == "assistant" and turns[i - 1]["role"] == "user":
            return turns[:i], turns[i]["content"]
    return turns, None


def user(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def rest(row: dict, *used: str) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in used}


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


STACK = "prhegde/preference-data-math-stack-exchange"
HH, SHAREGPT = "Anthropic/hh-rlhf", "anon8231489123/ShareGPT_Vicuna_unfiltered"
SHAREGPT_FILE = f"hf://datasets/{SHAREGPT}@{{revision}}/HTML_cleaned_raw_dataset/sg_90k_part%d_html_cleaned.json"
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
