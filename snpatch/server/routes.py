"""The routes that are ours: what the server holds, uploads, sweeps."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from snpatch import __version__, schema
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.vllm import versions
from snpatch.server import uploads
from snpatch.server.config import ServeConfig
from snpatch.server.errors import ForbiddenError, NotFoundError, PayloadTooLargeError, error
from snpatch.server.patch_request import PatchRequest
from snpatch.server.responses import EventStream
from snpatch.server.state import ServerState
from snpatch.server.sweep_endpoint import Sweep, SweepRequest


def router(serving: ServerState) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["snpatch"])
    changes = ThreadPoolExecutor(1, "snpatch-uploads")  # one at a time, and to its end when its client has left

    @routes.get("/v1/snpatch")
    async def held() -> JSONResponse:
        """What can be named, the JSON Schema of a request's `snpatch` and of a sweep, limits and versions."""
        told = await asyncio.to_thread(serving.catalogue.told)
        return JSONResponse(
            {
                **told,
                "judges": [*serving.judges],
                "schema": schema.json_schema(PatchRequest),
                "sweep_schema": schema.json_schema(SweepRequest),
                "limits": _limits(serving),
                "versions": {
                    "snpatch": __version__,
                    "vllm": versions.installed(),
                    **{name: version(name) for name in ("torch", "transformers")},
                },
            }
        )

    @routes.put("/v1/snpatch/{kind}/{name}")
    async def put(kind: str, name: str, request: Request) -> Response:
        """Keep a safetensors file, which the body is, under a name. kind: rankings or constants."""
        try:
            there = _uploads(serving, kind)
            there.check(kind, name)
            body = await _body(request, there.limit)
            told = await asyncio.get_running_loop().run_in_executor(changes, there.keep, kind, name, body)
            return JSONResponse(told, 201)
        except SnpatchError as reason:
            return error(reason)

    @routes.delete("/v1/snpatch/{kind}/{name}")
    async def delete(kind: str, name: str) -> Response:
        """Forget a name that was uploaded; what runs goes on with it."""
        try:
            there = _uploads(serving, kind)
            if await asyncio.get_running_loop().run_in_executor(changes, there.delete, kind, name):
                return Response(status_code=204)
            raise NotFoundError(f"{kind}: no {name} was uploaded", field="name")
        except SnpatchError as reason:
            return error(reason)

    @routes.post("/v1/snpatch/sweep")
    async def sweep(request: Request) -> Response:
        """Patch every window into every prompt, judge the texts: server-sent events start, text, row, summary."""
        try:
            form = await asyncio.to_thread(_sweep_form, await request.body())
            running = await Sweep.made(serving, form)
        except SnpatchError as reason:
            return error(reason)
        return EventStream(running.events())

    return routes


def _limits(serving: ServerState) -> dict:
    engine, capacity = serving.engine, serving.engine.config.capacity
    sizes = ("streams", "max_adapters", "max_rankings", "max_constants", "max_clauses")
    return {
        "context": engine.geometry.context,
        "layers": engine.geometry.n_layers,
        "neurons_per_layer": engine.geometry.n_neurons,
        **{name: getattr(capacity, name) for name in sizes},
        **{f.name: getattr(serving.config, f.name) for f in fields(ServeConfig) if f.name.startswith("max_")},
        "body_timeout_s": serving.config.body_timeout_s,
        "send_timeout_s": serving.config.send_timeout_s,
        "upload_bytes": serving.uploads.limit if serving.uploads else 0,
    }


def _uploads(serving: ServerState, kind: str) -> uploads.Uploads:
    if kind not in uploads.KINDS:
        raise NotFoundError(f"there are {' and '.join(uploads.KINDS)}, and no {kind[:80]!r}")
    if serving.uploads is None:
        raise ForbiddenError("this server takes no uploads: start it with --allow-upload DIR")
    return serving.uploads


def _sweep_form(body: bytes) -> SweepRequest:
    try:
        table = json.loads(body)
        json.dumps(table, ensure_ascii=False).encode()  # texts that are no Unicode: no tokenizer takes them
    except (ValueError, RecursionError) as reason:
        raise SnpatchError(f"sweep: no JSON: {first_line(reason)}", field="body") from reason
    return schema.read(SweepRequest, "sweep", table)


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise PayloadTooLargeError(f"the body is larger than {limit} bytes", field="body")
    except ClientDisconnect as error:
        raise SnpatchError("the body: expected all of it, got a client that left", field="body") from error
    return bytes(body)
