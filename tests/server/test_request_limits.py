"""Limits of one request to `snpatch serve`: keys, bodies, counts, and the event loop during the largest request.

vLLM's own app with snpatch's middleware runs in this process, with an engine that is not started.
"""

import asyncio
import gc
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from serving import CHAT

from snpatch import AsyncEngine, Ranking, SnpatchError
from snpatch.config import EngineConfig
from snpatch.ranking.ranking import MOMENTS
from snpatch.server.config import ServeConfig
from snpatch.utils import schema

pytest.importorskip("vllm", reason="vLLM is not installed")

from snpatch.executors.vllm.streaming import StreamingExecutor
from snpatch.judges.refusal import RefusalWords
from snpatch.server import install, request_limits, routes, vllm_args
from snpatch.server.patch_request import PatchRequest
from snpatch.server.registry import PatchRegistry
from snpatch.server.request_limits import body_fields, build_protocol
from snpatch.server.state import InflightRequests, ServerState, Turnstile
from snpatch.server.sweep_endpoint import ClientSweep

LAYERS, NEURONS, CONTEXT, SEATS = 32, 11008, 4096, 256  # of Llama-2-7B, and vLLM's max_num_seqs
HEALTH_S = 0.2  # maximum CPU time of the event loop between two answers to /health
CHATS, COMPLETIONS, RESPONSES, SWEEP = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/snpatch/sweep",
)
ASKED = {"model": "base", "messages": CHAT}
NOISE = {"donor": "noise:1", "ranking": "safety", "window": 5000}
SWEPT = {"recipient": "base", "donor": "noise:1", "ranking": "safety"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def engine(zoo):
    """Return the tiny model's engine, not started, with the shapes of Llama-2-7B."""
    tiny_model = zoo("llama")
    adapters = {name: list(tiny_model.adapters[name]) for name in ("sft", "dpo")}
    engine = AsyncEngine.from_config(EngineConfig.of(tiny_model.folder, adapters, template="tulu", max_interventions=8))
    engine.geometry = replace(engine.geometry, n_layers=LAYERS, n_neurons=NEURONS, context=CONTEXT)
    engine.requests._geometry = engine.geometry
    return engine


@pytest.fixture(scope="module")
def ranking():
    draw = torch.Generator().manual_seed(0)
    rank = torch.randperm(LAYERS * NEURONS, generator=draw).int().view(LAYERS, NEURONS)
    return Ranking(rank, moments={name: torch.rand(LAYERS, NEURONS, generator=draw) for name in MOMENTS})


@pytest.fixture(scope="module")
def app_and_state(engine):
    """vLLM's app with handlers that answer immediately, and its ServerState."""
    config = ServeConfig(engine.config)
    registry, judges = PatchRegistry(engine, config), {"refusal": RefusalWords()}
    state = ServerState(config, engine, registry, InflightRequests(1), judges, None, (), has_own_template=True)
    return build_app(vllm_args.parse_config("m", {}, {}), state), state


@pytest.fixture
def serve(app_and_state, engine, ranking, monkeypatch):
    """Return a function (keys, **limits) that returns the app and its ServerState."""
    monkeypatch.setattr(StreamingExecutor, "num_waiting", 0)
    monkeypatch.setattr(ClientSweep, "events", no_events)

    def get(keys=(), **limits):
        app, state = app_and_state
        state.config, state.api_keys = ServeConfig(engine.config, **limits).resolve_limits(CONTEXT, SEATS), tuple(keys)
        state.registry = PatchRegistry(engine, state.config)
        state.registry.add("rankings", "safety", ranking)
        for name in ("request_quota", "body_quota", "upload_quota"):
            vars(state).pop(name, None)
        state.bodies = Turnstile()  # a lock belongs to one event loop, and each test has its own
        return app, state

    return get


async def no_events(self):
    """Replace a sweep's events, because its completions need an engine."""
    yield "event: start\n\n"


class Handler:
    """Replaces one of vLLM's handlers: answers each request with an empty stream."""

    def __init__(self, method: str) -> None:
        setattr(self, method, self._answer)

    async def _answer(self, request, raw_request=None):
        async def chunks():
            yield "data: [DONE]\n\n"

        return chunks()

    def create_error_response(self, message, err_type, status_code, param=None):
        from vllm.entrypoints.openai.chat_completion.api_router import ErrorResponse

        return ErrorResponse(error={"message": message, "type": err_type, "code": status_code, "param": param})


def build_app(args, state: ServerState):
    from vllm.entrypoints.openai.api_server import build_app

    async def check_health() -> None: ...

    app = build_app(args, supported_tasks=("generate",))
    app.state.args, app.state.enable_server_load_tracking = args, False
    app.state.engine_client = SimpleNamespace(state=state, check_health=check_health)
    for name, method in install.WRAPPED.items():
        setattr(app.state, name, Handler(method))
    install.wrap_handlers(state, app.state)
    state.body_fields |= body_fields(app)
    app.include_router(routes.build_router(state))
    return app


def send(app, *requests: tuple) -> list[httpx.Response]:
    """Return the answers to (method, path, arguments of httpx), sent one after the other."""

    async def send_all():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return [await http.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(send_all())


def post(app, path: str, table: object) -> httpx.Response:
    content = table if isinstance(table, bytes) else json.dumps(table).encode()
    return send(app, ("POST", path, {"content": content, "headers": JSON}))[0]


# ---- keys ------------------------------------------------------------------------------------------------------------

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "FOO")
SPELLINGS = ("{}", "{}/", "/{}", "/.{}", "{}%00", "{}?x=/health")


def test_without_key_only_health_and_ping_are_open(serve):
    app, _ = serve(("secret",))
    paths = {route.path for route in app.routes} - {"/health", "/ping"}
    requests = [(m, s.format(path), {}) for m in METHODS for path in sorted(paths) for s in SPELLINGS]
    requests += [
        (m, path, {}) for m in METHODS for path in ("//health", "/health/x", "/healthy", "/HEALTH", "/ping/../docs")
    ]
    answers = send(app, *requests)
    assert {answer.status_code for answer in answers} == {401}
    assert [answer.status_code for answer in send(app, ("GET", "/health", {}), ("GET", "/ping", {}))] == [200, 200]


@pytest.mark.parametrize(
    ("authorization", "is_right"),
    [
        ("Bearer secret", True),
        ("bearer other", True),
        ("Bearer  secret", False),
        ("Bearer secre", False),
        ("Bearer secret2", False),
        ("Basic secret", False),
        ("secret", False),
        ("Bearer ", False),
    ],
)
def test_each_key_opens_every_route(serve, authorization, is_right):
    app, _ = serve(("secret", "other"))
    headers = {"headers": {"authorization": authorization}}
    answers = send(app, *(("GET", path, headers) for path in ("/version", "/docs", "/openapi.json", "/v1/snpatch")))
    assert {answer.status_code for answer in answers} == ({200} if is_right else {401})
    chat = {"content": json.dumps(ASKED), "headers": {**JSON, "authorization": authorization}}
    answers = send(app, *(("POST", path, chat) for path in (CHATS, "/invocations")))
    assert {answer.status_code for answer in answers} == ({200} if is_right else {401})


def test_only_opened_route_needs_no_key(serve):
    app, _ = serve(("secret",), open_route=("/version",))
    requests = (("GET", "/version", {}), ("GET", "/openapi.json", {}), ("GET", "/version/", {}))
    assert [answer.status_code for answer in send(app, *requests)] == [200, 401, 401]


def test_index_lists_only_served_routes(serve):
    app, _ = serve()
    (answer,) = send(app, ("GET", "/", {}))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    paths = {path for route in answer.json()["routes"] for path in route.split()[-1:]}
    served = {route.path for route in app.routes}
    templates = {re.sub("(rankings|constants)/NAME", "{kind}/{name}", path) for path in paths}
    assert templates <= served


def test_preflight_needs_no_key(serve):
    app, _ = serve(("secret",))
    headers = {"origin": "http://x", "access-control-request-method": "POST"}
    (answer,) = send(app, ("OPTIONS", CHATS, {"headers": headers}))
    assert "access-control-allow-methods" in answer.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/snpatch", "/health", "metrics", "/nothing"])
def test_open_route_below_v1_is_refused(path):
    with pytest.raises(SnpatchError, match="open_route: expected one of /version"):
        ServeConfig.from_dict({"model": "m", "open_route": [path]})


# ---- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
@pytest.mark.parametrize("path", [CHATS, COMPLETIONS, RESPONSES, "/v1/messages", "/tokenize", "/invocations", SWEEP])
def test_body_without_json_content_type_is_415(serve, path, content_type):
    headers = {"content-type": content_type} if content_type else {}
    (answer,) = send(serve()[0], ("POST", path, {"content": b"{}", "headers": headers}))
    assert answer.status_code == 415
    assert "content-type: expected application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["rankings", "constants"])
def test_post_to_an_upload_is_405(serve, kind):
    (answer,) = send(serve()[0], ("POST", f"/v1/snpatch/{kind}/name", {"content": b"x"}))
    assert answer.status_code == 405


def in_pieces(n: int, size: int):
    async def pieces():
        for _ in range(n):
            yield b"x" * size

    return pieces()


@pytest.mark.parametrize(
    "path", [CHATS, "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/invocations", SWEEP]
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_over_byte_limit_is_413(serve, path, is_chunked):
    app, _ = serve(max_body_bytes=1000)
    content = in_pieces(11, 100) if is_chunked else b"x" * 1001
    (answer,) = send(app, ("POST", path, {"content": content, "headers": JSON}))
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert "at most 1000 bytes (--max-body-bytes)" in answer.json()["error"]["message"]


def test_content_length_over_limit_is_refused_before_reading(serve):
    app, _ = serve(max_body_bytes=1000)

    async def unread():
        raise AssertionError("read")
        yield b""

    headers = {**JSON, "content-length": "1001"}
    assert send(app, ("POST", CHATS, {"content": unread(), "headers": headers}))[0].status_code == 413


def test_late_body_is_408_and_frees_quota(serve):
    app, state = serve(body_timeout_s=0.05)

    async def slow():
        yield b"{"
        await asyncio.sleep(60)
        yield b"}"

    (answer,) = send(app, ("POST", CHATS, {"content": slow(), "headers": JSON}))
    assert answer.status_code == 408
    assert "within 0.05 s (--body-timeout-s)" in answer.json()["error"]["message"]
    assert (state.request_quota.used, state.body_quota.used) == (0, 0)


WHOLE, HALF = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HT"


@pytest.mark.parametrize(
    ("parts", "answers", "is_closed"),
    [
        ((b"",), 0, True),
        ((HALF,), 0, True),
        ((b"GET / HTTP/1.1\r\nhost: x\r\n",), 0, True),
        ((WHOLE,), 1, False),
        ((WHOLE, HALF), 1, True),
        ((HALF, WHOLE[len(HALF) :]), 1, False),
    ],
)
def test_connection_without_complete_head_is_closed_but_not_slow_answer(parts, answers, is_closed):
    async def app(scope, receive, send):
        await asyncio.sleep(0.3)  # past the deadline
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def send_all():
        config = uvicorn.Config(app, http=build_protocol(0.15), lifespan="off", log_level="error")
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: config.http_protocol_class(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        received = b""
        for data in parts:
            writer.write(data)
            await asyncio.sleep(0.01)
            if data.endswith(b"\r\n\r\n"):
                received += await reader.readuntil(b"ok")
        try:
            received += await asyncio.wait_for(reader.read(), 0.6)
            is_over = True
        except TimeoutError:
            is_over = False
        writer.close()
        server.close()
        return received.count(b"200 OK"), is_over

    assert asyncio.run(send_all()) == (answers, is_closed)


@pytest.mark.parametrize(
    ("body", "is_over"),
    [
        (b'{"user":[' + b",".join([b"[]"] * 95) + b"]}", False),
        (b'{"user":[' + b",".join([b"[]"] * 101) + b"]}", True),
        (b'{"user":' + b"[" * 101 + b"]" * 101 + b"}", True),
        (b'{"user":[' + b",".join([b'"\\"a"'] * 101) + b"]}", True),
        (b'{"user":"' + b'[{,\\"\\\\' * 200 + b'"}', False),
        (b'{"user":"' + b"\\\\" * 200 + b'"}', False),
        (b'{"stop_token_ids":[' + b",".join([b"1"] * 3300) + b"]}", True),
        (b'{"stop_token_ids":[' + b",".join([b"1"] * 101) + b"]}", True),
        (b'{"prompt":[' + b",".join([b"1"] * 2500) + b"]}", False),
        (b'{"prompt":[' + b",".join([b"1"] * 3300) + b"]}", True),
        (b'{"prompt":[' + b",".join([b"-1"] * 101) + b"]}", True),
        (b'{"prompt":[' + b",".join([b"1.5"] * 101) + b"]}", True),
    ],
)
def test_body_values_over_limit_are_413(serve, body, is_over):
    app, _ = serve(max_body_values=100)
    answer = post(app, COMPLETIONS, body)
    assert (answer.status_code == 413) is is_over, answer.text
    assert ("at most 100 JSON values and names (--max-body-values)" in answer.text) is is_over


def test_tokenize_input_over_limit_is_413(serve):
    app, _ = serve(max_prompt_chars=50)
    for path, body in (
        ("/tokenize", {"prompt": "a" * 51}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 20}] * 3}),
        ("/detokenize", {"tokens": [1] * 51}),
        ("/v1/messages/count_tokens", {"model": "base", "messages": [{"role": "user", "content": "a" * 51}]}),
    ):
        answer = post(app, path, body)
        assert (answer.status_code, "at most 50 characters or token ids (--max-prompt-chars)" in answer.text) == (
            413,
            True,
        )


