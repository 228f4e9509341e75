"""Prompts, completions and sampling of wrong types: errors of one line."""

import collections
import json
import re

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import tiny
import torch

from snpatch.data import load_dataset
from snpatch.engine import requests as module
from snpatch.engine.requests import Completion, Requests
from snpatch.errors import SnpatchError
from snpatch.models.adapters import IA3Scales
from snpatch.models.geometry import Geometry
from snpatch.models.model import Model, Weights
from snpatch.models.notes import Notes
from snpatch.models.templates import ChatTemplate
from snpatch.sampling import Sampling

HALF = "a\ud83d"
TEXT = tiny.PROMPTS[0]


@pytest.fixture(scope="module")
def requests():
    tokenizer, widths = tiny.tokenizer(), {"down_proj": 96}
    model = Model(Weights("m", "d", None, "s", frozenset({2}), 0), IA3Scales.ones(3, widths))
    geometry = Geometry(3, 96, 128, len(tokenizer), widths, "float32")
    return Requests([ChatTemplate("tulu", tokenizer)], geometry, {"base": model}, Notes())


KIND = "expected a string, a chat .a list of role and content. or a list of token ids"
HALF_PAIR = "expected valid Unicode, got half of a surrogate pair"
IDS = r"expected token ids in 0\.\."
NO_PROMPT = [
    (b"the cat", KIND), (bytearray(b"a"), KIND), (np.bytes_(b"a"), KIND), ({"the cat": 1}, KIND), (None, KIND),
    (float("nan"), KIND), (3, KIND), (True, KIND), ({1, 2}, KIND), ((i for i in [1]), KIND), (["a", "b"], KIND),
    ([[1, 2]], KIND), ([{1}], KIND), (np.array([[1, 2]]), KIND), (torch.tensor(3), KIND), (np.array(["a"]), KIND),
    (collections.UserDict(role="user", content="a"), KIND), (object(), KIND),
    ([True, 1], IDS), ([1.0, 2], IDS), ([1, -1], IDS), ([1, None], IDS), ([10**9], IDS), ([b"a"], IDS),
    ([np.float32(1)], IDS), (np.array([1.0]), IDS), (torch.tensor([1.0]), IDS), (torch.tensor([True]), IDS),
    ([2**70], IDS), ([10**400], IDS), ([-(2**70)], IDS),
    (memoryview(b"AB"), KIND), (np.array(5), KIND), (np.void(b"AB"), KIND),
    (HALF, HALF_PAIR),
    ([{"role": "user", "content": HALF}], HALF_PAIR),
    ([{"role": "user", "content": [{"type": "text", "text": HALF}]}], HALF_PAIR),
    ([{"role": HALF, "content": "a"}], HALF_PAIR),
    ([{"role": "user", "content": None}], "message 0: expected content"),
    ([{"role": "user"}], "message 0: expected content"),
    ([{"role": "user", "content": 3}], "message 0: expected content"),
    ([{"content": "a"}], "message 0: expected a table with role and content"),
    ([{"role": "user", "content": "a"}, 3], "message 1: expected a table with role and content"),
    ([], "expected at least one token"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "message"), NO_PROMPT, ids=lambda value: ascii(value)[:40])
def test_encode_invalid_prompt_is_one_line(requests, prompt, message):
    with pytest.raises(SnpatchError, match=f"prompt 1,? ?.*{message}") as caught:
        requests.encode([TEXT, prompt], "base")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, 1.5, -1, None, 10**9, b"a"], ids=str)
def test_encode_wrong_token_id_is_shown(requests, value):
    with pytest.raises(SnpatchError, match=f"prompt 0: {IDS}.*, got {re.escape(repr(value))}$"):
        requests.encode([[5, value]], "base")


