"""`snpatch serve` at its limits: disconnects, uploads, sweeps, full slots, keys, shutdown, engine crash."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tomllib

import httpx
import pytest
from commands import run
from jobs import ALL, DONOR_JOBS, FULL_PATCH_JOB, IDS, PATCHED_JOB, VALUES, Job, oracle_completion
from processes import command_line, descendants, wait_for
from served import SPOIL, Server
from serving import CAPACITY_OPTIONS, CHAT, CONSTANTS, LEAK, MANY, SAFE, WORDS, complete, patch_json, serve_options

from snpatch import Constant
from snpatch.executors.vllm import versions
from snpatch.server import uploads
from snpatch.server.config import ServeConfig

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.engine

ENDLESS = {"max_tokens": 100, "temperature": 1.0, "seed": 1, "ignore_eos": True}
CHATS, COMPLETIONS, SWEEP = "/v1/chat/completions", "/v1/completions", "/v1/snpatch/sweep"
KEY = {"authorization": "Bearer secret"}


def build_long_request(job, **fields) -> dict:
    """Return the body of a request that takes long."""
    return {"model": "base", "prompt": job.ids, "snpatch": patch_json(job), "n": 40, **ENDLESS, **fields}


def events(lines) -> list[tuple[str, dict]]:
    """Return (name, data) of server-sent events."""
    parsed, name = [], None
    for line in lines:
        kind, _, text = line.partition(": ")
        if kind == "event":
            name = text
        elif kind == "data" and text != "[DONE]":
            parsed.append((name, json.loads(text)))
    return parsed


# ---- clients that disconnect -----------------------------------------------------------------------------------------


def test_disconnected_clients_leave_nothing_behind(offline, server, client):
    """During a stream, before an answer, while waiting for slots, with n completions, during a sweep."""
    jobs = [MANY[i] for i in range(8)]

    async def leave_stream(http, job):
        async with http.stream("POST", COMPLETIONS, json=build_long_request(job, stream=True, n=3)) as answer:
            async for _ in answer.aiter_lines():
                return

    async def leave_answer(http, job):
        with pytest.raises(httpx.TimeoutException):
            await http.post(COMPLETIONS, json=build_long_request(job), timeout=0.15)

    async def leave_sweep(http):
        body = {**SAFE, "windows": [10, 20], "prompts": [WORDS] * 20, "max_tokens": 90}
        del body["window"]
        async with http.stream("POST", SWEEP, json=body) as answer:
            async for line in answer.aiter_lines():
                if line == "event: completion":
                    return

    async def send_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            await asyncio.gather(
                *(leave_stream(http, job) for job in jobs),
                *(leave_answer(http, job) for job in jobs),
                leave_sweep(http),
            )

    asyncio.run(send_all())
    wait_for(lambda: not any(server.count_resources().values()), 10)
    for job in DONOR_JOBS[:3]:
        assert complete(client, job).choices[0].token_ids == oracle_completion(offline.tiny_model, job).ids


def test_patched_request_does_not_change_later_plain_one(offline, server, client):
    """Prefix cache over HTTP: one prompt, plain, patched and plain again; and with a client's own cache salt."""
    prompt = [20 + i % 70 for i in range(96)]  # three whole blocks
    ask = {"model": "base", "prompt": prompt, "max_tokens": 8, "temperature": 0}

    def text(**fields):
        body = {"return_token_ids": True, **fields}
        return client.completions.create(**ask, extra_body=body).choices[0].token_ids

    patch = {**SAFE, "recipient": "base", "window": ALL}
    patched_text = text(snpatch=patch)
    unpatched = text()
    assert patched_text != unpatched
    assert text(snpatch=patch) == patched_text
    assert text(cache_salt="mine") == unpatched
    assert text(cache_salt="mine", snpatch=patch) == patched_text
    assert text(cache_salt="mine") == unpatched == text()


HUGE = {"donor": "scale:1e19", "ranking": "first", "window": ALL}  # the largest factor that a request may have
OVERFLOWING = {"recipient": "base", "interventions": [HUGE] * 3}