@pytest.mark.parametrize(
    ("path", "table"),
    [
        (RESPONSES, {"input": [{"type": "message"}] * 250}),
        (RESPONSES, {"input": [{"role": "user", "content": "a"}] * 50 + [{"role": "user", "content": [{}] * 500}]}),
        (RESPONSES, {"input": "a", "tools": [{}] * 900}),
        (RESPONSES, {"input": [1] * 1000}),
        (CHATS, {"messages": [{}] * 4000}),
        (CHATS, {"messages": [{"role": "user", "content": [1] * 4000}]}),
        (CHATS, {**ASKED, "tools": [{}] * 4000}),
        ("/invocations", {"input": [{"type": "message"}] * 250}),
    ],
)
def test_list_of_invalid_items_is_refused_at_first_item(serve, monkeypatch, path, table):
    app, state = serve()
    validated = []
    counting = {path: CountingField(field, validated) for path, field in state.body_fields.items()}
    monkeypatch.setattr(state, "body_fields", counting)
    answer = post(app, path, {"model": "base", **table})
    assert answer.status_code == 400
    assert max(validated, default=0) < 3000, "errors that vLLM's model builds at once"


class CountingField:
    """FastAPI's body field that records the number of errors of each validation."""

    def __init__(self, model, counts: list[int]) -> None:
        self._model, self._found = model, counts

    def validate(self, *arguments, **options):
        value, errors = self._model.validate(*arguments, **options)
        self._found.append(len(errors or ()))
        return value, errors


