"""Invalid input to `snpatch serve` is a 4xx that names the problem and the field, and affects no other request."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jobs import ALL, DONOR_JOBS, IDS, PATCHED_JOB, RANKINGS, oracle_completion
from serving import CHAT, SAFE, complete

from snpatch import SnpatchError
from snpatch.patching import spec
from snpatch.utils import schema

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

TWO_DONORS = [{"donor": donor, "ranking": "first", "window": 3} for donor in ("dpo", "base")]
ASKED = {"model": "base", "messages": CHAT, "max_tokens": 1}
CHATS = "/v1/chat/completions"
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {}}}
CALLED = {
    "tools": [{"type": "function", "function": LOOK}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
}


@pytest.mark.parametrize(
    ("patch", "field", "message"),
    [
        ({"recipient": "nobody"}, "recipient", "model: expected one of base, sft, dpo, sft_kv, dpo_kv, got 'nobody'"),
        ({**SAFE, "donor": "nobody"}, "donor", "got 'nobody'"),
        ({**SAFE, "ranking": "none"}, "ranking", "ranking: expected one of first, second, got 'none'"),
        ({**SAFE, "window": [5, 3]}, "window", "expected 0 <= lo <= hi, got [5, 3)"),
        ({**SAFE, "window": ALL + 1}, "window", "reaches past the ranking's 288 neurons"),
        ({**SAFE, "positions": "here"}, "positions", "positions: expected one of all, prompt, last_prompt_token"),
        ({**SAFE, "positions": 99}, None, "positions: expected less than the maximum of"),
        ({**SAFE, "strength": 1e39}, "strength", ": expected a finite number of float32"),
        ({**SAFE, "k": 9}, "k", "unknown key k; expected one of donor, ranking, window"),
        ({**SAFE, "guard": "none"}, "guard", "guard: expected one of guard, got 'none'"),
        ({"donor": "dpo"}, "recipient", "recipient is missing"),
        ({"recipient": "sft", "donor": "dpo"}, "ranking", "ranking, window is missing"),
        ({**SAFE, "donor": "mean:donor"}, "donor", "the ranking holds no donor_mean"),
        ({"recipient": "sft", "interventions": [{**SAFE}]}, "interventions.recipient", "unknown key recipient"),
        (
            {"recipient": "sft", "interventions": TWO_DONORS},
            "interventions",
            "interventions: expected at most one donor model, got",
        ),
        ({**SAFE, "interventions": TWO_DONORS}, "donor", "expected in each of the interventions"),
        (7, None, "expected a table, got 7"),
    ],
)
def test_invalid_patch_is_400_with_field(server, patch, field, message):
    for path, body in (
        (CHATS, ASKED),
        ("/v1/completions", {"model": "base", "prompt": IDS[0], "max_tokens": 1}),
        ("/v1/responses", {"model": "base", "input": "bala", "max_output_tokens": 1}),
        (CHATS, {**ASKED, "stream": True}),
        ("/v1/responses", {"model": "base", "input": "bala", "max_output_tokens": 1, "stream": True}),
    ):
        answer = server.post(path, {**body, "snpatch": patch})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["param"] == ".".join(filter(None, ("snpatch", field))) or field is None
    answer = server.post("/v1/messages", {**ASKED, "snpatch": patch})
    assert (answer.status_code, message in answer.text) == (400, True)
    answer = server.post(CHATS, {**ASKED, "vllm_xargs": {"snpatch": json.dumps(patch)}})
    assert (answer.status_code, message in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_beam_search": True, "n": 2}, "use_beam_search: expected false, got true"),
        (
            {"vllm_xargs": {"snpatch": [1, 2, 3]}},
            "vllm_xargs.snpatch: expected an object as JSON, got another type than a string",
        ),
        ({"vllm_xargs": {"snpatch": "{"}}, "vllm_xargs.snpatch: expected an object as JSON"),
        ({"vllm_xargs": {"snpatch": "[" * 3000}}, "vllm_xargs.snpatch: expected an object as JSON"),
        ({"vllm_xargs": {"snpatch_same_weights": 1}}, "expected an object, or its JSON in vllm_xargs"),
        (
            {"vllm_xargs": {"snpatch": json.dumps(SAFE)}, "snpatch": SAFE},
            "expected it once, got it in the request and in vllm_xargs",
        ),
        (
            {"snpatch": {**SAFE, "guard": "guard"}, "prompt_logprobs": 1},
            "guard: cannot be combined with prompt_logprobs",
        ),
        ({"snpatch": {**SAFE, "guard": "guard"}, **CALLED}, "tool_choice: expected none or auto with a guard"),
        ({"seed": 2**63 - 1, "n": 2, "temperature": 1.0}, "seed: expected at most 2^63 - 2 for 2 completions"),
    ],
)
def test_unsupported_request_is_400(server, fields, message):
    answer = server.post(CHATS, {**ASKED, **fields})
    assert (answer.status_code, message in answer.text) == (400, True), answer.text


def test_request_vllm_cannot_send_fails_alone(server, client):
    answer = server.post(CHATS, ASKED, headers={"x-vllm-priority": "9" * 24})
    assert (answer.status_code, "vLLM does not run this request" in answer.text) == (400, True), answer.text
    assert server.get("/health").status_code == 200
    assert complete(client, PATCHED_JOB).snpatch["verified"]


def test_background_response_is_400(server):
    answer = server.post("/v1/responses", {"model": "safe", "input": "bala", "background": True, "store": True})
    assert (answer.status_code, "the response would lack its receipt" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "path",
    """/inference/v1/generate /generative_scoring /v1/chat/completions/batch /collective_rpc /v1/load_lora_adapter
    /v1/chat/completions/render /v1/embeddings /pooling /score /pause /update_weights /start_profile /v1/snpatches
    /v1/decisions /v2/chat /reset_prefix_cache /scale_elastic_ep""".split(),
)
def test_other_vllm_routes_are_404(server, path):
    answer = server.post(path, {"model": "base", "prompt": "bala", "token_ids": [5], "sampling_params": {}})
    assert (answer.status_code, "not served by snpatch" in answer.text) == (404, True)


def test_unknown_model_is_404_listing_models_and_patches(offline, server):
    bodies = {
        CHATS: ASKED,
        "/v1/completions": {"prompt": IDS[0]},
        "/v1/responses": {"input": "bala"},
        "/v1/messages": ASKED,
    }
    for path, body in bodies.items():
        for fields in ({}, {"snpatch": SAFE}):
            answer = server.post(path, {**body, "model": "saf", **fields})
            assert answer.status_code == 404
            assert "of the models sft, base, dpo, sft_kv, dpo_kv or of the patches safe, kept; 'saf'" in answer.text
    answer = server.post(CHATS, {**ASKED, "model": "dqo"})
    assert "one of the models dpo, base, sft, sft_kv, dpo_kv or" in answer.text
    answer = server.post(CHATS, {**ASKED, "model": str(offline.tiny_model.folder)})
    assert (answer.status_code, "/" in answer.json()["error"]["message"]) == (404, False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, ASKED),
        ("/v1/completions", {"model": "base", "prompt": IDS[0], "max_tokens": 1}),
        ("/v1/responses", {"model": "base", "input": "bala", "max_output_tokens": 1}),
        ("/v1/messages", ASKED),
        ("/invocations", ASKED),
    ],
)
def test_misspelled_patch_is_400_with_nearest_name(server, path, body):
    for change, field, message in (
        ({"snpach": SAFE}, "snpach", "Send 'snpatch' as a field of the request"),
        ({"Snpatch": SAFE}, "Snpatch", "Send 'snpatch' as a field of the request"),
        ({"extra_body": {}}, "extra_body", "an argument of OpenAI's Python client"),
        ({"metadata": {"snpatch": "safe"}}, "metadata.snpatch", "Send 'snpatch' as a field of the request"),
        ({"recipient": "sft"}, "recipient", "It is a field of 'snpatch'"),
        ({"temprature": 0}, "temprature", "Did you mean 'temperature'?"),
        ({"snpatch": {**SAFE, "widnow": 3}}, "snpatch.widnow", "Did you mean window?"),
    ):
        answer = server.post(path, {**body, **change})
        assert (answer.status_code, message in answer.text) == (400, True), answer.text
        assert answer.json()["error"].get("param", field) == field
    label = {"metadata": {"user_id": "me"}} if path == "/v1/messages" else {"user": "me"}
    answer = server.post(path, {**body, **label})
    assert answer.status_code == 200, answer.text


def test_prompt_longer_than_context_is_400(server):
    for n in (128, 129, 500):
        answer = server.post("/v1/completions", {"model": "safe", "prompt": [20] * n, "max_tokens": 1})
        assert answer.status_code == 400, answer.text
    answer = server.post("/v1/completions", {"model": "safe", "prompt": [20] * 120, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"


# ---- fuzz ------------------------------------------------------------------------------------------------------------

NAMED = spec.PatchNamespace(dict(zip(("first", "second"), RANKINGS, strict=True)), {})
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
numbers = st.integers(-5, ALL + 5) | st.integers() | st.floats()
intervention = {
    "donor": st.sampled_from(
        ["dpo", "sft", "zero", "mean:donor", "noise:2", "scale:2", "constant:x", "add:zero", "add:"]
    ),
    "ranking": st.sampled_from(["first", "second", "third", ""]),
    "window": numbers | st.lists(numbers, max_size=3),
    "positions": st.sampled_from(["all", "prompt", "completion", "here"]) | numbers,
    "strength": numbers,
    "seed": numbers,
}
mutated = {name: st.one_of(strategy, strategy, strategy, json_values) for name, strategy in intervention.items()}
interventions = st.fixed_dictionaries({}, optional=mutated)
patches = st.fixed_dictionaries(
    {"recipient": st.sampled_from(["sft", "base"]) | json_values},
    optional={
        **mutated,
        "interventions": st.lists(interventions, max_size=2) | json_values,
        "guard": json_values,
        "k": numbers,
    },
)
fields = (
    "model messages prompt input max_tokens n stream stop seed temperature logprobs logit_bias vllm_xargs tools".split()
)
bodies = st.dictionaries(st.sampled_from([*fields, "snpatch", "windows", "prompts"]), json_values, max_size=6)
ROUTES = [CHATS, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/snpatch/sweep"]
READING = ["/tokenize", "/detokenize", "/v1/messages/count_tokens"]
RUNS = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
}


def is_good(data: object) -> bool:
    """Return whether a patch is valid for the published JSON Schema and for the parser."""
    try:
        jsonschema.validate(data, schema.json_schema(spec.PatchSchema))
        spec.from_json(data, NAMED)
    except (jsonschema.ValidationError, SnpatchError):
        return False
    return True


@pytest.fixture
def checked_server(offline, server, client):
    """Yield the server; after the test its completions are still exact and it holds nothing."""
    yield server
    for job in DONOR_JOBS:
        assert complete(client, job).choices[0].token_ids == oracle_completion(offline.tiny_model, job).ids
    assert not any(server.count_resources().values()), server.count_resources()


def _sizes(default_size: int, full_size: int) -> list:
    return [default_size, pytest.param(full_size, marks=pytest.mark.full)]


@pytest.mark.parametrize("num_patches", _sizes(300, 5000))
def test_random_patches_are_served_or_400(checked_server, num_patches):
    @settings(max_examples=num_patches // 20, **RUNS)
    @given(st.lists(patches, min_size=20, max_size=20))
    def send(batch):
        for data in batch:
            body = json.dumps({**ASKED, "snpatch": data})
            answer = http.post(CHATS, content=body, headers={"content-type": "application/json"})
            if answer.status_code == 200:
                assert is_good({name: value for name, value in data.items() if (name, value) != ("guard", None)}), data
                assert answer.json()["snpatch"]["verified"]
            else:
                assert answer.status_code == 400, (data, answer.text)

    with httpx.Client(base_url=checked_server.url, timeout=60) as http:
        send()


@pytest.mark.parametrize("num_bodies", _sizes(300, 3000))
def test_bodies_of_wrong_fields_are_4xx(checked_server, num_bodies):
    @settings(max_examples=num_bodies // 20, **RUNS)
    @given(st.lists(st.tuples(st.sampled_from(ROUTES), bodies), min_size=20, max_size=20))
    def send(batch):
        for route, data in batch:
            body = json.dumps({**data, "snpatch": {"recipient": 3}} if "snpatch" not in data else data)
            answer = http.post(route, content=body, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, (route, body, answer.text)

    with httpx.Client(base_url=checked_server.url, timeout=60) as http:
        send()


def _damage_body(seed: int) -> bytes:
    """Return a malformed body: bytes, truncated JSON, deep nesting, numbers and strings that JSON does not have."""
    draw = random.Random(seed)
    content = json.dumps({**ASKED, "snpatch": SAFE}).encode()
    return draw.choice(
        [
            lambda: draw.randbytes(draw.randrange(300)),
            lambda: content[: draw.randrange(len(content))],
            lambda: content.replace(b"60", draw.choice([b"NaN", b"-Infinity", b"1e999", b"0x3", b"6_0", b"'6'"])),
            lambda: b"[" * draw.randrange(1, 3000),
            lambda: b'{"snpatch":' * draw.randrange(1, 2000) + b"1",
            lambda: content.replace(b"sft", b"\\\\ud800"[1:]),
            lambda: content.replace(b'"dpo"', str(10 ** draw.randrange(9, 400)).encode()),
            lambda: bytes(b ^ draw.choice([0, 0, 0, 1, 128]) for b in content[:-1]),
        ]
    )()


@pytest.mark.parametrize("num_bodies", _sizes(400, 2000))
def test_malformed_bodies_are_4xx(checked_server, num_bodies):
    def send(seed: int) -> tuple[str, int, str]:
        kind = ("application/json", "text/plain", "application/octet-stream", "")[seed % 4 if seed % 3 else 0]
        path = (ROUTES + READING)[seed % 8]
        answer = http.post(path, content=_damage_body(seed), headers={"content-type": kind})
        return path, answer.status_code, answer.text

    with httpx.Client(base_url=checked_server.url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        for seed, (path, status, text) in enumerate(pool.map(send, range(num_bodies))):
            is_read = path in READING and status == 200  # these routes ignore `snpatch`
            assert is_read or 400 <= status < 500, (seed, path, _damage_body(seed), text)
