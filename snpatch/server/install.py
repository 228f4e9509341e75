"""Installation into vLLM's app: model names, routes and metrics, and wrappers around vLLM's handlers.

A wrapped handler parses the patch of a request before any work, and adds the receipt to the response.
"""

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from anthropic.types import message_create_params as message_params
from anthropic.types.beta import message_create_params as beta_params
from fastapi import FastAPI
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from starlette.datastructures import State
from vllm.lora.request import LoRARequest

from snpatch.errors import SnpatchError, error_field
from snpatch.executors.vllm.engine_settings import KEY
from snpatch.server import metrics, routes
from snpatch.server.errors import error_message, error_param, error_type, http_status
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext
from snpatch.server.request_fields import check_fields, published_fields
from snpatch.server.request_limits import body_fields, check_num_values
from snpatch.server.response_receipts import add_receipt
from snpatch.server.state import ServerState
from snpatch.utils.optional import require

EVENTS_BEFORE_GENERATION = ("response.created", "response.in_progress")
WRAPPED = {  # handler in the app's state -> the method that its route calls
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
}
PUBLISHED_FIELDS = {  # handler in the app's state -> the fields that client libraries declare
    "openai_serving_chat": published_fields(chat_params.CompletionCreateParamsNonStreaming),
    "openai_serving_completion": published_fields(completion_params.CompletionCreateParamsNonStreaming),
    "openai_serving_responses": published_fields(response_params.ResponseCreateParamsNonStreaming),
    "anthropic_serving_messages": published_fields(message_params.MessageCreateParamsNonStreaming)
    | published_fields(beta_params.MessageCreateParamsNonStreaming),
}


def install(state: ServerState, app: FastAPI) -> None:
    """Install snpatch's model names, routes, handlers and metrics into vLLM's app.

    The app's state must be complete.
    """
    models = app.state.openai_serving_models
    # vLLM takes each name for an adapter's: it lists and checks it, puts it in responses and passes it to `generate`,
    # where PatchedClient drops it.
    names = enumerate(state.registry.model_names, 1)
    models.lora_requests |= {name: LoRARequest(name, i, KEY) for i, name in names}
    for model in models.base_model_paths:
        model.model_path = model.name  # because /v1/models returns it, and it may be a folder of this machine
    _report_context(models, state.engine.geometry.context)
    wrap_handlers(state, app.state)
    state.body_fields |= body_fields(app)
    app.include_router(routes.build_router(state))
    executor = state.engine.executor
    metrics.watch(lambda: executor.slots.num_in_use, lambda: executor.num_waiting)


def _report_context(models, context: int) -> None:
    """Let /v1/models report the context length of requests, because the engine's own is one token longer."""
    show = models.show_available_models

    async def show_available_models():
        listing = await show()
        for card in listing.data:
            if card.max_model_len is not None:
                card.max_model_len = context
        return listing

    models.show_available_models = show_available_models


def wrap_handlers(state: ServerState, app_state: State) -> None:
    """Replace the methods of vLLM's handlers that its routes call."""
    for name, method in WRAPPED.items():
        handler = getattr(app_state, name, None)
        if handler is not None:
            setattr(handler, method, _wrap(state, handler, getattr(handler, method), name))


def _wrap(state: ServerState, handler, create: Callable[..., Awaitable], name: str) -> Callable[..., Awaitable]:
    @functools.wraps(create)
    async def patched(request, raw_request):
        try:
            body = await raw_request.json()  # cached since vLLM parsed it
            check_fields(type(request), body, PUBLISHED_FIELDS[name])
            context = await _build_context(state, request, raw_request)
            if name != "openai_serving_completion":
                state.check_template(context.recipient)
            CURRENT_PATCH.set(context)
            response = await create(request, raw_request)
            if name == "openai_serving_responses" and hasattr(response, "__anext__"):
                response = await _wait_for_generation(response)
        except SnpatchError as error:
            status = http_status(error)
            return handler.create_error_response(
                error_message(error), err_type=error_type(status), status_code=status, param=error_param(error)
            )
        return add_receipt(response, context)

    return patched


async def _build_context(state: ServerState, request, raw_request) -> PatchContext:
    """Return the patch that a request names or holds, and check that it can be served."""
    if getattr(request, "use_beam_search", False):
        raise SnpatchError(
            "use_beam_search: expected false, got true. Leave it out: beams would not be patched.",
            field="use_beam_search",
        )
    if getattr(request, "background", False):
        raise SnpatchError(
            "background: expected false, got true. Leave it out: the response would lack its receipt.",
            field="background",
        )
    _check_num_completions(state, request)
    context = state.registry.lookup(request.model)
    if context is None:
        raise state.registry.unknown_model_error(request.model)
    data = await _patch_data(state, request, raw_request)
    if data is not None:
        with error_field(KEY):
            context = await asyncio.to_thread(state.registry.parse, data)  # in a thread: it may build a donor's values
    if not context.is_base:
        state.check_queue()
    is_tool_forced = getattr(request, "tool_choice", None) not in (None, "none", "auto")
    if context.guard is not None and is_tool_forced:
        raise SnpatchError(
            "tool_choice: expected none or auto with a guard, got a required tool. Leave out one of them.",
            field="tool_choice",
        )
    return context


def _check_num_completions(state: ServerState, request) -> None:
    """Raise for too many completions before any is started."""
    prompt, limit = getattr(request, "prompt", None), require(state.config.max_completions)
    num_prompts = 1
    if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):  # a list of prompts
        num_prompts = len(prompt)
    n = max(getattr(request, name, None) or 1 for name in ("n", "best_of"))
    if num_prompts * n > limit:
        raise SnpatchError(
            f"request: expected at most {limit} completions (--max-completions), got {num_prompts} prompts x {n}. "
            "Send several requests.",
            field="n" if n > 1 else "prompt",
        )


async def _wait_for_generation(events: AsyncGenerator) -> AsyncGenerator:
    """Return a stream of responses once the engine has produced something.

    Until then an error can be a 400.
    """
    first_events = []
    async for event in events:
        first_events.append(event)
        if event.type not in EVENTS_BEFORE_GENERATION:
            break

    async def all_events() -> AsyncGenerator:
        async with aclosing(events):
            for event in first_events:
                yield event
            async for event in events:
                yield event

    return all_events()


async def _patch_data(state: ServerState, request, raw_request) -> object:
    """Return the object of a request's field `snpatch`, or of its vllm_xargs, where it is JSON."""
    xargs = getattr(request, "vllm_xargs", None) or {}
    data = (request.model_extra or {}).get(KEY)
    if data is None and type(request).model_config.get("extra") != "allow":
        data = (await raw_request.json()).get(KEY)
    if KEY not in xargs:
        return data
    text, field = xargs.pop(KEY), f"vllm_xargs.{KEY}"
    if data is not None:
        raise SnpatchError(f"{KEY}: expected it once, got it in the request and in vllm_xargs", field=field)
    try:
        if not isinstance(text, str):
            raise ValueError("another type than a string")
        check_num_values(text.encode(), state.config.max_body_values, field)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnpatchError(f"{field}: expected an object as JSON, got {error}", field=field) from error
