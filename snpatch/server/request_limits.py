"""Limits on requests: deadlines for their heads and bodies, and checks of a body before anything is built from it.

Values are counted in the bytes first, because parsing a megabyte of empty lists blocks the event loop for as long as
hundreds of requests. List items are validated a few at a time, because vLLM's models build a hundred errors for each
invalid item.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from time import monotonic
from typing import Any, Protocol, cast

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from vllm.exceptions import VLLMValidationError

from snpatch.errors import SnpatchError, first_line
from snpatch.server.config import ServeConfig
from snpatch.server.errors import PayloadTooLargeError, RequestTimeoutError, UnsupportedMediaTypeError
from snpatch.server.state import Quota
from snpatch.utils.optional import require

RESPONSES, INVOCATIONS, SWEEP = "/v1/responses", "/invocations", "/v1/snpatch/sweep"
TOKENIZE_ROUTES = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")  # without a limit of vLLM's own
# route -> the field by which /invocations recognizes its kind of request
KEY_FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", RESPONSES: "input"}
SLOW_ROUTES, SLOWDOWN = (RESPONSES, INVOCATIONS), 4  # their models take this many times a chat's time for each value
VALUES_PER_COMPLETION = 4  # of a sweep: a chat is a message, its role and its content in a list
ID_FIELDS, IDS_PER_VALUE = ("prompt", "tokens"), 32  # lists of token ids; this many ids take the time of one value
ITEM_FIELDS = ("messages", "input", "content")  # fields whose lists hold objects or strings
INLINE_BYTES = 1024  # smaller bodies are checked on the event loop
SMALL_BODY_VALUES, ITEMS_PER_CHECK = 64, 4  # bodies that their route may validate whole; list items validated at once
MISSING = object()
# A JSON value or name without escapes. A run of small integers, which token ids are, is one match.
VALUE_PATTERN = re.compile(rb'"[^"]*"?|\d{1,18}(?:\s*,\s*\d{1,18}){0,4095}|[^\s,:"\[\]{}]+|[\[{]')


class BodyField(Protocol):
    """FastAPI's field that builds a route's argument from a body."""

    def validate(self, value: object, values: dict, *, loc: tuple) -> tuple[object, list[dict] | None]:
        """Return the argument and the validation errors."""
        ...


class BodyReader:
    """Wraps an ASGI `receive`: a body that is late or too long raises an error.

    incoming: quota of bytes of incomplete bodies.
    """

    def __init__(self, receive: Receive, timeout_s: float, incoming: Quota) -> None:
        self._receive, self._timeout_s, self._incoming = receive, timeout_s, incoming
        self._deadline, self._is_complete = monotonic() + timeout_s, False

    async def receive(self) -> Message:
        """Return the next message. There is no deadline once the body is complete."""
        if self._is_complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0, self._deadline - monotonic()))
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"body: expected the whole of it within {self._timeout_s:g} s (--body-timeout-s), got a part",
                field="body",
            ) from error
        self._is_complete = not message.get("more_body", False)
        return message

    async def read(self, content_length: int, max_bytes: int) -> bytes:
        """Return the whole body. content_length: the value of its header."""
        body, reserved = bytearray(), 0
        try:
            while True:
                if (n := max(content_length, len(body))) > max_bytes:
                    raise PayloadTooLargeError(
                        f"body: expected at most {max_bytes} bytes (--max-body-bytes), got {n} or more", field="body"
                    )
                if self._is_complete:
                    return bytes(body)
                self._incoming.acquire(len(body) - reserved)
                reserved = len(body)
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
        finally:
            self._incoming.release(reserved)

    def replay(self, body: bytes) -> Receive:
        """Return a `receive` that returns a body that was read, then the messages after it."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await self._receive()

        return receive


def build_protocol(timeout_s: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a limit on the time of a request's head.

    It closes a connection if the head takes longer than timeout_s to arrive. uvicorn itself has no such limit.
    """

    class Protocol(AutoHTTPProtocol):
        # Of uvicorn's protocols: the request that is being answered, the event loop and the connection.
        cycle: Any
        loop: asyncio.AbstractEventLoop
        transport: asyncio.Transport
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_timer()
            super().connection_lost(exc)

        def _update_timer(self) -> None:
            """Start the timer when a head is awaited; cancel it once the head has arrived."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(timeout_s, self.transport.close)

        def _cancel_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol


def body_fields(app: FastAPI) -> dict[str, BodyField]:
    """Return FastAPI's body field of each path that has one."""
    routes = cast(list[Any], app.routes)  # only some kinds have a body
    return {route.path: route.body_field for route in routes if getattr(route, "body_field", None) is not None}


def check_content_type(headers: Mapping[str, str]) -> None:
    """Raise for a body that is not JSON, because any web page could send it to this server."""
    has_body = headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and media_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"content-type: expected application/json, got {media_type[:80] or 'none'}. Send the header with the body."
        )


