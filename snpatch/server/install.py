"""vLLM's handlers, wrapped: what a request asks for is read before any work, and its answer carries the receipt."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from anthropic.types import message_create_params as message_params
from anthropic.types.beta import message_create_params as beta_params
from fastapi import FastAPI
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from vllm.lora.request import LoRARequest

from snpatch.errors import SnpatchError, within
from snpatch.executors.vllm.settings import KEY
from snpatch.server import metrics, routes
from snpatch.server.errors import error_message, error_param, error_type, http_status
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext
from snpatch.server.receipts import with_receipt
from snpatch.server.request_fields import check_fields, published_fields
from snpatch.server.request_limits import check_values, models_of
from snpatch.server.state import ServerState

BEFORE = ("response.created", "response.in_progress")  # events that come before vLLM generates
WRAPPED = {  # of the app's state -> the method that its route calls
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
}
PUBLISHED = {  # of the app's state -> the fields that clients' libraries have
    "openai_serving_chat": published_fields(chat_params.CompletionCreateParamsNonStreaming),
    "openai_serving_completion": published_fields(completion_params.CompletionCreateParamsNonStreaming),
    "openai_serving_responses": published_fields(response_params.ResponseCreateParamsNonStreaming),
    "anthropic_serving_messages": published_fields(message_params.MessageCreateParamsNonStreaming)
    | published_fields(beta_params.MessageCreateParamsNonStreaming),
}


def install(serving: ServerState, app: FastAPI) -> None:
    """vLLM's app, whose state is ready, serves patches from now on."""
    models = app.state.openai_serving_models
    # To vLLM a name is an adapter's: it is listed, checked, told in answers, and reaches `generate`, but no further.
    models.lora_requests |= {name: LoRARequest(name, i, KEY) for i, name in enumerate(serving.catalogue.names, 1)}
    for model in models.base_model_paths:
        model.model_path = model.name  # which /v1/models would tell: it may be a folder of this machine
    wrap(serving, app.state)
    serving.models |= models_of(app)
    app.include_router(routes.router(serving))
    executor = serving.engine.executor
    metrics.watch(lambda: executor.slots.num_in_use, lambda: executor.num_waiting)


def wrap(serving: ServerState, state) -> None:
    """Put ours around each of vLLM's handlers."""
    for name, method in WRAPPED.items():
        handler = getattr(state, name, None)
        if handler is not None:
            setattr(handler, method, _patched(serving, handler, getattr(handler, method), name))


def _patched(serving: ServerState, handler, create: Callable[..., Awaitable], kind: str) -> Callable[..., Awaitable]:
    @functools.wraps(create)
    async def patched(request, raw_request):
        try:
            check_fields(type(request), await raw_request.json(), PUBLISHED[kind])  # kept since vLLM read it
            ask = await _asked(serving, request, raw_request)
            if kind != "openai_serving_completion":
                serving.check_template(ask.recipient)
            CURRENT_PATCH.set(ask)
            answer = await create(request, raw_request)
            if kind == "openai_serving_responses" and hasattr(answer, "__anext__"):
                answer = await _begun(answer)
        except SnpatchError as error:
            status = http_status(error)
            return handler.create_error_response(
                error_message(error), err_type=error_type(status), status_code=status, param=error_param(error)
            )
        return with_receipt(answer, ask)

    return patched


async def _asked(serving: ServerState, request, raw_request) -> PatchContext:
    """What a request asks for."""
    if getattr(request, "use_beam_search", False):
        raise SnpatchError("beam search is not served: its beams would not be patched", field="use_beam_search")
    if getattr(request, "background", False):
        raise SnpatchError("an answer in the background would come without its receipt", field="background")
    _check_texts(serving, request)
    ask = serving.catalogue.named(request.model)
    if ask is None:
        raise serving.catalogue.unknown(request.model)
    given = await _given(serving, request, raw_request)
    if given is not None:
        with within(KEY):
            ask = await asyncio.to_thread(serving.catalogue.ask, given)  # which builds the values of its donors
    if not ask.is_plain:
        serving.check_waiting()
    is_forced = getattr(request, "tool_choice", None) not in (None, "none", "auto")
    if ask.guard is not None and is_forced:
        raise SnpatchError("a guard does not go with a tool that must be called", field="tool_choice")
    return ask


def _check_texts(serving: ServerState, request) -> None:
    """Raise for a request of too many texts, before any is begun."""
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt) else 1
    n = max(getattr(request, name, None) or 1 for name in ("n", "best_of"))
    if prompts * n > serving.config.max_completions:
        raise SnpatchError(
            f"request: expected at most {serving.config.max_completions} completions (--max-completions), got "
            f"{prompts} prompts x {n}. Send several requests.",
            field="n" if n > 1 else "prompt",
        )


async def _begun(events: AsyncIterator) -> AsyncIterator:
    """A stream of Responses, once its engine gave something: until then bad input can be a 400."""
    first = []
    async for event in events:
        first.append(event)
        if event.type not in BEFORE:
            break

    async def whole() -> AsyncIterator:
        async with aclosing(events):
            for event in first:
                yield event
            async for event in events:
                yield event

    return whole()


async def _given(serving: ServerState, request, raw_request) -> object:
    """The object of a request's own field, or of its vllm_xargs, where it stands as JSON."""
    more = getattr(request, "vllm_xargs", None) or {}
    given = (request.model_extra or {}).get(KEY)
    if given is None and type(request).model_config.get("extra") != "allow":
        given = (await raw_request.json()).get(KEY)
    if KEY not in more:
        return given
    text = more.pop(KEY)
    if given is not None:
        raise SnpatchError(f"{KEY} stands in the request and in its vllm_xargs", field=f"vllm_xargs.{KEY}")
    try:
        if not isinstance(text, str):
            raise ValueError("wanted a text")
        check_values(text.encode(), serving.config.max_body_values, f"vllm_xargs.{KEY}")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnpatchError(f"vllm_xargs: {KEY} is no JSON: {error}", field=f"vllm_xargs.{KEY}") from error