@pytest.mark.parametrize(
    "prompt",
    [[5, 6], (5, 6), range(5, 7), np.array([5, 6]), [np.int64(5), np.uint8(6)], torch.tensor([5, 6]),
     torch.tensor([5, 6], dtype=torch.int32), [torch.tensor(5), torch.tensor(6)]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_encode_accepts_lists_of_integers(requests, prompt):
    assert requests.encode([prompt], "base") == [[5, 6]]
    assert requests.completions([prompt], 1) == [[5, 6]]


def test_encode_accepts_other_sequence_types(requests):
    want = requests.encode([TEXT], "base")
    for prompts in ([np.str_(TEXT)], (TEXT,), np.array([TEXT]), collections.deque([TEXT])):
        assert requests.encode(prompts, "base") == want
    chat = [{"role": "user", "content": TEXT}]
    for equal_chat in (tuple(chat), [collections.UserDict(chat[0])]):
        assert requests.encode([equal_chat], "base") == requests.encode([chat], "base")
    assert requests.encode(np.array([[5, 6], [6, 5]]), "base") == [[5, 6], [6, 5]]


NO_LIST = [
    torch.tensor(5),
    np.array(5),
    np.array("a"),
    memoryview(b"AB"),
    bytearray(b"a"),
    TEXT,
    b"a",
    {"a": 1},
    {"a", "b"},
    (x for x in ["a"]),
    None,
    3,
    float("nan"),
    iter(["a"]),
]


@pytest.mark.parametrize("prompts", NO_LIST, ids=lambda value: type(value).__name__)
def test_encode_without_list_is_one_line(requests, prompts):
    with pytest.raises(SnpatchError, match="prompts: expected a list, got "):
        requests.encode(prompts, "base")
    with pytest.raises(SnpatchError, match="completions: expected a list, got "):
        requests.completions(prompts, 1)


@pytest.mark.parametrize(
    ("completion", "message"),
    [(b"a", "expected a string or a list of token ids"), (memoryview(b"AB"), "expected a string"),
      ([2**70], IDS), (torch.tensor(5), "expected a string"),
      (None, "expected a string"), ({"a": 1}, "expected a string"),
      (3, "expected a string"), ([1.5], IDS), ([True], IDS), (HALF, "half of a surrogate pair")],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_completions_invalid_is_one_line(requests, completion, message):
    with pytest.raises(SnpatchError, match=f"completion 1:? .*{message}"):
        requests.completions([TEXT, completion], 2)


WHOLE, NUMBER, FLAG = "expected a whole number", "expected a finite number", "expected True or False"
NO_SAMPLING = [
    *(
        ({name: value}, WHOLE)
        for name in ("max_tokens", "min_tokens", "top_k", "n")
        for value in (None, 3.0, "5", True)
    ),
    *(({"seed": value}, WHOLE) for value in (1.5, "3", True, b"1")),
    *(({name: value}, NUMBER) for name in ("temperature", "top_p") for value in (None, "0.7", True, [1], 1j)),
    *(({name: value}, FLAG) for name in ("ignore_eos", "logprobs") for value in (None, 1, "yes")),
    *(
        ({"stop": value}, "expected a string or a list of strings")
        for value in (None, b"", 3, [None], {"a"}, [b"a"], HALF)
    ),
    *(({"vllm": value}, "expected a mapping") for value in (None, [1], {1: 2})),
    *(
        ({name: value}, "expected a finite number")
        for name in ("temperature", "top_p")
        for value in (float("nan"), float("inf"), 10**400, np.float64("nan"))
    ),
    ({"temperature": -1}, "expected 0 .greedy. or at least"),
]


@pytest.mark.parametrize(("fields", "message"), NO_SAMPLING, ids=lambda value: ascii(value)[:40])
def test_sampling_wrong_type_is_one_line(fields, message):
    (name,) = fields
    with pytest.raises(SnpatchError, match=f"sampling: {name}:? {message}") as caught:
        Sampling(**fields)
    assert caught.value.field == name


def test_sampling_accepts_numpy_numbers():
    sampling = Sampling(temperature=np.float32(0.5), max_tokens=np.int64(5), seed=np.int32(3), top_p=np.float64(1.0))
    assert sampling == Sampling(temperature=0.5, max_tokens=5, seed=3)
    assert [type(v) for v in (sampling.temperature, sampling.max_tokens, sampling.seed)] == [float, int, int]
    whole = Sampling(temperature=1, top_p=1)  # transformers takes no int for a temperature
    assert [type(v) for v in (whole.temperature, whole.top_p)] == [float, float]


def test_encode_accepts_rows_of_files(requests):
    chat = [{"role": "user", "content": TEXT}]
    (expected,) = requests.encode([chat], "base")
    answered = [*chat, {"role": "assistant", "content": "an answer"}]
    for row in (
        {"prompt": TEXT, "id": 3},
        {"messages": chat},
        {"prompt": chat},
        {"instruction": TEXT, "output": "an answer"},
        {"messages": answered},
        {"prompt": TEXT, "messages": answered},
        {"prompt": TEXT, "chosen": "an answer", "rejected": "another"},
        {"chosen": answered, "rejected": [*chat, {"role": "assistant", "content": "another"}]},
        {"prompt": TEXT, "system": "", "context": float("nan")},
        {"messages": np.array(answered, dtype=object)},
        collections.UserDict(prompt=TEXT),
    ):
        assert requests.encode([row], "base") == [expected]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TEXT}, {"prompt": f"  {TEXT}\n"}, {"prompt": TEXT, "system": "Be brief."}, {"goal": TEXT},
        {"prompt": TEXT, "system_prompt": "Be brief."}, {"instruction": TEXT, "input": "a text"}, {"prompt": ""},
        {"prompt": TEXT, "messages": [{"role": "user", "content": "another"}]}, {"prompt": None},
        {"prompt": [5, 6], "id": 1},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "an answer"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]},
        {"transcript": "\n\nHuman: a\n\nAssistant: b"}, {"question": TEXT, "answer": "b"}, {"goal": "a", "query": "b"},
    ],
    ids=lambda row: ascii(row)[:60],
)  # fmt: skip
def test_encode_reads_rows_as_load_dataset_does(requests, tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    try:
        expected = load_dataset(tmp_path / "rows.jsonl").prompts
    except SnpatchError as error:
        reason = str(error).rpartition("line 1: ")[2].removeprefix("expected an object with ")
        with pytest.raises(SnpatchError, match=f"^prompt 0: .*{re.escape(reason)}"):
            requests.encode([row], "base")
    else:
        assert requests.encode([row], "base") == requests.encode(expected, "base")


def build_tables():
    frame = pandas.DataFrame({"prompt": [TEXT], "id": [1]})
    table = pyarrow.table({"prompt": [TEXT]})
    structured = np.array([(5, 6)], dtype=[("prompt", int), ("id", int)])
    return [frame, frame.T, pandas.DataFrame({"prompt": [TEXT]}), table, table.to_batches()[0], structured]


@pytest.mark.parametrize("values", build_tables(), ids=lambda value: type(value).__name__)
def test_encode_table_by_columns_is_one_line(requests, values):
    with pytest.raises(SnpatchError, match=r"prompts: expected a list, got .* a table by columns. Pass its rows"):
        requests.encode(values, "base")
    with pytest.raises(SnpatchError, match=r"completions: expected a list, got .* a table by columns. Pass its rows"):
        requests.completions(values, 1)


def test_encode_accepts_rows_and_columns_of_tables(requests):
    frame = pandas.DataFrame({"prompt": [TEXT], "id": [1]})
    dataset, rows = datasets.Dataset.from_dict({"prompt": [TEXT]}), requests.encode([{"prompt": TEXT}], "base")
    for values in (frame.to_dict("records"), dataset, pyarrow.table({"prompt": [TEXT]}).to_pylist()):
        assert requests.encode(values, "base") == rows
    texts = requests.encode([TEXT], "base")
    for values in (frame["prompt"], pandas.Index([TEXT]), dataset["prompt"]):
        assert requests.encode(values, "base") == texts
    assert requests.completions(frame["prompt"], 1) == requests.completions([TEXT], 1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"role": "user", "content": TEXT}], r"one message of a chat\. Wrap the chat in a list"),
        ({"prompt": TEXT}, r"prompts: expected a list, got one row .*Wrap it in a list"),
        ([{"words": TEXT}], "or a row as in a file: prompt or messages, got words"),
        ([{"prompt": 3}], "expected a string, a chat"),
        ([{"messages": [{"role": "user"}]}], "messages: expected a list of role and content"),
    ],
)
def test_encode_misplaced_row_or_chat_is_explained(requests, prompts, message):
    with pytest.raises(SnpatchError, match=message):
        requests.encode(prompts, "base")


def test_plain_strings_to_chat_model_warn_once(requests, caplog, monkeypatch):
    monkeypatch.setattr(module, "_logged", set())
    monkeypatch.setattr(requests.templates[0].tokenizer, "chat_template", "a template")
    requests.warn_of_plain_texts([[5, 6], [{"role": "user", "content": TEXT}]], ["base", "base"])
    assert not caplog.messages
    for _ in range(2):
        requests.warn_of_plain_texts([TEXT, TEXT], ["base", "base"])
    assert len(caplog.messages) == 1
    assert "without the chat template" in caplog.messages[0]


def test_completion_repr_begins_with_text():
    completion = Completion([1, 2], [3], "a text", "eos", None, None, 40)
    assert repr(completion) == "Completion('a text', finish_reason='eos', 2 + 1 tokens, 40 overwrites)"
