"""Receipts in answers: under `snpatch` of the answer, or of the last chunk of a stream.

A stream whose receipt failed ends with vLLM's error chunk instead: the finish reason comes after the receipt, or never.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import cache

from pydantic import BaseModel, create_model

from snpatch.errors import SnpatchError
from snpatch.executors.vllm.settings import KEY
from snpatch.server.errors import error_message, error_param
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext

GOES_ON = '"finish_reason":null'  # in every chunk of OpenAI's that is not a choice's last
DONE = "data: [DONE]"
LAST_OF_ANTHROPIC = "event: message_delta"
ENDS = ("response.completed", "response.incomplete", "response.failed")


def with_receipt(answer: object, ask: PatchContext) -> object:
    """What a handler gave, as it is sent: errors as they are, a whole answer, or a stream."""
    if isinstance(answer, BaseModel):
        return answer if hasattr(answer, "error") and not hasattr(answer, "id") else _whole(answer, ask)
    return _stream(answer, ask)


def _whole(answer: BaseModel, ask: PatchContext) -> BaseModel:
    if type(answer).model_config.get("extra") == "allow":
        setattr(answer, KEY, ask.answer())
        return answer
    return _extended(type(answer)).model_construct(**dict(answer), **{KEY: ask.answer()})


@cache
def _extended(kind: type[BaseModel]) -> type[BaseModel]:
    """The same kind of answer, with a receipt."""
    return create_model(kind.__name__, __base__=kind, **{KEY: (dict, ...)})


async def _stream(chunks: AsyncIterator, ask: PatchContext) -> AsyncIterator:
    """Chunks as they come, but for the one that may be OpenAI's last: what comes after it tells."""
    CURRENT_PATCH.set(ask)  # a stream runs in another context than the handler that made it
    kept, before = None, None
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                await asyncio.sleep(0)  # chunks that are there already come in one turn of the event loop
                if not isinstance(chunk, str):
                    yield _event(chunk, ask)
                elif chunk.startswith("event: "):
                    yield _told(chunk, ask) if chunk.startswith(LAST_OF_ANTHROPIC) else chunk
                elif chunk.startswith(DONE):
                    if kept or before:  # one without choices, where all that was asked for was never begun
                        yield _told(kept or before, ask, {} if kept else {"choices": []})
                    yield chunk
                else:
                    if kept is not None:
                        yield kept
                    kept, before = (None, chunk) if GOES_ON in chunk else (chunk, None)
                    if before:
                        yield before
        except SnpatchError as error:  # of Responses alone: vLLM's other streams tell it themselves
            yield _failed(error)


def _told(chunk: str, ask: PatchContext, change: dict | None = None) -> str:
    """The last chunk, with the receipt; an error stays one."""
    head, data, text = chunk.partition("data: ")
    table = json.loads(text)
    if "error" in table:
        return chunk
    return f"{head}{data}{json.dumps({**table, **(change or {}), KEY: ask.answer()}, ensure_ascii=False)}\n\n"


def _event(event: BaseModel, ask: PatchContext) -> BaseModel:
    if event.type in ENDS:
        setattr(event.response, KEY, ask.answer())
    return event


def _failed(error: SnpatchError) -> BaseModel:
    from openai.types.responses import ResponseErrorEvent

    return ResponseErrorEvent(
        type="error", code="server_error", message=error_message(error), param=error_param(error), sequence_number=-1
    )
