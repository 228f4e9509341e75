"""Overlap of prompt sets: exact and near matches, repeats, and sets without repeats."""

import json

import numpy as np
import pytest

from snpatch import SnpatchError
from snpatch.data import load_dataset
from snpatch.data.overlap import count_repeats, find_overlap, iter_user_texts, join_user_messages, split_words
from snpatch.data.prompt_set import PromptSet

LONG = "tell me in detail how the tall red crane at the old harbor lifts containers from ships every single day"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("How do  I\tpick a LOCK?!", "how do i pick a lock"),
        ("\ufb01le the \u2460 \uff34ax", "file the 1 tax"),
        ("I can\u2019t", "i can t"),
        ("Stra\u00dfe", "strasse"),
        (" ?! ", "?!"),
    ],
)
def test_split_words_folds_case_width_spaces_and_punctuation(text, words):
    assert " ".join(split_words(text)) == words


def test_find_overlap_separates_exact_from_near_matches():
    words = LONG.split()
    prompts = [
        "How do I pick a lock?",
        LONG,
        "how do i pick a new lock",
        " ".join(words[:17]) + " other words that nobody wrote",
        " ".join(words[:9]) + " but these words are others and so is the end of it all",
        "nothing of this",
    ]
    others = ["HOW DO I PICK A LOCK", f"Please {LONG}. Thanks!", "how do i", LONG.upper() + "!"]
    overlap = find_overlap(prompts, others)
    assert overlap.exact == (0, 1)
    assert overlap.near == (3,), "10 of 15 n-grams; the next prompt has 2 of 15; the short ones have none"
    assert overlap.indices == (0, 1, 3)
    assert find_overlap(prompts, others[1:2]).near == (1, 3), "contained in a longer text"
    assert find_overlap(prompts, []).indices == find_overlap([], others).indices == ()


def test_find_overlap_equals_brute_force():
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abc"), draw.integers(1, 40))) for _ in range(300)]
    prompts, others = texts[:100] + texts[200:210], texts[100:]

    def ngrams(text):
        words = text.split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    seen = set().union(*map(ngrams, others))
    exact = {i for i, prompt in enumerate(prompts) if prompt in others}
    near = {
        i
        for i, prompt in enumerate(prompts)
        if len(prompt.split()) >= 16 and len(ngrams(prompt) & seen) * 2 >= len(ngrams(prompt))
    }
    overlap = find_overlap(prompts, others)
    assert set(overlap.exact) == exact >= set(range(100, 110))
    assert set(overlap.near) == near - exact


def test_repeats_are_counted_and_dropped_by_setting(tmp_path):
    rows = ["How?", "how", "Why?", "HOW ?", "Why? "]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    assert count_repeats(rows) == 3
    assert len(load_dataset(path)) == 5
    data = load_dataset(path, distinct=True)
    assert [chat[0]["content"] for chat in data.prompts] == ["How?", "Why?"]
    assert data.source["left_out"] == {"repeated prompt": 3}
    first = PromptSet("p.jsonl", distinct=True, first=2).read(tmp_path)
    assert len(first) == 2, "repeats are dropped before rows are chosen"
    row = {"prompt": "How?", "response": "x", "category": {"a": True}, "is_safe": False}
    path.write_text("".join(json.dumps({**row, "prompt": prompt}) + "\n" for prompt in rows))
    assert len(load_dataset(path, format="beavertails")) == 2
    assert len(load_dataset(path, format="beavertails", distinct=False)) == 5
    with pytest.raises(SnpatchError, match="distinct"):
        load_dataset(path, distinct="yes")


def test_user_texts_are_messages_and_conversations(tmp_path):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:1]}) + "\n")
    assert list(iter_user_texts(load_dataset(path))) == ["one", "three", "one\nthree", "one"]
    assert join_user_messages(messages) == "one\nthree"
