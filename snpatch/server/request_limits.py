"""Bodies of requests: read within a deadline, and measured before anything is made of them.

Why values are counted in the bytes first: a megabyte of empty lists takes the parser, and with it the event loop, as
long as hundreds of requests. And why items are validated a few at a time first: vLLM's models write a hundred errors
for each bad item of a list, all of them on the event loop.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from time import monotonic
from typing import Protocol

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from vllm.exceptions import VLLMValidationError

from snpatch.errors import SnpatchError, first_line
from snpatch.server.config import ServeConfig
from snpatch.server.errors import PayloadTooLargeError, RequestTimeoutError, UnsupportedMediaTypeError
from snpatch.server.state import Quota

RESPONSES, INVOCATIONS, SWEEP = "/v1/responses", "/invocations", "/v1/snpatch/sweep"
TOKENIZING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")  # without a limit of vLLM's
FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", RESPONSES: "input"}  # what is read as which
COSTLY, COST = (RESPONSES, INVOCATIONS), 4  # models that take that many times as long for a value as a chat's
VALUES_PER_TEXT = 4  # of a sweep: a chat is a message, its role and its content in a list
IDS, IDS_PER_VALUE = ("prompt", "tokens"), 32  # fields that may be lists of token ids; as quick to read as one value
PARTS = ("messages", "input", "content")  # fields whose lists hold objects or texts
INLINE_BYTES = 1024  # what is so small is measured on the event loop
FEW_VALUES, FEW_ITEMS = 64, 4  # of a body that its route may validate at once; of a list that are validated at once
MISSING = object()
# A value or name of JSON without escapes; a run of small integers, as token ids are, is one.
VALUE = re.compile(rb'"[^"]*"?|\d{1,18}(?:\s*,\s*\d{1,18}){0,4095}|[^\s,:"\[\]{}]+|[\[{]')


class BodyField(Protocol):
    """FastAPI's field that makes a route's argument of a body."""

    def validate(self, value: object, values: dict, *, loc: tuple) -> tuple[object, list[dict] | None]:
        """Return the argument, and what is wrong with it."""


class Body:
    """Wraps an ASGI `receive`: a body that is late, or longer than a limit of bytes, is an error."""

    def __init__(self, receive: Receive, timeout_s: float, arriving: Quota) -> None:
        self._receive, self._timeout_s, self._arriving = receive, timeout_s, arriving
        self._end, self._is_whole = monotonic() + timeout_s, False

    async def receive(self) -> Message:
        """Return the next message; after the whole body there is no deadline."""
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0, self._end - monotonic()))
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"body: expected the whole of it within {self._timeout_s:g} s (--body-timeout-s), got a part",
                field="body",
            ) from error
        self._is_whole = not message.get("more_body", False)
        return message

    async def read(self, length: int, limit: int) -> bytes:
        """Return all of it. length: what its header says."""
        body, held = bytearray(), 0
        try:
            while True:
                if (n := max(length, len(body))) > limit:
                    raise PayloadTooLargeError(
                        f"body: expected at most {limit} bytes (--max-body-bytes), got {n} or more", field="body"
                    )
                if self._is_whole:
                    return bytes(body)
                self._arriving.take(len(body) - held)
                held = len(body)
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
        finally:
            self._arriving.leave(held)

    def again(self, body: bytes) -> Receive:
        """Return a `receive` that gives what was read, then what comes after it."""
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return left.pop() if left else await self._receive()

        return receive


def protocol_with_deadline(timeout_s: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, with so many seconds for the head of each request."""

    class Protocol(AutoHTTPProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the deadline where a head is awaited, and end it once the head is there."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(timeout_s, self.transport.close)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol


def models_of(app: FastAPI) -> dict[str, BodyField]:
    """Return what reads the body of each path, as FastAPI made it of the route's arguments."""
    return {route.path: route.body_field for route in app.routes if getattr(route, "body_field", None) is not None}


def check_type(headers: Mapping[str, str]) -> None:
    """Raise for a body that is not JSON, which any web page could send to this server."""
    has_body = headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and media_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"content-type: expected application/json, got {media_type[:80] or 'none'}. Send the header with the body."
        )


async def check(body: bytes, path: str, config: ServeConfig, models: Mapping[str, BodyField]) -> None:
    """Raise for a body that asks for more than the limits. models: what reads the bodies of each path."""
    if len(body) <= INLINE_BYTES:
        _check(body, path, config, models)
    else:
        await asyncio.to_thread(_check, body, path, config, models)