async def check_body(body: bytes, path: str, config: ServeConfig, fields: Mapping[str, BodyField]) -> None:
    """Raise for a body over the limits or with invalid list items.

    fields: FastAPI's body field of each path.
    """
    if len(body) <= INLINE_BYTES:
        _check_body(body, path, config, fields)
    else:
        await asyncio.to_thread(_check_body, body, path, config, fields)


def _check_body(body: bytes, path: str, config: ServeConfig, fields: Mapping[str, BodyField]) -> None:
    limit = config.max_body_values // (SLOWDOWN if path in SLOW_ROUTES else 1)
    if path == SWEEP:
        limit = max(limit, VALUES_PER_COMPLETION * config.max_sweep_completions)
    check_num_values(body, limit, path)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SnpatchError(f"body: expected JSON, got {first_line(error)}", field="body") from error
    _check_limit(n := _num_values(data), limit, path)
    if not isinstance(data, dict):
        return
    if path in TOKENIZE_ROUTES and (length := _num_chars(data)) > require(config.max_prompt_chars):
        raise PayloadTooLargeError(
            f"{path}: expected at most {config.max_prompt_chars} characters or token ids (--max-prompt-chars), got "
            f"{length}. Send it in parts.",
            field="prompt",
        )
    if n > SMALL_BODY_VALUES:
        _check_item_types(data)
        paths = [path for path, name in KEY_FIELDS.items() if name in data] if path == INVOCATIONS else [path]
        for field in (fields[path] for path in paths if path in fields):
            _check_items(data, field)


def check_num_values(text: bytes, limit: int, path: str) -> None:
    """Raise for JSON with more values and names than a limit, before it is parsed."""
    n = 0
    for match in VALUE_PATTERN.finditer(text.replace(b"\\\\", b"").replace(b'\\"', b"")):
        n += 1 if match[0].startswith(b'"') else 1 + match[0].count(b",") // IDS_PER_VALUE
        _check_limit(n, limit, path)


def _check_limit(n: int, limit: int, path: str) -> None:
    if n > limit:
        share = f"; {path} allows 1/{SLOWDOWN} of it" if path in SLOW_ROUTES else ""
        raise PayloadTooLargeError(
            f"body: expected at most {limit} JSON values and names (--max-body-values{share}), got more. Send several "
            "requests.",
            field="body",
        )


def _num_values(data: object) -> int:
    """Count values and names; IDS_PER_VALUE token ids count as one."""
    n = 0
    for name, value in _walk(data):
        n += 1
        if isinstance(value, dict):
            n += len(value)
        elif isinstance(value, list) and name in ID_FIELDS and _is_token_ids(value):
            n += len(value) // IDS_PER_VALUE
    return n


def _num_chars(data: object) -> int:
    """Count the characters of all strings, plus token ids."""
    values = [value for _, value in _walk(data)]
    return sum(len(v) for v in values if isinstance(v, str) or (isinstance(v, list) and _is_token_ids(v)))


def _walk(data: object) -> Iterator[tuple[str, object]]:
    """Yield each value with the name of its field; a list of token ids is one value."""
    stack = [("", data)]
    while stack:
        name, value = stack.pop()
        yield name, value
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list) and not (name in ID_FIELDS and _is_token_ids(value)):
            stack += ((name, item) for item in value)


def _is_token_ids(items: list) -> bool:
    return all(type(item) is int for item in items)


def _check_item_types(data: dict) -> None:
    """Raise for list items that are neither objects nor strings.

    vLLM's models try each type they know.
    """
    for name, value in _walk(data):
        if name in ITEM_FIELDS and isinstance(value, list) and not all(isinstance(item, dict | str) for item in value):
            raise SnpatchError(f"{name}: expected a list of objects or strings, got another value in it", field=name)


def _check_items(data: dict, field: BodyField) -> None:
    """Validate the items of all lists, a few at once, and raise for the first invalid one."""
    for part in _split_lists(data):
        try:
            _, errors = field.validate(part, {}, loc=())
        except (VLLMValidationError, ValueError, TypeError):
            continue  # about the request as a whole, which its route validates
        for error in errors or ():
            if any(isinstance(key, int) for key in error["loc"]):
                name = next((key for key in error["loc"] if key in data), None)
                raise SnpatchError(f"{name or 'body'}: invalid item: {first_line(error['msg'])}", field=name)


def _split_lists(value: object) -> Iterator:
    """Yield copies of a value with a few items of each list, until each item was in one copy."""
    if isinstance(value, dict) and value:
        first_parts = None
        for parts in zip_longest(*map(_split_lists, value.values()), fillvalue=MISSING):
            first_parts = first_parts or parts
            named_parts = zip(value, first_parts, parts, strict=True)
            yield {name: first if part is MISSING else part for name, first, part in named_parts}
    elif isinstance(value, list) and not _is_token_ids(value):
        for start in range(0, len(value), ITEMS_PER_CHECK):
            items = value[start : start + ITEMS_PER_CHECK]
            for parts in zip_longest(*map(_split_lists, items), fillvalue=MISSING):
                yield [part for part in parts if part is not MISSING]
    else:
        yield value[:ITEMS_PER_CHECK] if isinstance(value, list) else value
