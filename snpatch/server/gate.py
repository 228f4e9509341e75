"""Gate: the ASGI middleware in front of vLLM's server. Which paths there are, who is inside, when to come again.

Why a list of paths and not of exceptions: what vLLM adds in its next version, or has for development, would run models
without patches and receipts, or reach the workers.
"""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from snpatch.errors import BusyError
from snpatch.server.errors import MissingError, error
from snpatch.server.opening import open_doors
from snpatch.server.sending import clean, timed
from snpatch.server.serving import Serving

MODEL = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")  # run the model
OTHERS = """/health /ping /version /metrics /load /docs /docs/oauth2-redirect /redoc /openapi.json
/v1/models /v1/messages/count_tokens /tokenize /detokenize /v1/snpatch""".split()
BELOW = ("/v1/responses/", "/v1/snpatch/")
READING = ("GET", "HEAD", "OPTIONS")
RETRY_AFTER = (b"retry-after", b"1")  # seconds, with every 503 but a GET's


class Gate:
    """vLLM's server takes this class by name and puts it around its app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served by snpatch"})
            return
        serving: Serving = scope["app"].state.engine_client.serving
        if scope["type"] == "lifespan":
            open_doors(serving, scope["app"])
            await self._app(scope, receive, send)
            return
        receive, send = timed(receive, clean(send, serving.folders), serving.config.send_timeout_s)
        refusal = _refusal(serving, scope["path"].removeprefix(scope.get("root_path", "")), scope["method"])
        if refusal is not None:
            await refusal(scope, receive, _telling_when_to_retry(send))
        elif scope["method"] in READING:
            await self._app(scope, receive, send)
        else:
            with serving.visitors:
                await self._app(scope, receive, _telling_when_to_retry(send))


def _refusal(serving: Serving, path: str, method: str) -> JSONResponse | None:
    if path not in MODEL and path not in OTHERS and not path.startswith(BELOW):
        return error(MissingError("not served by snpatch: GET /v1/snpatch and /docs say what is"))
    if path == "/invocations" and serving.has_key:
        return error(MissingError("/invocations asks for no key: it is not served where one is set"))
    if serving.visitors.is_closing and method not in READING:
        return error(BusyError("the server is ending"))
    return None


def _telling_when_to_retry(send: Send) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = [(name, value) for name, value in message["headers"] if name.lower() != RETRY_AFTER[0]]
            message = {**message, "headers": [*headers, RETRY_AFTER]}
        await send(message)

    return told
