"""Gate: the ASGI middleware in front of vLLM's server. Which paths there are, who may use them, how much they may send.

Why a list of paths and not of exceptions: what vLLM adds in its next version, or has for development, would run models
without patches and receipts, or reach the workers. Why the key is looked at here: vLLM asks for it below /v1 alone.
"""

import hashlib
import secrets
from collections.abc import Sequence
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from snpatch.errors import ServerBusyError, SnpatchError
from snpatch.server import request_limits
from snpatch.server.config import ALWAYS_OPEN, OPENABLE
from snpatch.server.errors import NotFoundError, PayloadTooLargeError, RequestTimeoutError, UnauthorizedError, error
from snpatch.server.install import install
from snpatch.server.responses import clean, timed
from snpatch.server.state import ServerState

MODEL = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")  # run the model
OTHERS = (*ALWAYS_OPEN, *OPENABLE, "/v1/models", "/v1/messages/count_tokens", "/v1/snpatch")
BELOW = ("/v1/responses/", "/v1/snpatch/")
READING = ("GET", "HEAD", "OPTIONS")
PREFLIGHT = ("origin", "access-control-request-method")  # headers with which a browser asks before it sends a key
RETRY_AFTER = (b"retry-after", b"1")  # seconds, with every 503 but a GET's


class RouteMiddleware:
    """vLLM's server takes this class by name and puts it around its app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served by snpatch"})
            return
        serving: ServerState = scope["app"].state.engine_client.serving
        if scope["type"] == "lifespan":
            install(serving, scope["app"])
            await self._app(scope, receive, send)
            return
        receive, send = timed(receive, clean(send, serving.folders), serving.config.send_timeout_s)
        headers, is_reading = Headers(scope=scope), scope["method"] in READING
        send = send if is_reading else _telling_when_to_retry(send)
        with ExitStack() as entered:
            try:
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                _check_way(serving, path, scope["method"], headers)
                if not is_reading and path not in ALWAYS_OPEN:  # which read no body
                    receive = await _entered(serving, path, scope["method"], headers, receive, entered)
            except SnpatchError as reason:
                refusal = error(reason)
                if isinstance(reason, PayloadTooLargeError | RequestTimeoutError):
                    refusal.headers["connection"] = "close"  # the rest is not read
                await refusal(scope, receive, send)
            except ClientDisconnect:
                return
            else:
                await self._app(scope, receive, send)


async def _entered(
    serving: ServerState, path: str, method: str, headers: Headers, receive: Receive, entered: ExitStack
) -> Receive:
    """Take a request in, and return the `receive` of its body, which is within the limits. entered: what it leaves."""
    config = serving.config
    body = request_limits.Body(receive, config.body_timeout_s, serving.arriving)
    receive = body.receive
    if method == "POST":  # its place is taken once it is there: many that arrive slowly keep nobody out
        request_limits.check_type(headers)
        content = await body.read(int(headers.get("content-length", 0)), config.max_body_bytes)
        await request_limits.check(content, path, config, serving.models)
        receive = body.again(content)
    if serving.inflight.is_closing:
        raise ServerBusyError("the server is ending")
    for place in (serving.requests, serving.inflight, *([serving.uploading] if method == "PUT" else [])):
        entered.enter_context(place)
    return receive


def _check_way(serving: ServerState, path: str, method: str, headers: Headers) -> None:
    """Raise for a request that may not come in, whatever its body is."""
    is_preflight = method == "OPTIONS" and all(name in headers for name in PREFLIGHT)
    is_open = is_preflight or path in (*ALWAYS_OPEN, *serving.config.open_route)
    if serving.keys and not is_open and not _is_key(headers.get("authorization", ""), serving.keys):
        raise UnauthorizedError("authorization: expected `Bearer KEY` with a key of this server, got none or another")
    if path not in MODEL and path not in OTHERS and not path.startswith(BELOW):
        raise NotFoundError("not served by snpatch: GET /v1/snpatch and /docs say what is")


def _is_key(authorization: str, keys: Sequence[str]) -> bool:
    """Compare as vLLM does: every key, in constant time."""
    scheme, _, given = authorization.partition(" ")
    given = hashlib.sha256(given.encode()).fingerprint()
    found = [secrets.compare_digest(given, hashlib.sha256(key.encode()).fingerprint()) for key in keys]
    return scheme.lower() == "bearer" and any(found)


def _telling_when_to_retry(send: Send) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = [(name, value) for name, value in message["headers"] if name.lower() != RETRY_AFTER[0]]
            message = {**message, "headers": [*headers, RETRY_AFTER]}
        await send(message)

    return told