@pytest.mark.parametrize("tokens", [1, 3, 28])
def test_promise_4_overflowing_patch_is_an_error_and_changes_no_other_text(offline, server, client, tokens):
    """One completion, n completions and a stream; the half-filled blocks that they free are reused next."""
    jobs = [Job(i, "base") for i in range(4)] + DONOR_JOBS
    want = [oracle_completion(offline.tiny_model, job).ids for job in jobs]
    body = {"model": "base", "prompt": [40, 41], "max_tokens": tokens, "ignore_eos": True, "snpatch": OVERFLOWING}
    for fields in ({}, {"n": 3, "temperature": 1.0, "seed": 2}):
        answer = server.post(COMPLETIONS, {**body, **fields})
        assert answer.status_code == 500, answer.text
        message = answer.json()["error"]["message"]
        assert "the completion overflowed in float32 at layer 0 under its patch" in message
        assert [complete(client, job).choices[0].token_ids for job in jobs] == want
    with httpx.stream("POST", server.url + COMPLETIONS, json={**body, "stream": True}, timeout=60) as answer:
        chunks = [line for line in answer.iter_lines() if line]
    assert "overflowed in float32" in chunks[-2]
    assert chunks[-1] == "data: [DONE]"
    assert not any('"finish_reason":"length"' in chunk for chunk in chunks)
    assert [complete(client, job).choices[0].token_ids for job in jobs] == want
    wait_for(lambda: not any(server.count_resources().values()), 10)


def test_promise_4_overflowing_sweep_fails_only_its_completions(offline, server, client):
    body = {"recipient": "base", "donor": "scale:1e19", "ranking": "first", "windows": [ALL], "prompts": [WORDS] * 2}
    with httpx.stream("POST", server.url + SWEEP, json={**body, "max_tokens": 4}, timeout=120) as answer:
        stream = events(answer.iter_lines())
    texts = [data for name, data in stream if name == "completion"]
    for text in texts:
        assert ("overflowed in float32" in text.get("error", "")) == (text["rank_hi"] == ALL and "floor" not in text)
        assert (text["text"] is None) == ("error" in text)
    (row,) = [data for name, data in stream if name == "row" and data["rank_hi"] == ALL and "floor" not in data]
    assert (row["prompts"], row["failed"], row["mean"], row["changed"]) == (0, 2, None, None)
    ((name, summary),) = stream[-1:]
    assert (name, summary["failed"], summary["completions"]) == ("summary", 2, len(texts) - 2)
    job = PATCHED_JOB
    assert complete(client, job).choices[0].token_ids == oracle_completion(offline.tiny_model, job).ids


# ---- uploads ---------------------------------------------------------------------------------------------------------


def request(server, verb: str, path: str, **options) -> httpx.Response:
    return httpx.request(verb, f"{server.url}/v1/snpatch/{path}", timeout=60, **options)


def test_upload_can_be_used_and_deleted(offline, server, client):
    ranking = (offline.folder / "second.safetensors").read_bytes()
    constant = (offline.folder / "half.safetensors").read_bytes()
    for path, body in (("rankings/mine", ranking), ("constants/mine", constant)):
        answer = request(server, "PUT", path, content=body)
        assert answer.status_code == 201, answer.text
    info = server.get("/v1/snpatch").json()
    assert info["rankings"]["mine"] == info["rankings"]["second"]
    assert info["constants"]["mine"] == info["constants"]["half"]
    job = next(job for job in MANY if job.order == 1 and isinstance(job.donor, str))
    patch = {**patch_json(job), "ranking": "mine"}
    answer = client.completions.create(
        model="base",
        prompt=job.ids,
        max_tokens=10,
        temperature=0,
        extra_body={"return_token_ids": True, "snpatch": patch},
    )
    assert answer.choices[0].token_ids == complete(client, job).choices[0].token_ids
    assert request(server, "DELETE", "rankings/mine").status_code == 204
    assert request(server, "DELETE", "rankings/mine").status_code == 404
    deleted_answer = server.post(COMPLETIONS, {"model": "base", "prompt": job.ids, "snpatch": patch})
    assert (deleted_answer.status_code, "got 'mine'" in deleted_answer.text) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("rankings/first", "second", 409, "first is set by the server's config"),
        ("rankings/..", "second", 405, ""),
        ("rankings/..%2F..%2Fx", "second", 404, ""),
        ("rankings/.hidden", "second", 400, "expected a name of up to 64 letters"),
        ("rankings/a%00b", "second", 400, "expected a name of up to 64 letters"),
        ("rankings/" + "a" * 65, "second", 400, "expected a name of up to 64 letters"),
        ("rankings/image", "second", 400, "expected another name than image"),
        ("rankings/other", "half", 400, "expected a snpatch ranking, got constant"),
        ("constants/other", "second", 400, "expected a snpatch constant, got ranking"),
        ("pickles/other", "second", 404, "expected rankings or constants, got 'pickles'"),
        ("rankings/other", b"", 400, "expected a safetensors file that Ranking.save wrote"),
        ("rankings/other", b"\x80\x04cos\nsystem\n.", 400, "expected a safetensors file that Ranking.save wrote"),
        ("rankings/other", b"x" * (2 << 20), 413, "body: expected at most"),
    ],
)
def test_invalid_upload_is_4xx_and_leaves_nothing(offline, server, path, body, status, message):
    before = server.get("/v1/snpatch").json()
    content = (offline.folder / f"{body}.safetensors").read_bytes() if isinstance(body, str) else body
    answer = request(server, "PUT", path, content=content)
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert str(offline.folder.parent) not in answer.text
    assert server.get("/v1/snpatch").json() == before