def test_long_valid_lists_are_accepted(serve):
    app, _ = serve()
    parts = [{"type": "text", "text": "a"}] * 300
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(50)]
    called = {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "f49"}}}
    for path, body in (
        (CHATS, {**ASKED, "messages": [{"role": "user", "content": parts}] * 2}),
        (CHATS, {**ASKED, **called}),
        (COMPLETIONS, {"model": "base", "prompt": [[1, 2, 3]] * 200}),
        (COMPLETIONS, {"model": "base", "prompt": ["a", "b"] * 100}),
        ("/v1/messages", {"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}),
    ):
        answer = post(app, path, body)
        assert answer.status_code == 200, answer.text


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "n"),
    [
        (CHATS, {"messages": CHAT, "n": 11}, "1 prompts x 11"),
        (COMPLETIONS, {"prompt": "a", "n": 11}, "1 prompts x 11"),
        (COMPLETIONS, {"prompt": ["a"] * 11}, "11 prompts x 1"),
        (COMPLETIONS, {"prompt": [[5]] * 4, "n": 3}, "4 prompts x 3"),
        ("/invocations", {"prompt": ["a"] * 11}, "11 prompts x 1"),
    ],
)
def test_completions_over_limit_are_refused_before_start(serve, path, fields, n):
    app, _ = serve(max_completions=10)
    answer = post(app, path, {"model": "base", **fields})
    assert (answer.status_code, f"at most 10 completions (--max-completions), got {n}" in answer.text) == (400, True), (
        answer.text
    )
    smaller_fields = {"prompt": [5] * 11} if "prompt" in fields else {"messages": CHAT, "n": 10}
    assert post(app, path, {"model": "base", **smaller_fields}).status_code == 200