def _check(body: bytes, path: str, config: ServeConfig, models: Mapping[str, BodyField]) -> None:
    limit = config.max_body_values // (COST if path in COSTLY else 1)
    if path == SWEEP:
        limit = max(limit, VALUES_PER_TEXT * config.max_sweep_completions)
    check_values(body, limit, path)
    try:
        table = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SnpatchError(f"body: expected JSON, got {first_line(error)}", field="body") from error
    _check_count(n := _num_values(table), limit, path)
    if not isinstance(table, dict):
        return
    if path in TOKENIZING and (length := _length(table)) > config.max_prompt_chars:
        raise PayloadTooLargeError(
            f"{path}: expected at most {config.max_prompt_chars} letters or token ids (--max-prompt-chars), got "
            f"{length}. Send it in parts.",
            field="prompt",
        )
    if n > FEW_VALUES:
        _check_parts(table)
        paths = [one for one, name in FIELDS.items() if name in table] if path == INVOCATIONS else [path]
        for model in (models[one] for one in paths if one in models):
            _check_items(table, model)


def check_values(text: bytes, limit: int, path: str) -> None:
    """Raise for JSON of more values and names than a limit, before it is parsed."""
    n = 0
    for value in VALUE.finditer(text.replace(b"\\\\", b"").replace(b'\\"', b"")):
        n += 1 if value[0].startswith(b'"') else 1 + value[0].count(b",") // IDS_PER_VALUE
        _check_count(n, limit, path)


def _check_count(n: int, limit: int, path: str) -> None:
    if n > limit:
        share = f" of which {path} takes 1/{COST}" if path in COSTLY else ""
        raise PayloadTooLargeError(
            f"body: expected at most {limit} JSON values and names (--max-body-values{share}), got more. Send several "
            "requests.",
            field="body",
        )


def _num_values(table: object) -> int:
    """Count values and names; of token ids IDS_PER_VALUE are one."""
    n = 0
    for name, value in _walk(table):
        n += 1
        if isinstance(value, dict):
            n += len(value)
        elif isinstance(value, list) and name in IDS and _is_ids(value):
            n += len(value) // IDS_PER_VALUE
    return n


def _length(table: object) -> int:
    """Count the letters of all texts, and token ids."""
    values = [value for _, value in _walk(table)]
    return sum(len(one) for one in values if isinstance(one, str) or (isinstance(one, list) and _is_ids(one)))


def _walk(table: object) -> Iterator[tuple[str, object]]:
    """Yield each value with the name of its field, but not token ids one by one."""
    left = [("", table)]
    while left:
        name, value = left.pop()
        yield name, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list) and not (name in IDS and _is_ids(value)):
            left += ((name, one) for one in value)


def _is_ids(value: list) -> bool:
    return all(type(one) is int for one in value)


def _check_parts(table: dict) -> None:
    """Raise for lists of neither objects nor texts, which vLLM's models try as everything before they take them."""
    for name, value in _walk(table):
        if name in PARTS and isinstance(value, list) and not all(isinstance(one, dict | str) for one in value):
            raise SnpatchError(f"{name}: expected a list of objects or texts, got another value in it", field=name)


def _check_items(table: dict, model: BodyField) -> None:
    """Validate the items of all lists, a few at once, so that a body of bad ones is refused by its first."""
    for part in _parts(table):
        try:
            _, errors = model.validate(part, {}, loc=())
        except (VLLMValidationError, ValueError, TypeError):
            continue  # of the request as a whole, which its route validates
        for error in errors or ():
            if any(isinstance(place, int) for place in error["loc"]):
                field = next((place for place in error["loc"] if place in table), None)
                raise SnpatchError(f"{field or 'body'}: an item is wrong: {first_line(error['msg'])}", field=field)


def _parts(value: object) -> Iterator:
    """Yield the value with a few items of each list, until every item was in one."""
    if isinstance(value, dict) and value:
        firsts = None
        for parts in zip_longest(*map(_parts, value.values()), fillvalue=MISSING):
            firsts = firsts or parts
            each = zip(value, firsts, parts, strict=True)
            yield {name: first if part is MISSING else part for name, first, part in each}
    elif isinstance(value, list) and not _is_ids(value):
        for at in range(0, len(value), FEW_ITEMS):
            for parts in zip_longest(*map(_parts, value[at : at + FEW_ITEMS]), fillvalue=MISSING):
                yield [part for part in parts if part is not MISSING]
    else:
        yield value[:FEW_ITEMS] if isinstance(value, list) else value
