"""Sending: how an answer leaves the server: within a time, and its errors without paths of the server's machine.

Why around ASGI's `send` and not where answers are made: vLLM's own errors and streams leave by it, too. A client that
does not read is made to look as one that has left, which every route of vLLM and of ours ends its work for.
"""

import asyncio
import re
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

PATH = re.compile(r"(?<![\w/.:<~-])~?(?:/[^\s\"'`\\/:;,()<>|]+)+")  # absolute, in a text
ROUTE = re.compile(r"/v1/.*|/(docs|health|ping|invocations|tokenize|detokenize|metrics|version|load|redoc)[.?!]?")
ERROR_EVENTS = (b'data: {"error"', b"event: error")  # of OpenAI's streams, and of Responses, Anthropic's and sweeps


class EventStream(StreamingResponse):
    """Server-sent events. Their generator is closed as soon as the client has left, wherever it stands."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def private_folders(*paths: str | Path) -> tuple[str, ...]:
    """Return the absolute paths among these that PATH alone would not find, as they hold spaces or the like."""
    absolute = [Path(path).absolute() for path in paths]
    return tuple(str(path) for path in absolute if path.name and not PATH.fullmatch(str(path)))


def without_paths(text: str, folders: Iterable[str] = ()) -> str:
    """Return a message with the last part alone of each absolute path. folders: of `private_folders`."""
    for folder in folders:
        text = text.replace(folder, "/folder")
    return PATH.sub(lambda found: found[0] if ROUTE.fullmatch(found[0]) else found[0].rpartition("/")[2], text)


def timed(receive: Receive, send: Send, limit_s: float) -> tuple[Receive, Send]:
    """Return both for a client that has left once it has not taken a message for `limit_s` seconds."""
    has_left = asyncio.Event()

    async def received() -> Message:
        own = [asyncio.ensure_future(receive()), asyncio.ensure_future(has_left.wait())]
        try:
            await asyncio.wait(own, return_when=asyncio.FIRST_COMPLETED)
            return own[0].result() if own[0].done() else {"type": "http.disconnect"}
        finally:
            for task in own:
                task.cancel()

    async def sent(message: Message) -> None:
        if has_left.is_set():
            await asyncio.sleep(0)  # so that whoever sends without end hears of it
            return
        try:
            async with asyncio.timeout(limit_s):
                await send(message)
        except TimeoutError:
            has_left.set()

    return received, sent


def clean(send: Send, folders: Iterable[str]) -> Send:
    """Return a `send` whose errors name no path: a body of a status from 400 on, and error events of a stream."""
    start: Message | None = None
    body = bytearray()

    def cleaned(content: bytes) -> bytes:
        return without_paths(content.decode("utf-8", "replace"), folders).encode()

    async def sent(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start = message
        elif start is not None and message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                content = cleaned(bytes(body))
                MutableHeaders(scope=start)["content-length"] = str(len(content))
                await send(start)
                await send({**message, "body": content})
        elif message["type"] == "http.response.body" and message.get("body", b"").startswith(ERROR_EVENTS):
            await send({**message, "body": cleaned(message["body"])})
        else:
            await send(message)

    return sent
