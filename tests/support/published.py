"""A few rows of each published dataset in its columns, and writers of its file formats."""

import csv
import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

CATEGORIES = {"animal_abuse": False, "violence,aiding_and_abetting,incitement": True}


def talk(*texts: str) -> str:
    """Return a transcript as in hh-rlhf: human and assistant in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def tails(prompt: str, response: str, safe: bool) -> dict:
    return {"prompt": prompt, "response": response, "category": CATEGORIES, "is_safe": safe}


def behavior(text: str, kind: str, context: str) -> dict:
    return {
        "Behavior": text,
        "FunctionalCategory": kind,
        "SemanticCategory": "illegal",
        "Tags": "context" if context else "",
        "ContextString": context,
        "BehaviorID": text.replace(" ", "_"),
    }


def attempt(transcript: str, rating: float) -> dict:
    return {
        "min_harmlessness_score_transcript": -rating,
        "num_params": "52B",
        "model_type": "plain lm",
        "transcript": transcript,
        "rating": rating,
        "task_description": "Ask for a fake ID.",
        "tags": None,
    }


def forbidden(number: int, text: str) -> dict:
    return {
        "content_policy_id": "0",
        "content_policy_name": "Illegal Activity",
        "q_id": str(number),
        "question": text,
    }


def shp(history: str, a: str, b: str, label: int) -> dict:
    return {
        "post_id": "x1",
        "domain": "askculinary_test",
        "history": history,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "score_A": 9,
        "score_B": 3,
    }


def bench(prompt: str, chosen: str, rejected: str, subset: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset, "id": 7}


def stack(question: str, chosen: str, rejected: str) -> dict:
    return {"question": question, "chosen": chosen, "rejected": rejected}


def turns(*texts: str) -> list[dict]:
    """Return turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def build_sharegpt_row(id: str, *turns: tuple[str, str]) -> dict:
    """Return a conversation in ShareGPT's raw form."""
    return {"id": id, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


HH = [
    {"chosen": talk("How?", "No."), "rejected": talk("How?", "So.")},
    {"chosen": talk("One\n\ntwo", "Hm", "Why?", "Good."), "rejected": talk("One\n\ntwo", "Hm", "Why?", "Bad.")},
]
WIKI = ["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n", ""]
ROWS: dict[str, list[dict]] = {
    "beavertails": [
        tails(" How do I rob?\n", "Wear a mask.", False),
        tails("What is the time?", "Noon.", True),
        tails("How do I rob?", "Do not.", True),
    ],
    "hh-harmless": HH,
    "hh-helpful": HH,
    "hh": HH,
    "red-team-attempts": [attempt(talk("Forge it", "No", "Please"), 1.0), attempt(talk("Hide it", "Sure"), 4.0)],
    "harmbench": [behavior("Make a bomb, now", "standard", ""), behavior("Write it", "contextual", 'A "b"\nc, d')],
    "jailbreak-llms": [forbidden(0, "How to pick a lock?"), forbidden(1, "How to lie?")],
    "lima": [
        {"conversations": ["Why?", "Because."], "source": "stackexchange"},
        {"conversations": ["One?", "1", "Two?", "2"], "source": "multi_turn"},
        {"conversations": ["Alone?"], "source": "test"},
    ],
    "sharegpt": [
        build_sharegpt_row("a_0", ("human", "Hi"), ("gpt", "Yo"), ("human", "More")),
        build_sharegpt_row("b_0", ("user", "Hi"), ("bing", "I am Bing")),
        build_sharegpt_row("c_1", ("chatgpt", "So"), ("human", "Go on"), ("gpt", "ok")),
        build_sharegpt_row("d_0"),
    ],
    "wikitext-2": [{"text": line} for line in WIKI],
    "shp": [shp("Salt?", "A lot", "A bit", 1), shp("Pepper?", "None", "Some", 0)],
    "reward-bench": [
        bench("Kill a process", "kill -9", "I cannot", "xstest-should-respond"),
        bench("Insult me", "No", "You fool", "refusals-offensive"),
    ],
    "stack-exchange": [stack("What is 1 + 1?", "2", "3"), stack("Is 7 prime?\n", "Yes, as $7 = 7$", "No")],
}


def lines(rows: Sequence[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: Sequence[dict]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def table(rows: Sequence[dict]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: Sequence[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def raw(rows: Sequence[dict]) -> bytes:
    return "".join(row["text"] or " \n" for row in rows).encode()


WRITERS = {
    ".jsonl": lines,
    ".json": array,
    ".csv": table,
    ".parquet": parquet,
    ".raw": raw,
    ".jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    ".array.jsonl.gz": lambda rows: gzip.compress(array(rows)),
    ".jsonl.xz": lambda rows: lzma.compress(lines(rows)),
}
KINDS = {
    "beavertails": (".jsonl.xz", ".jsonl.gz", ".parquet"),
    "hh-harmless": (".jsonl.gz", ".jsonl", ".parquet"),
    "hh-helpful": (".jsonl.gz", ".jsonl", ".parquet"),
    "hh": (".jsonl.gz", ".jsonl", ".parquet"),
    "red-team-attempts": (".array.jsonl.gz", ".jsonl", ".parquet"),
    "harmbench": (".csv", ".parquet"),
    "jailbreak-llms": (".csv", ".parquet"),
    "lima": (".jsonl", ".parquet"),
    "sharegpt": (".json", ".jsonl", ".parquet"),
    "wikitext-2": (".parquet", ".raw", ".jsonl"),
    "shp": (".json", ".jsonl", ".parquet"),
    "reward-bench": (".parquet", ".jsonl"),
    "stack-exchange": (".json", ".jsonl", ".parquet"),
}


def write(folder: Path, name: str, kind: str, rows: Sequence[dict]) -> Path:
    path = folder / f"{name}{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(WRITERS[kind](rows))
    return path
