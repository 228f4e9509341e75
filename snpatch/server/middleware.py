"""ASGI middleware in front of vLLM's server: allowed routes, API keys, and limits on requests.

Why a list of allowed routes: routes that vLLM adds in its next version, or has for development, would run models
without patches and receipts, or reach the workers. Keys are checked here because vLLM checks them only below /v1.
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
from snpatch.server.errors import (
    NotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnauthorizedError,
    error_response,
)
from snpatch.server.install import install
from snpatch.server.responses import limit_send_time, remove_paths_from_errors
from snpatch.server.state import ServerState
from snpatch.server.uploads import LOADERS
from snpatch.utils.optional import require

GENERATING_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
)
OTHER_ROUTES = ("/", *ALWAYS_OPEN, *OPENABLE, "/v1/models", "/v1/messages/count_tokens", "/v1/snpatch")
ROUTE_PREFIXES = ("/v1/responses/", "/v1/snpatch/")
UPLOAD_PREFIXES = tuple(f"/v1/snpatch/{kind}/" for kind in LOADERS)  # of routes without POST, which respond with 405
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PREFLIGHT_HEADERS = ("origin", "access-control-request-method")  # of a browser's request before it sends a key
RETRY_AFTER = (b"retry-after", b"1")  # seconds; in each 503 except a GET's


class RouteMiddleware:
    """ASGI middleware that rejects routes snpatch does not patch, and requests without a key or over a limit.

    vLLM's server takes this class by name and wraps its app in it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to vLLM's app if its route, key, body and quotas allow it.

        Otherwise respond with an error. Websockets are closed. The lifespan scope, which comes before all requests,
        installs snpatch into the app.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served by snpatch"})
            return
        state: ServerState = scope["app"].state.engine_client.state
        if scope["type"] == "lifespan":
            install(state, scope["app"])
            await self._app(scope, receive, send)
            return
        send = remove_paths_from_errors(send, state.private_folders)
        receive, send = limit_send_time(receive, send, state.config.send_timeout_s)
        headers, is_safe = Headers(scope=scope), scope["method"] in SAFE_METHODS
        send = send if is_safe else _add_retry_after(send)
        with ExitStack() as stack:
            try:
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                _check_route(state, path, scope["method"], headers)
                if not is_safe and path not in ALWAYS_OPEN:  # those read no body
                    receive = await _admit(state, path, scope["method"], headers, receive, stack)
            except SnpatchError as error:
                response = error_response(error)
                if isinstance(error, PayloadTooLargeError | RequestTimeoutError):
                    response.headers["connection"] = "close"  # because the rest of the body is not read
                await response(scope, receive, send)
            except ClientDisconnect:
                return
            else:
                await self._app(scope, receive, send)


async def _admit(
    state: ServerState, path: str, method: str, headers: Headers, receive: Receive, stack: ExitStack
) -> Receive:
    """Check a request's body, acquire its quotas and return the `receive` of its body.

    stack: releases the quotas.
    """
    config = state.config
    body = request_limits.BodyReader(receive, config.body_timeout_s, state.body_quota)
    receive = body.receive
    # Quotas are acquired after the body has arrived, so that slow bodies keep no request out.
    if method == "POST" and not path.startswith(UPLOAD_PREFIXES):
        request_limits.check_content_type(headers)
        content = await body.read(int(headers.get("content-length", 0)), require(config.max_body_bytes))
        await state.bodies.wait()
        await request_limits.check_body(content, path, config, state.body_fields)
        receive = body.replay(content)
    if state.inflight.is_closing:
        raise ServerBusyError("the server is shutting down")
    quotas = (state.request_quota, state.inflight, *([state.upload_quota] if method == "PUT" else []))
    for quota in quotas:
        stack.enter_context(quota)
    return receive


def _check_route(state: ServerState, path: str, method: str, headers: Headers) -> None:
    """Raise for a missing API key or a route that is not served."""
    is_preflight = method == "OPTIONS" and all(name in headers for name in PREFLIGHT_HEADERS)
    is_open = is_preflight or path in (*ALWAYS_OPEN, *state.config.open_route)
    if state.api_keys and not is_open and not _is_authorized(headers.get("authorization", ""), state.api_keys):
        raise UnauthorizedError(
            "authorization: expected `Bearer KEY` with a key of this server, got none or another one"
        )
    if path not in GENERATING_ROUTES and path not in OTHER_ROUTES and not path.startswith(ROUTE_PREFIXES):
        raise NotFoundError("route: not served by snpatch. GET / lists the routes.")


def _is_authorized(authorization: str, api_keys: Sequence[str]) -> bool:
    """Compare with every key in constant time, as vLLM does."""
    scheme, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.encode()).digest()
    matches = [secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in api_keys]
    return scheme.lower() == "bearer" and any(matches)


def _add_retry_after(send: Send) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = [(name, value) for name, value in message["headers"] if name.lower() != RETRY_AFTER[0]]
            message = {**message, "headers": [*headers, RETRY_AFTER]}
        await send(message)

    return send_with_header