def test_interventions_over_limit_are_refused_before_build(serve, monkeypatch):
    app, _ = serve()
    monkeypatch.setattr("snpatch.patching.spec._intervention", lambda *_: pytest.fail("an intervention was built"))
    patch = {"recipient": "base", "interventions": [NOISE] * 9}
    for fields in ({"snpatch": patch}, {"vllm_xargs": {"snpatch": json.dumps(patch)}}):
        answer = post(app, CHATS, {**ASKED, **fields})
        assert answer.status_code == 400
        assert "at most 8 interventions, got 9" in answer.text
        assert "max_interventions=9" in answer.text


def test_xargs_json_over_limit_is_refused_before_parsing(serve):
    app, _ = serve(max_body_values=100)
    answer = post(app, CHATS, {**ASKED, "vllm_xargs": {"snpatch": "[" + "[]," * 200 + "1]"}})
    assert (answer.status_code, "--max-body-values" in answer.text) == (413, True)


def test_sweep_windows_and_characters_over_limit_are_refused(serve):
    app, _ = serve(max_sweep_windows=3, max_prompt_chars=50)
    sweep = {"recipient": "base", "ranking": "safety", "donor": "dpo", "windows": [1, 2, 3, 4], "prompts": ["a"]}
    answer = post(app, SWEEP, sweep)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "windows")
    assert "at most 3 windows (--max-sweep-windows), got 4" in answer.text
    answer = post(app, SWEEP, {**sweep, "windows": [1], "prompts": ["a", "a" * 51]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompts.1")
    assert "at most 50 characters (--max-prompt-chars), got 51" in answer.text


def test_requests_and_uploads_over_quota_are_503(serve):
    app, state = serve(max_requests=1, max_uploads=1)
    with state.request_quota:
        (refused, health) = send(app, ("POST", CHATS, {"json": ASKED}), ("GET", "/health", {}))
    with state.upload_quota:
        (upload,) = send(app, ("PUT", "/v1/snpatch/rankings/a", {"content": b""}))
    assert (refused.status_code, "requests: at most 1 at once (--max-requests)" in refused.text) == (503, True)
    assert (refused.headers["retry-after"], health.status_code) == ("1", 200)
    assert (upload.status_code, "uploads: at most 1 at once (--max-uploads)" in upload.text) == (503, True)
    assert post(app, CHATS, ASKED).status_code == 200
    assert (state.request_quota.used, state.upload_quota.used) == (0, 0)


def test_slow_bodies_do_not_block_requests_and_have_byte_quota(serve):
    app, state = serve(max_requests=1, max_incoming_bytes=2500)

    async def send_all():
        end = asyncio.Event()

        async def slow_answer():
            yield b" " * 900
            await end.wait()
            yield json.dumps(ASKED).encode()

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:

            async def ask():
                return await http.post(CHATS, content=slow_answer(), headers=JSON)

            tasks = [asyncio.create_task(ask()) for _ in range(2)]
            await asyncio.sleep(0.05)
            answers = await http.post(CHATS, json=ASKED), await ask()
            num_bytes = state.body_quota.used
            end.set()
            return *answers, num_bytes, await tasks[0]

    answer, refused, num_bytes, slow_answer = asyncio.run(send_all())
    assert (answer.status_code, slow_answer.status_code, num_bytes) == (200, 200, 1800)
    assert (refused.status_code, "at most 2500 at once (--max-incoming-bytes)" in refused.text) == (503, True)
    assert state.body_quota.used == 0


@pytest.mark.parametrize("limit", ["max_requests", "max_body_bytes", "max_completions", "max_prompt_chars"])
def test_unset_limits_follow_engine_sizes(limit):
    config = ServeConfig(EngineConfig("m"))
    small_limits, large_limits = config.resolve_limits(2048, 16), config.resolve_limits(1 << 20, 1024)
    expected = {"max_requests": (64, 4096), "max_completions": (64, 4096), "max_body_bytes": (1 << 20, 8 << 20)}
    assert (getattr(small_limits, limit), getattr(large_limits, limit)) == expected.get(limit, (32 * 2048, 32 << 20))
    assert getattr(replace(config, **{limit: 7}).resolve_limits(2048, 16), limit) == 7


# ---- cached values ---------------------------------------------------------------------------------------------------


def test_donor_values_are_cached_until_ranking_is_replaced(serve, ranking):
    _, state = serve()
    registry = state.registry

    def donor(text, window, **fields):
        return registry.parse({"recipient": "base", **NOISE, "donor": text, "window": window, **fields}).patch.donor

    for text in ("noise:1", "zero", "mean:donor", "add:mean:recipient"):
        assert donor(text, 1) is donor(text, 2)
    assert donor("noise:1", 1, seed=1) is not donor("noise:1", 1, seed=2)
    before = donor("noise:1", 1)
    registry.add("rankings", "safety", replace(ranking))
    assert donor("noise:1", 1) is not before


def test_patch_parsed_during_ranking_replacement_is_not_cached(serve, ranking):
    _, state = serve()
    registry, new_ranking = state.registry, replace(ranking)
    build, patch = registry._build, {"recipient": "base", **NOISE}
    registry.add("rankings", "safety", new_ranking)
    assert build(schema.from_dict(PatchRequest, "snpatch", patch)).patch.ranking is ranking
    assert registry.parse(patch).patch.ranking is new_ranking


# ---- the event loop --------------------------------------------------------------------------------------------------

WORST_REQUESTS = {  # requests at the limits, and some over them that take long to read
    "interventions": (CHATS, {**ASKED, "snpatch": {"recipient": "base", "interventions": [
        {**NOISE, "donor": f"noise:{i + 1}"} for i in range(8)]}}),
    "interventions past the limit": (
        CHATS, {**ASKED, "snpatch": {"recipient": "base", "interventions": [NOISE] * 300}}),
    "windows": (SWEEP, {**SWEPT, "windows": list(range(1, 1025)), "prompts": ["a"]}),
    "prompts": (SWEEP, {**SWEPT, "windows": [1], "prompts": [CHAT] * 1990}),
    "token ids": (COMPLETIONS, {"model": "base", "prompt": [[5] * 4096] * 30}),
    "token ids past the limit": (COMPLETIONS, {"model": "base", "prompt": [5] * 300_000}),
    "characters": (CHATS, {**ASKED, "messages": [{"role": "user", "content": "\"\\" * 250_000}]}),
    "messages": (CHATS, {**ASKED, "messages": CHAT * 800}),
    "parts": (CHATS, {**ASKED, "messages": [{"role": "user", "content": ["a"] * 4000}]}),
    "items": (RESPONSES, {"model": "base", "input": [{"role": "user", "content": "a"}] * 200}),
    "bad items": (RESPONSES, {"model": "base", "input": [{"type": "message"}] * 300}),
    "empty lists": (CHATS, b'{"messages":[' + b",".join([b"[]"] * 349_000) + b"]}"),
    "an open string": (CHATS, b'"' + b'\\"' * 500_000),
    "tokenize": ("/tokenize", {"prompt": "a" * 1_000_000}),
    "detokenize": ("/detokenize", {"tokens": [5] * 150_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORST_REQUESTS)
def test_health_answers_within_200_ms_during_worst_request_at_7b(serve, name):
    app, _ = serve()
    path, body = WORST_REQUESTS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert asyncio.run(slowest_health(app, path, content)) < HEALTH_S


def test_bodies_of_burst_are_parsed_in_different_turns_of_the_event_loop(serve, monkeypatch):
    app, _ = serve()
    turn, turns, check = 0, [], request_limits.check_body

    async def check_body(*args):
        turns.append(turn)
        await check(*args)

    async def send_burst():
        async def count_turns():
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            answers = await asyncio.gather(*(http.post(CHATS, json=ASKED) for _ in range(50)))
        counting.cancel()
        return answers

    monkeypatch.setattr(request_limits, "check_body", check_body)
    assert {answer.status_code for answer in asyncio.run(send_burst())} == {200}
    assert len(turns) == 50
    assert len({*turns}) == 50


async def slowest_health(app, path: str, content: bytes) -> float:
    """Return the event loop's CPU seconds for the slowest /health from before a request until after its answer starts.

    CPU time does not depend on how busy the machine is; `make bench-attack` measures a real server's wall time.
    """
    slowest = 0.0
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:

        async def ask_health():
            nonlocal slowest
            while True:
                begun = time.thread_time()
                await asyncio.sleep(0)  # a real request waits for the turn of the event loop in which it arrives
                assert (await http.get("/health")).status_code == 200
                slowest = max(slowest, time.thread_time() - begun)
                await asyncio.sleep(0.001)  # without a pause, other threads can wait for the GIL for minutes

        await http.get("/health")
        gc.freeze()  # a collection in this thread would also scan what earlier tests left
        asking = asyncio.create_task(ask_health())
        await asyncio.sleep(0.02)
        await http.post(path, content=content, headers=JSON)
        await asyncio.sleep(0.02)
        asking.cancel()
        gc.unfreeze()
    return slowest
