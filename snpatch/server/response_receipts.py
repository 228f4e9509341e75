"""Receipts in responses: the object `snpatch` of a response, or of the last chunk of a stream.

The finish reason of a stream is sent together with the receipt. If the receipt fails, the stream ends with vLLM's error
chunk instead.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cache
from typing import Any

from pydantic import BaseModel, create_model

from snpatch.errors import SnpatchError
from snpatch.executors.vllm.engine_settings import KEY
from snpatch.server.errors import error_message, error_param
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext

UNFINISHED_CHOICE = '"finish_reason":null'  # in each OpenAI chunk that is not a choice's last
END_OF_STREAM = "data: [DONE]"
LAST_ANTHROPIC_EVENT = "event: message_delta"
LAST_RESPONSES_EVENTS = ("response.completed", "response.incomplete", "response.failed")


def add_receipt(response: Any, context: PatchContext) -> BaseModel | AsyncGenerator:
    """Return a handler's response with the receipt: a model, a stream, or an unchanged error."""
    if isinstance(response, BaseModel):
        is_error = hasattr(response, "error") and not hasattr(response, "id")
        return response if is_error else _add_to_model(response, context)
    return _add_to_stream(response, context)


def _add_to_model(response: BaseModel, context: PatchContext) -> BaseModel:
    if type(response).model_config.get("extra") == "allow":
        setattr(response, KEY, context.to_dict())
        return response
    values: dict[str, Any] = {**dict(response), KEY: context.to_dict()}
    return _with_receipt_field(type(response)).model_construct(**values)


@cache
def _with_receipt_field(model: type[BaseModel]) -> type[BaseModel]:
    added: dict[str, Any] = {KEY: (dict, ...)}
    return create_model(model.__name__, __base__=model, **added)


class ChunkDelayer:
    """Holds back each chunk that may be the last one of an OpenAI stream, until the next one shows whether it is."""

    def __init__(self, context: PatchContext) -> None:
        self._context = context
        self._held_chunk: str | None = None
        self._last_sent: str | None = None  # if it is the latest chunk

    def push(self, chunk: str) -> list[str]:
        """Take the stream's next chunk and return the chunks to send now."""
        if chunk.startswith(END_OF_STREAM):
            return [*self._last_chunks(), chunk]
        chunks = [] if self._held_chunk is None else [self._held_chunk]
        if UNFINISHED_CHOICE in chunk:
            self._held_chunk, self._last_sent = None, chunk
            return [*chunks, chunk]
        self._held_chunk, self._last_sent = chunk, None
        return chunks

    def _last_chunks(self) -> list[str]:
        if self._held_chunk:
            return [_add_to_event(self._held_chunk, self._context)]
        if self._last_sent:  # nothing was generated to the end: the receipt gets a chunk without choices
            return [_add_to_event(self._last_sent, self._context, {"choices": []})]
        return []


async def _add_to_stream(chunks: AsyncGenerator, context: PatchContext) -> AsyncGenerator:
    CURRENT_PATCH.set(context)  # because a stream runs in another context than the handler that returned it
    delayer = ChunkDelayer(context)
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                await asyncio.sleep(0)  # because chunks that are ready arrive in one turn of the event loop
                for ready in _convert_chunk(chunk, delayer, context):
                    yield ready
        except SnpatchError as error:  # only from Responses; vLLM's other streams send errors themselves
            yield _error_event(error)


def _convert_chunk(chunk: Any, delayer: ChunkDelayer, context: PatchContext) -> list:
    """Return the chunks to send now, with the receipt in the last one of the stream."""
    if not isinstance(chunk, str):
        return [_add_to_responses_event(chunk, context)]
    if chunk.startswith("event: "):
        return [_add_to_event(chunk, context) if chunk.startswith(LAST_ANTHROPIC_EVENT) else chunk]
    return delayer.push(chunk)


def _add_to_event(event: str, context: PatchContext, changes: dict | None = None) -> str:
    """Return a server-sent event with the receipt, or an error event unchanged."""
    head, data, text = event.partition("data: ")
    fields = json.loads(text)
    if "error" in fields:
        return event
    fields = {**fields, **(changes or {}), KEY: context.to_dict()}
    return f"{head}{data}{json.dumps(fields, ensure_ascii=False)}\n\n"


def _add_to_responses_event(event: Any, context: PatchContext) -> BaseModel:
    if event.type in LAST_RESPONSES_EVENTS:
        setattr(event.response, KEY, context.to_dict())
    return event


def _error_event(error: SnpatchError) -> BaseModel:
    from openai.types.responses import ResponseErrorEvent

    return ResponseErrorEvent(
        type="error", code="server_error", message=error_message(error), param=error_param(error), sequence_number=-1
    )
