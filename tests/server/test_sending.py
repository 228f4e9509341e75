"""Answers must be read within a deadline, and their errors contain no path of the server's machine."""

import asyncio
import gc
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from snpatch import SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")

from snpatch.server.responses import (
    EventStream,
    find_private_folders,
    limit_send_time,
    remove_paths,
    remove_paths_from_errors,
)
from snpatch.server.sweep_endpoint import ClientSweep

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}  # uvicorn's


class Client:
    """Client that takes `takes` messages, and then neither reads nor disconnects."""

    def __init__(self, takes: int) -> None:
        self.taken, self._takes = [], takes

    async def send(self, message):
        if len(self.taken) == self._takes:
            await asyncio.Event().wait()
        self.taken.append(message)

    async def receive(self):
        await asyncio.Event().wait()

    async def get(self, app, limit_s: float = 0.05):
        receive, send = limit_send_time(self.receive, self.send, limit_s)
        await app(SCOPE, receive, send)


@pytest.mark.parametrize("kind", [StreamingResponse, EventStream])
@pytest.mark.parametrize("takes", [1, 3])
def test_stream_of_stalled_client_is_closed(kind, takes):
    closed = []

    async def chunks():
        try:
            while True:
                yield "chunk"
        finally:
            closed.append(True)

    async def run():
        client = Client(takes)
        await client.get(kind(chunks()))
        await asyncio.sleep(0)
        return client

    gc.disable()
    try:
        client = asyncio.run(run())
    finally:
        gc.enable()
    assert len(client.taken) == takes
    assert closed == [True]


def test_answer_to_stalled_client_ends():
    client = Client(1)
    asyncio.run(client.get(JSONResponse({"text": "long"})))
    assert [message["type"] for message in client.taken] == ["http.response.start"]


def test_reading_client_gets_whole_stream():
    async def chunks():
        for i in range(5):
            yield str(i)

    client = Client(100)
    asyncio.run(client.get(StreamingResponse(chunks()), limit_s=60))
    assert b"".join(message.get("body", b"") for message in client.taken) == b"01234"
    assert client.taken[-1]["more_body"] is False


# ---- running sweeps --------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep():
    """Return a sweep without an engine, whose events a test sets."""
    sweep = ClientSweep.__new__(ClientSweep)
    sweep._state = SimpleNamespace(sweeps=set())
    return sweep


def test_finished_sweep_is_not_counted_while_unread(sweep):
    async def generate(send):
        for i in range(3):
            send(str(i))

    async def run():
        sweep._generate_all = generate
        async with aclosing(sweep.events()) as events:
            first = await anext(events)  # the others are not read
            for _ in range(5):
                await asyncio.sleep(0)
            num_sweeps = len(sweep._state.sweeps)
            return num_sweeps, [first, *[event async for event in events]]

    assert asyncio.run(run()) == (0, ["0", "1", "2"])


def test_sweep_of_stalled_client_ends(sweep):
    endings = []

    async def generate(send):
        try:
            while True:
                send("event")
                await asyncio.sleep(0)
        finally:
            endings.append(True)

    async def run():
        sweep._generate_all = generate
        await Client(2).get(EventStream(sweep.events()))
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert endings == [True]
    assert not sweep._state.sweeps


def test_failed_sweep_sends_error_and_is_not_counted(sweep):
    async def fail(send):
        raise SnpatchError("it broke")

    async def run():
        sweep._generate_all = fail
        return [event async for event in sweep.events()]

    assert asyncio.run(run()) == ['event: error\ndata: {"message": "it broke"}\n\n']
    assert not sweep._state.sweeps


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("cannot write /srv/up/a.safetensors: No space", "cannot write a.safetensors: No space"),
        ("[Errno 2] No such file: '/root/.cache/hub'", "[Errno 2] No such file: 'hub'"),
        ("its log: /tmp/snpatch-x.log", "its log: snpatch-x.log"),
        ("(/a/b), ~/secret/c and /uploads", "(b), c and uploads"),
        ("GET /v1/snpatch and /docs say what is", "GET /v1/snpatch and /docs say what is"),
        ("send its text to /v1/completions, or", "send its text to /v1/completions, or"),
        ("meta-llama/Llama-2 at 5 tokens/s, and/or https://a.b/c", "meta-llama/Llama-2 at 5 tokens/s, and/or https://a.b/c"),
        ("a </think> b / c", "a </think> b / c"),
        ("in /my data/up load/x.safetensors and /my data/up load", "in x.safetensors and folder"),
    ],
)  # fmt: skip
def test_remove_paths_keeps_routes_and_names(text, want):
    folders = find_private_folders("/my data/up load", "/srv/up", "/")
    assert folders == ("/my data/up load",)
    assert remove_paths(text, folders) == want


def answers(app) -> list[dict]:
    client = Client(100)
    asyncio.run(app(SCOPE, client.receive, remove_paths_from_errors(client.send, ())))
    return client.taken


@pytest.mark.parametrize(("status", "want"), [(400, "no b"), (500, "no b"), (200, "no /a/b")])
def test_error_body_has_no_path(status, want):
    start, body = answers(JSONResponse({"error": {"message": "no /a/b"}}, status))
    assert json.loads(body["body"])["error"]["message"] == want
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


def test_stream_error_has_no_path_and_texts_are_unchanged():
    events = ['data: {"choices": ["/a/b"]}\n\n', 'data: {"error": {"message": "/a/b"}}\n\n', "event: error\ndata: /a/b"]

    async def chunks():
        for event in events:
            yield event

    body = [message.get("body", b"").decode() for message in answers(StreamingResponse(chunks()))]
    assert body[1:4] == [events[0], events[1].replace("/a/b", "b"), events[2].replace("/a/b", "b")]
