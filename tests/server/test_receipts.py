"""Receipts in streams: the last chunk of an OpenAI stream carries the receipt, and no chunk is lost or reordered."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from snpatch.server.patch_request import PatchContext, Receipt
from snpatch.server.response_receipts import ChunkDelayer

DONE = "data: [DONE]\n\n"


def chunk(text: str, reason: str | None = None) -> str:
    choices = [{"index": 0, "text": text, "finish_reason": reason}]
    return f"data: {json.dumps({'choices': choices}, separators=(',', ':'))}\n\n"


USAGE = 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
ERROR = 'data: {"error":{"message":"no"}}\n\n'


def with_receipt(context: PatchContext, text: str, **changes) -> dict:
    return {**json.loads(text.removeprefix("data: ")), **changes, "snpatch": context.to_dict()}


@pytest.fixture
def context():
    return PatchContext("safe", "base", receipts=[Receipt(overwrites=6, positions=3, verified=True)])


def push_all(context: PatchContext, chunks: list[str]) -> list[list[str]]:
    delayer = ChunkDelayer(context)
    return [delayer.push(text) for text in chunks]


@pytest.mark.parametrize("last", [[chunk("b", "stop")], [chunk("b", "stop"), USAGE]])
def test_last_chunk_is_held_until_end_and_gets_receipt(context, last):
    first, *chunks, end = push_all(context, [chunk("a"), *last, DONE])
    assert first == [chunk("a")]
    assert chunks == [[], *([text] for text in last[:-1])]
    assert json.loads(end[0].removeprefix("data: ")) == with_receipt(context, last[-1])
    assert end[1:] == [DONE]


def test_unfinished_chunk_is_sent_at_once_after_a_held_one(context):
    first, second = chunk("a", "stop"), chunk("b")
    assert push_all(context, [first, second]) == [[], [first, second]]


def test_stream_without_finished_choice_gets_chunk_without_choices(context):
    *chunks, end = push_all(context, [chunk("a"), DONE])
    assert chunks == [[chunk("a")]]
    assert json.loads(end[0].removeprefix("data: ")) == with_receipt(context, chunk("a"), choices=[])


@pytest.mark.parametrize("chunks", [[ERROR], [chunk("a"), ERROR]])
def test_error_chunk_gets_no_receipt(context, chunks):
    *_, end = push_all(context, [*chunks, DONE])
    assert end == [ERROR, DONE]


def test_empty_stream_gets_no_receipt(context):
    assert push_all(context, [DONE]) == [[DONE]]
