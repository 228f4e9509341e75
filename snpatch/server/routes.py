"""snpatch's own routes: what the server holds, uploads and sweeps."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from snpatch import __version__
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.vllm import versions
from snpatch.server import uploads
from snpatch.server.config import ServeConfig
from snpatch.server.errors import ForbiddenError, NotFoundError, PayloadTooLargeError, error_response
from snpatch.server.patch_request import PatchRequest
from snpatch.server.responses import EventStream
from snpatch.server.state import ServerState
from snpatch.server.sweep_endpoint import ClientSweep, SweepRequest
from snpatch.utils import schema

ROUTES = {  # response of `GET /`
    "GET /v1/models": "models and patches, as OpenAI's clients list them",
    "POST /v1/chat/completions": "chat completions; `model` names a patch, or the field `snpatch` holds one",
    "POST /v1/completions": "completions, likewise",
    "POST /v1/responses": "OpenAI's Responses, likewise",
    "POST /v1/messages": "Anthropic's messages, likewise",
    "GET /v1/snpatch": "models, rankings, constants, patches, guards, judges, JSON Schemas, limits and versions",
    "PUT, DELETE /v1/snpatch/rankings/NAME": "upload or delete a ranking (--allow-upload)",
    "PUT, DELETE /v1/snpatch/constants/NAME": "upload or delete a constant (--allow-upload)",
    "POST /v1/snpatch/sweep": "a sweep over windows, as server-sent events",
    "GET /docs": "all routes",
    "GET /metrics": "Prometheus metrics",
    "GET /health": "200 while the engine runs",
}


def build_router(state: ServerState) -> APIRouter:
    """Return the routes of one server."""
    router = APIRouter(tags=["snpatch"])
    # One change of uploads at a time, in a thread, so that it is finished even if its client disconnects.
    upload_thread = ThreadPoolExecutor(1, "snpatch-uploads")

    @router.get("/")
    async def index() -> JSONResponse:
        """List the routes."""
        return JSONResponse({"snpatch": __version__, "routes": ROUTES})

    @router.get("/v1/snpatch")
    async def info() -> JSONResponse:
        """Return what clients can name, the JSON Schemas of a patch and of a sweep, limits and versions."""
        names = await asyncio.to_thread(state.registry.to_dict)
        return JSONResponse(
            {
                **names,
                "judges": [*state.judges],
                "schema": schema.json_schema(PatchRequest),
                "sweep_schema": schema.json_schema(SweepRequest),
                "limits": _limits(state),
                "versions": {
                    "snpatch": __version__,
                    "vllm": versions.installed(),
                    **{name: version(name) for name in ("torch", "transformers")},
                },
            }
        )

    @router.put("/v1/snpatch/{kind}/{name}")
    async def put(kind: str, name: str, request: Request) -> Response:
        """Store the body, a safetensors file, under a name. kind: rankings or constants."""
        try:
            folder = _uploads(state, kind)
            folder.check_name(kind, name)
            body = await _read_body(request, folder.max_file_bytes)
            loop = asyncio.get_running_loop()
            description = await loop.run_in_executor(upload_thread, folder.upload, kind, name, body)
            return JSONResponse(description, 201)
        except SnpatchError as error:
            return error_response(error)

    @router.delete("/v1/snpatch/{kind}/{name}")
    async def delete(kind: str, name: str) -> Response:
        """Delete an uploaded name. Running requests keep what it named."""
        try:
            folder, loop = _uploads(state, kind), asyncio.get_running_loop()
            if await loop.run_in_executor(upload_thread, folder.delete, kind, name):
                return Response(status_code=204)
            raise NotFoundError(f"{kind}: no upload is named {name}", field="name")
        except SnpatchError as error:
            return error_response(error)

    @router.post("/v1/snpatch/sweep")
    async def sweep(request: Request) -> Response:
        """Generate and judge the completions of each window and prompt, and stream them as server-sent events.

        The events are `start`, `completion`, `row`, `summary` and `error`.
        """
        try:
            sweep_request = await asyncio.to_thread(_parse_sweep, await request.body())
            sweep = await ClientSweep.build(state, sweep_request)
        except SnpatchError as error:
            return error_response(error)
        return EventStream(sweep.events())

    return router


def _limits(state: ServerState) -> dict:
    engine, capacity, config = state.engine, state.engine.config.capacity, state.config
    sizes = ("streams", "max_adapters", "max_rankings", "max_constants", "max_interventions")
    return {
        "context": engine.geometry.context,
        "layers": engine.geometry.n_layers,
        "neurons_per_layer": engine.geometry.n_neurons,
        **{name: getattr(capacity, name) for name in sizes},
        **{f.name: getattr(config, f.name) for f in fields(ServeConfig) if f.name.startswith("max_")},
        "body_timeout_s": config.body_timeout_s,
        "send_timeout_s": config.send_timeout_s,
        "upload_bytes": state.uploads.max_file_bytes if state.uploads else 0,
    }


def _uploads(state: ServerState, kind: str) -> uploads.Uploads:
    if kind not in uploads.LOADERS:
        raise NotFoundError(f"route: expected {' or '.join(uploads.LOADERS)}, got {kind[:80]!r}")
    if state.uploads is None:
        raise ForbiddenError("uploads: this server accepts none. Start it with --allow-upload DIR.")
    return state.uploads


def _parse_sweep(body: bytes) -> SweepRequest:
    try:
        table = json.loads(body)
        json.dumps(table, ensure_ascii=False).encode()  # raises for invalid Unicode, which no tokenizer accepts
    except (ValueError, RecursionError) as error:
        raise SnpatchError(f"sweep: expected JSON, got {first_line(error)}", field="body") from error
    return schema.from_dict(SweepRequest, "sweep", table)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise PayloadTooLargeError(f"body: expected at most {max_bytes} bytes, got more", field="body")
    except ClientDisconnect as error:
        raise SnpatchError("body: expected all of it, got a client that disconnected", field="body") from error
    return bytes(body)