def test_concurrent_uploads_leave_only_named_files(offline, server, tmp_path):
    """All names but one are taken; many clients send the last one at once, slowly; others disconnect in the middle."""
    folder, ranking = server.folder / "uploads", (offline.folder / "second.safetensors").read_bytes()
    Constant(VALUES + 1).save(tmp_path / "none")  # content of no other upload
    constant = (tmp_path / "none").read_bytes()

    def read_index() -> dict[str, dict[str, str]]:
        index = folder / "index.json"
        return json.loads(index.read_text()) if index.exists() else {"rankings": {}, "constants": {}}

    def is_clean() -> bool:
        digests = {digest for names in read_index().values() for digest in names.values()}
        return {path.name for path in folder.glob("*.safetensors*")} == {f"{digest}.safetensors" for digest in digests}

    ranking_names = [f"many{i}" for i in range(uploads.MAX_UPLOADED_NAMES - 1 - sum(map(len, read_index().values())))]
    for name in ranking_names:
        assert request(server, "PUT", f"rankings/{name}", content=ranking).status_code == 201

    async def send_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

            async def slowly(i: int):
                yield constant[: 100 + i]
                await asyncio.sleep(0.5)
                yield constant[100 + i :]

            async def upload(i: int) -> int:
                return (await http.put(f"/v1/snpatch/constants/last{i}", content=slowly(i))).status_code

            async def leave(i: int) -> None:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(upload(i), 0.3)

            await asyncio.gather(*map(leave, range(3)))
            return await asyncio.gather(*map(upload, range(20)))

    statuses = asyncio.run(send_all())
    assert statuses.count(201) == 1
    assert set(statuses) <= {201, 413, 503}
    assert is_clean()
    for path in (f"constants/last{statuses.index(201)}", *(f"rankings/{name}" for name in ranking_names)):
        assert request(server, "DELETE", path).status_code == 204
    assert is_clean()


