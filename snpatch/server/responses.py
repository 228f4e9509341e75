"""Filters on responses: a deadline for each message to be read, and no paths of this machine in error messages.

Why around ASGI's `send` and not where responses are built: vLLM's own errors and streams pass it, too. A client that
stops reading is reported as disconnected, because all routes, vLLM's included, cancel their work then.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

PATH_PATTERN = re.compile(r"(?<![\w/.:<~-])~?(?:/[^\s\"'`\\/:;,()<>|]+)+")  # absolute paths in a text
ROUTE_PATTERN = re.compile(
    r"/v1/.*|/(docs|health|ping|invocations|tokenize|detokenize|metrics|version|load|redoc)[.?!]?"
)
ERROR_PREFIXES = (b'data: {"error"', b"event: error")  # error events of OpenAI; of Responses, Anthropic and sweeps


class EventStream(StreamingResponse):
    """Server-sent events whose generator is closed as soon as the client disconnects."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and close their generator at the end, also if the client disconnects."""
        async with aclosing(cast(AsyncGenerator, self.body_iterator)):
            await super().__call__(scope, receive, send)


def find_private_folders(*paths: str | Path) -> tuple[str, ...]:
    """Return those of the paths, made absolute, that PATH_PATTERN does not match.

    Such paths contain spaces or the like.
    """
    absolute = [Path(path).absolute() for path in paths]
    return tuple(str(path) for path in absolute if path.name and not PATH_PATTERN.fullmatch(str(path)))


def remove_paths(text: str, folders: Iterable[str] = ()) -> str:
    """Return a text with each absolute path shortened to its last part.

    folders: from `find_private_folders`.
    """
    for folder in folders:
        text = text.replace(folder, "/folder")
    return PATH_PATTERN.sub(
        lambda match: match[0] if ROUTE_PATTERN.fullmatch(match[0]) else match[0].rpartition("/")[2], text
    )


def limit_send_time(receive: Receive, send: Send, timeout_s: float) -> tuple[Receive, Send]:
    """Wrap both so that a client that does not read a message within timeout_s counts as disconnected."""
    is_gone = asyncio.Event()

    async def receive_or_disconnect() -> Message:
        tasks = [asyncio.ensure_future(receive()), asyncio.ensure_future(is_gone.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else {"type": "http.disconnect"}
        finally:
            for task in tasks:
                task.cancel()

    async def send_in_time(message: Message) -> None:
        if is_gone.is_set():
            await asyncio.sleep(0)  # so that an endless sender gets to see the disconnect
            return
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError:
            is_gone.set()

    return receive_or_disconnect, send_in_time


def remove_paths_from_errors(send: Send, folders: Iterable[str]) -> Send:
    """Wrap `send` so that errors contain no absolute path.

    Errors are bodies with a status from 400 on, and error events of streams.
    """
    start: Message | None = None
    body = bytearray()

    def filtered(content: bytes) -> bytes:
        return remove_paths(content.decode("utf-8", "replace"), folders).encode()

    async def send_filtered(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start = message
        elif start is not None and message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                content = filtered(bytes(body))
                MutableHeaders(scope=start)["content-length"] = str(len(content))
                await send(start)
                await send({**message, "body": content})
        elif message["type"] == "http.response.body" and message.get("body", b"").startswith(ERROR_PREFIXES):
            await send({**message, "body": filtered(message["body"])})
        else:
            await send(message)

    return send_filtered