def test_upload_for_other_model_is_400(server, tmp_path):
    Constant(CONSTANTS["values"][:2]).save(tmp_path / "small.safetensors")
    answer = request(server, "PUT", "constants/small", content=(tmp_path / "small.safetensors").read_bytes())
    assert (answer.status_code, "expected values of shape [3, 96] for this model, got [2, 96]" in answer.text) == (
        400,
        True,
    )


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_sweep_matches_single_completions_and_has_noise_floor(offline, server, client):
    prompts = [WORDS, CHAT, "dora mela"]
    body = {"recipient": "sft", "donor": "dpo", "ranking": "first", "windows": [0, 60, [20, ALL]], "prompts": prompts}
    with httpx.stream("POST", server.url + SWEEP, json={**body, "max_tokens": 8}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        (first, begun), *events_between, (last, summary) = events(answer.iter_lines())
    assert (first, last) == ("start", "summary")
    texts = [data for name, data in events_between if name == "completion"]
    rows = [data for name, data in events_between if name == "row"]
    assert begun["completions"] == summary["completions"] == len(texts) == 3 * 7
    names = [(row["recipient"], row["donor"], row["rank_lo"], row["rank_hi"], row.get("floor")) for row in rows]
    assert names == [
        ("sft", None, 0, 0, None),
        ("dpo", None, 0, 0, None),
        ("sft", "dpo", 0, 0, "k = 0"),
        ("sft", "sft", 0, ALL, "self-patch"),
        ("sft", "dpo", 0, 0, None),
        ("sft", "dpo", 0, 60, None),
        ("sft", "dpo", 20, ALL, None),
    ]
    assert [row["changed"] for row in rows[2:5]] == [0, 0, 0]
    assert rows[6]["changed"] > 0
    no_change = {"changed": 0, "difference": 0}
    assert summary["floor"] == {"k = 0": no_change, "self-patch": no_change}
    for window in ([0, 60], [20, ALL]):
        texts_by_prompt = {text["prompt_index"]: text for text in texts if [text["rank_lo"], text["rank_hi"]] == window}
        for i, prompt in ((0, WORDS), (2, "dora mela")):
            patch = {**SAFE, "window": window}
            single = client.completions.create(
                model="base", prompt=prompt, max_tokens=8, temperature=0, extra_body={"snpatch": patch}
            )
            assert texts_by_prompt[i]["text"].split() == single.choices[0].text.split()
            assert texts_by_prompt[i]["overwrites"] == single.snpatch["overwrites"]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"windows": []}, "windows", "expected at least one, got none"),
        ({"windows": [3, [5, 1]]}, "windows.1", "expected 0 <= lo <= hi"),
        ({"prompts": []}, "prompts", "expected at least one, got none"),
        ({"prompts": ["bala", "bala " * 200]}, "prompts.1", "tokens for a context of 128, got"),
        ({"prompts": [[{"role": "user"}]]}, "prompts.content", "content is missing"),
        ({"prompts": ["bala"] * 99}, None, "at most 200 completions (--max-sweep-completions), got 99 prompts"),
        (
            {"prompts": ["bala " * 2000]},
            "prompts.0",
            "prompts.0: expected at most 4096 characters (--max-prompt-chars), got 10000",
        ),
        (
            {"prompts": [[{"role": "system", "content": "bala"}]]},
            "prompts.0",
            "prompts.0: expected a chat with a user message, got none",
        ),
        ({"prompts": ["bala \ud800"]}, "body", "surrogates not allowed"),
        ({"temperature": float("inf")}, "temperature", "temperature: expected a finite number, got inf"),
        ({"seed": 2**63}, "seed", "seed: expected -2^63..2^63-n"),
        ({"judge": "nobody"}, "judge", "judge: expected one of refusal, got 'nobody'"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: expected at least 1"),
        ({"donor": "nobody"}, "donor", "got 'nobody'"),
    ],
)
def test_invalid_sweep_is_400_with_field(server, change, field, message):
    body = {"recipient": "sft", "donor": "dpo", "ranking": "first", "windows": [5], "prompts": ["bala"], **change}
    headers = {"content-type": "application/json"}
    answer = httpx.post(server.url + SWEEP, content=json.dumps(body), headers=headers, timeout=60)
    assert (answer.status_code, message in answer.text) == (400, True), answer.text
    assert answer.json()["error"]["param"] == field


# ---- limits on one request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"$ref": "#"}},
        {"json": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"regex": "(((" },
        {"regex": "(a{1,300}){1,300}"},
        {"grammar": "start: /a+/"},
        {"grammar": "root ::= root"},
        {"choice": ["{", "}"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [False, True])
def test_impossible_structured_output_is_400_with_reason(server, constraint, is_streamed):
    body = {"model": "safe", "messages": CHAT, "max_tokens": 4, "stream": is_streamed}
    answer = server.post(CHATS, {**body, "structured_outputs": constraint})
    if not is_streamed:
        assert answer.status_code == 400, answer.text
    assert "Internal server error" not in answer.text
    assert '"error"' in answer.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {"regex": "|".join(f"a{i}b" for i in range(3000))}}, "16384 characters of regex"),
        ({"structured_outputs": {"choice": [f"w{i}" for i in range(2500)]}}, "16384 characters of choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "enum": [f"w{i}" for i in range(2500)]}}}}, "16384 characters of json"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 100, "n": 10}, "10240 values per response"),
        ({"prompt_logprobs": 20, "max_tokens": 1, "n": 200}, "10240 values per response"),
        ({"n": 257}, "at most 256 completions (--max-completions), got 1 prompts x 257"),
    ],
)  # fmt: skip
def test_request_over_limit_is_400_naming_limit(server, fields, message):
    answer = server.post(CHATS, {"model": "safe", "messages": CHAT, "max_tokens": 1, **fields})
    assert (answer.status_code, message in answer.text) == (400, True), answer.text


LARGEST_REQUESTS = {  # requests at the limits
    "texts": (COMPLETIONS, {"model": "safe", "prompt": IDS[0], "n": 256, "max_tokens": 2}),
    "texts streamed": (COMPLETIONS, {"model": "safe", "prompt": [IDS[0]] * 256, "max_tokens": 2, "stream": True}),
    "letters": ("/tokenize", {"prompt": "bala " * 800}),
    "values": (CHATS, {"model": "safe", "messages": CHAT * 800, "max_tokens": 1}),
    "windows": (SWEEP, {"recipient": "sft", "donor": "zero", "ranking": "first", "windows": [*range(190)],
                        "prompts": ["bala"], "max_tokens": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST_REQUESTS)
def test_health_answers_during_largest_request(server, name):
    """Latency is measured by `make bench-attack`, and in CPU time by test_request_limits.py."""
    path, body = LARGEST_REQUESTS[name]

    async def send_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            working = asyncio.create_task(http.post(path, json=body))
            while not working.done():
                assert (await http.get("/health")).status_code == 200
                await asyncio.sleep(0.01)
        return working.result()

    answer = asyncio.run(send_all())
    assert answer.status_code < 500, answer.text
    wait_for(lambda: not any(server.count_resources().values()), 30)


# ---- information about the server ------------------------------------------------------------------------------------


def test_info_route_describes_server(offline, server):
    info = server.get("/v1/snpatch").json()
    assert {"base", "sft", "dpo"} <= info["models"].keys()
    assert info["patches"]["safe"] == {**SAFE, "ranking": info["rankings"]["first"]["fingerprint"], "window": [0, 60],
                                       "positions": "all", "strength": 1.0}  # fmt: skip
    assert info["patches"]["kept"] == {"recipient": "sft", "guard": "guard"}
    assert info["guards"]["guard"]["k"] == 5
    assert info["schema"]["required"] == ["recipient"]
    limits = info["limits"]
    assert (limits["context"], limits["max_completions"], limits["max_requests"]) == (128, 256, 256)
    assert info["versions"].keys() == {"snpatch", "vllm", "torch", "transformers"}
    for path in ("/health", "/version", "/metrics", "/docs", "/openapi.json"):
        assert server.get(path).status_code == 200


# ---- full slots, keys, shutdown --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_narrow(offline, tmp_path_factory):
    """Return a function that returns a running server with one ranking slot, two waiting completions and a key.

    It is started from a file of --print-config, and again after a test that ended it.
    """
    folder = tmp_path_factory.mktemp("narrow")
    limits = ["--engine-arg", "max_rankings=1", "--max-waiting", "2", "--api-key", "secret"]
    words = [sys.executable, "-m", "snpatch.cli", "serve", *serve_options(offline.tiny_model, offline.folder), *limits]
    printed = subprocess.run([*words, "--print-config"], capture_output=True, text=True, check=True).stdout
    (folder / "serve.toml").write_text(printed)
    config_table = ServeConfig.load(folder / "serve.toml").to_dict()
    assert json.loads(json.dumps(config_table)) == tomllib.loads(printed)
    servers = []

    def get() -> Server:
        if not servers or servers[-1].process.poll() is not None:
            servers.append(Server(folder, folder / "serve.toml"))
        return servers[-1]

    yield get
    if servers:
        servers[-1].end(signal.SIGKILL)


@pytest.fixture
def narrow(start_narrow):
    return start_narrow()


def test_without_key_nothing_runs(narrow):
    for path in (CHATS, COMPLETIONS, "/v1/responses", "/v1/messages", SWEEP):
        assert narrow.post(path, {}).status_code == 401
    assert request(narrow, "PUT", "rankings/x", content=b"").status_code == 401
    assert request(narrow, "DELETE", "rankings/x").status_code == 401
    assert narrow.get("/v1/snpatch").status_code == 401
    body = {"model": "base", "messages": CHAT, "max_tokens": 1}
    for path in ("/invocations", "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/nothing"):
        assert narrow.post(path, body).status_code == 401
    for path in ("/metrics", "/version", "/load", "/docs", "/redoc", "/openapi.json", "/v1/models", "/health/"):
        assert narrow.get(path).status_code == 401
    assert narrow.get("/ping").status_code == 200
    assert narrow.post("/invocations", body, headers=KEY).status_code == 200
    assert narrow.post("/tokenize", {"prompt": "bala"}, headers=KEY).json()["count"] > 0
    assert narrow.post(CHATS, body, headers=KEY).status_code == 200
    upload = request(narrow, "PUT", "rankings/x", content=b"", headers=KEY)
    assert (upload.status_code, "Start it with --allow-upload" in upload.text) == (403, True)


def test_full_slots_serve_in_order_and_refuse_over_limit(narrow):
    """With one ranking slot, requests for another ranking wait in order of arrival; plain requests do not wait."""

    async def send_all():
        async with httpx.AsyncClient(base_url=narrow.url, timeout=60, headers=KEY) as http:
            order = []

            async def ask(name, **body):
                answer = await http.post(COMPLETIONS, json={"prompt": IDS[0], "max_tokens": 3, **body})
                order.append(name)
                return answer

            def patch(ranking, **fields):
                return {"model": "base", "snpatch": {**SAFE, "ranking": ranking}, **fields}

            async with http.stream("POST", COMPLETIONS, json=build_long_request(PATCHED_JOB, stream=True)) as holding:
                lines = holding.aiter_lines()
                await anext(lines)
                waiting = []
                for name, body in (("other", patch("second")), ("own", patch("first"))):
                    waiting.append(asyncio.create_task(ask(name, **body)))
                    await asyncio.sleep(0.1)
                refused = await ask("refused", **patch("first"))
                unpatched = await ask("plain", model="base")
                metrics = (await http.get("/metrics")).text
                async for _ in lines:
                    ...
                order.append("held")
            return order, refused, unpatched, metrics, await asyncio.gather(*waiting)

    order, refused, unpatched, metrics, served = asyncio.run(send_all())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (
        "expected at most 2 completions waiting for adapter, ranking or constant slots (--max-waiting), got 2"
        in refused.json()["error"]["message"]
    )
    assert unpatched.status_code == 200
    assert 'snpatch_slots_in_use{kind="ranking"} 1.0' in metrics
    assert "snpatch_waiting_requests 2.0" in metrics
    assert order == ["refused", "plain", "held", "other", "own"]
    assert all(answer.json()["snpatch"]["verified"] for answer in served)


def test_overflowing_unpatched_completion_restarts_server(offline, narrow):
    """The process stays the same, so that a supervisor sees one running server."""
    job = Job(2, "base")
    body = {"model": "base", "prompt": job.ids, "max_tokens": 10, "temperature": 0, "return_token_ids": True}
    assert narrow.post(SPOIL, {}, headers=KEY).status_code == 200
    answer = narrow.post(COMPLETIONS, body, headers=KEY)
    assert answer.status_code == 500
    assert "the engine is spoiled: the completion overflowed in float32 at layer 1" in answer.json()["error"]["message"]
    wait_for(lambda: not narrow.is_up(), 60)
    wait_for(narrow.is_up, 180)
    assert narrow.process.poll() is None
    answer = narrow.post(COMPLETIONS, body, headers=KEY)
    assert answer.json()["choices"][0]["token_ids"] == oracle_completion(offline.tiny_model, job).ids


def test_sigterm_lets_streams_finish_with_receipts(narrow):
    async def send_all():
        async with httpx.AsyncClient(base_url=narrow.url, timeout=60, headers=KEY) as http:

            async def listen(job, begun):
                async with http.stream("POST", COMPLETIONS, json=build_long_request(job, stream=True, n=16)) as answer:
                    lines = []
                    async for line in answer.aiter_lines():
                        lines.append(line)
                        begun.set()
                    return lines

            begun = [asyncio.Event() for _ in range(3)]
            tasks = [asyncio.create_task(listen(PATCHED_JOB, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            narrow.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            body = {"model": "base", "prompt": IDS[0], "max_tokens": 1}
            if versions.check() < "0.25":  # its server stops listening immediately
                with pytest.raises(httpx.ConnectError):
                    await http.post(COMPLETIONS, json=body)
            else:
                refused = await http.post(COMPLETIONS, json=body)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            return await asyncio.gather(*tasks)

    streams = asyncio.run(send_all())
    for lines in streams:
        assert lines[-2] == "data: [DONE]"
        *_, (_, last) = events(lines)
        assert last["snpatch"]["verified"]
        assert len(last["snpatch"]["choices"]) == 16
    assert narrow.end() == 0, narrow.read_log()


def test_streams_end_with_error_after_drain_timeout(offline, tmp_path):
    brief = Server(tmp_path, *serve_options(offline.tiny_model, offline.folder), "--drain-s", "0.2")

    async def send_all():
        body, received = build_long_request(PATCHED_JOB, stream=True, n=60), []
        async with (
            httpx.AsyncClient(timeout=60) as http,
            http.stream("POST", brief.url + COMPLETIONS, json=body) as stream,
        ):
            async for line in stream.aiter_lines():
                if not received:
                    brief.process.send_signal(signal.SIGINT)
                received.append(line)
        return received

    lines = asyncio.run(send_all())
    *_, (_, last) = events(lines)
    assert "vLLM's engine has ended" in last["error"]["message"]
    assert "/" not in last["error"]["message"]  # the path of the log
    assert brief.end() == 0, brief.read_log()
    assert LEAK not in brief.read_log(), brief.read_log()


def test_two_workers_patch_exactly_and_engine_crash_is_reported(offline, tmp_path):
    """Tensor parallel; then SIGKILL of the engine: open requests get errors, /health a 503, the exit code is 2."""
    server = Server(
        tmp_path, *serve_options(offline.tiny_model, offline.folder), *CAPACITY_OPTIONS, "--tensor-parallel-size", "2"
    )
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for job, want in zip(MANY[:16], offline.completions[:16], strict=True):
            answer = complete(client, job)
            assert answer.choices[0].token_ids == want.token_ids
            assert answer.snpatch["overwrites"] == want.overwrites
        assert not any(server.count_resources().values())
        (core,) = (pid for pid in descendants(server.process.pid) if b"EngineCore" in command_line(pid))

        async def send_all():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

                async def stream(begun):
                    async with http.stream(
                        "POST", COMPLETIONS, json=build_long_request(PATCHED_JOB, stream=True)
                    ) as answer:
                        received = []
                        async for line in answer.aiter_lines():
                            received.append(line)
                            begun.set()
                        return received

                begun = asyncio.Event()
                streaming = asyncio.create_task(stream(begun))
                single_answer = asyncio.create_task(http.post(COMPLETIONS, json=build_long_request(FULL_PATCH_JOB)))
                await begun.wait()
                os.kill(core, signal.SIGKILL)
                single_answer, lines = await asyncio.wait_for(asyncio.gather(single_answer, streaming), 30)
                return single_answer, lines, await http.get("/health")

        single_answer, lines, health = asyncio.run(send_all())
    assert (single_answer.status_code, "vLLM's engine has ended" in single_answer.text) == (500, True)
    *_, (_, last) = events(lines)
    assert "vLLM's engine has ended" in last["error"]["message"]
    assert not any(choice["finish_reason"] for _, event in events(lines) for choice in event.get("choices", ()))
    assert health.status_code == 503
    assert server.process.wait(60) == 2, server.read_log()
    assert "vLLM's engine has ended" in server.read_log()


# ---- invalid starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch=safe=recipient=sft,donor=dpo,ranking=none,k=3"], "patch safe: patch: ranking: expected one of"),
        (["--patch=sft=recipient=sft"], "patch sft: a model has this name. Choose another name."),
        (["--patch=a/b=recipient=sft"], "expected a name of up to 64 letters"),
        (["--patch=one=recipient=sft,donor=dpo,ranking=first,k=9999"], "reaches past the ranking's 288 neurons"),
        (["--patch=one"], "--patch: expected name=patch"),
        (["--api-server-count=2"], "--api-server-count must be 1: patch state is not shared"),
        (["--headless"], "--headless cannot be combined with patches"),
        (["--enable-lora"], "enable_lora cannot be set"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--port=x"], "--port: invalid"),
        (["--pipeline-parallel-size=2"], "a dual-stream model cannot be combined with pipeline parallel"),
        (["--guard=none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_invalid_start_prints_one_line(offline, capsys, words, message):
    code, _, error = run(capsys, "serve", *serve_options(offline.tiny_model, offline.folder), *words)
    assert (code, message in error) == (2, True), error
    assert "Traceback" not in error
