"""`snpatch serve` with real clients: completions match the oracle and the offline engine, and carry receipts."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import ALL, IDS, PATCHED_JOB, Job, oracle_completion
from served import MISCOUNT
from serving import CHAT, MANY, SAFE, SERVED, WORDS, complete

from snpatch.executors.vllm import versions

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai")
from snpatch.server.client import GRAMMARS_SINCE  # noqa: E402

pytestmark = pytest.mark.engine

# ---- completions -----------------------------------------------------------------------------------------------------


def test_patch_over_http_matches_oracle(offline, client):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: complete(client, job), SERVED))
    for job, answer in zip(SERVED, answers, strict=True):
        want = oracle_completion(offline.tiny_model, job)
        assert answer.choices[0].token_ids == want.ids, job
        assert answer.snpatch["overwrites"] == job.overwrites(10), job
        assert answer.snpatch["verified"] is True


def test_concurrent_clients_get_offline_engine_tokens(offline, server):
    async def send_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(complete(client, job) for job in MANY))

    for answer, want in zip(asyncio.run(send_all()), offline.completions, strict=True):
        assert answer.choices[0].token_ids == want.token_ids
        assert answer.snpatch["overwrites"] == want.overwrites
        assert answer.choices[0].text.split() == want.text.split()
    assert len({tuple(completion.token_ids) for completion in offline.completions}) > 30


def test_patch_by_name_field_and_xargs_gives_equal_answers(offline, client):
    want = offline.chat
    positions = len(want.prompt_ids) + 9
    patch = {"recipient": "sft", "donor": "dpo", "ranking": "first", "window": ALL}
    request = {"messages": CHAT, "max_tokens": 10, "temperature": 0}
    inline = client.chat.completions.create(model="base", **request, extra_body={"snpatch": patch})
    xargs = {"vllm_xargs": {"snpatch": json.dumps(patch)}}
    by_xargs = client.chat.completions.create(model="safe", **request, extra_body=xargs)
    for answer in (inline, by_xargs):
        assert answer.choices[0].message.content.split() == want.text.split()
        assert answer.snpatch == {
            "patch": patch,
            "overwrites": want.overwrites,
            "positions": positions,
            "verified": True,
        }
    by_name = client.chat.completions.create(model="safe", **request)
    by_request = client.chat.completions.create(model="base", **request, extra_body={"snpatch": SAFE})
    assert by_name.model == "safe"
    assert by_name.snpatch == {**by_request.snpatch, "patch": "safe"}
    assert by_name.choices[0].message.content == by_request.choices[0].message.content


def test_models_are_listed_and_generate_unpatched(offline, server, client):
    listed = {model.id: model for model in client.models.list()}
    assert {"base", "sft", "dpo", "safe", "kept"} <= listed.keys()
    assert listed["base"].max_model_len == 128
    for path in ("/v1/models", "/metrics"):  # the model's folder is not for clients
        assert str(offline.tiny_model.folder) not in server.get(path).text
    for name in ("base", "sft", "dpo"):
        want = oracle_completion(offline.tiny_model, Job(1, name))
        answer = client.completions.create(
            model=name, prompt=IDS[1], max_tokens=10, temperature=0, extra_body={"return_token_ids": True}
        )
        assert answer.choices[0].token_ids == want.ids
        assert answer.snpatch == {"patch": name, "overwrites": 0, "positions": 0, "verified": True}


def test_n_completions_have_own_seeds_and_receipts(offline, client):
    job = PATCHED_JOB
    for stream in (False, True):
        answer = complete(client, job, temperature=1.0, seed=5, n=3, stream=stream)
        if stream:
            ids = [[], [], []]
            for chunk in answer:
                for choice in chunk.choices:
                    ids[choice.index] += choice.token_ids or []
            receipt = chunk.snpatch
        else:
            ids, receipt = [choice.token_ids for choice in answer.choices], answer.snpatch
        assert ids == [want.token_ids for want in offline.seeded_completions]
        assert [choice["overwrites"] for choice in receipt["choices"]] == [
            want.overwrites for want in offline.seeded_completions
        ]
        assert receipt["overwrites"] == sum(want.overwrites for want in offline.seeded_completions)


def test_list_of_prompts_has_receipt_per_prompt(offline, client):
    arguments = {"model": "safe", "prompt": [IDS[0], IDS[1]], "max_tokens": 5, "temperature": 0}
    answer = client.completions.create(**arguments)
    singles = [client.completions.create(**{**arguments, "prompt": ids}) for ids in IDS[:2]]
    assert [choice.text for choice in answer.choices] == [single.choices[0].text for single in singles]
    assert answer.snpatch["choices"] == [
        {name: single.snpatch[name] for name in ("overwrites", "positions", "verified")} for single in singles
    ]


def test_stream_has_receipt_in_last_chunk(client):
    arguments = {"model": "safe", "messages": CHAT, "max_tokens": 10, "temperature": 0}
    want = client.chat.completions.create(**arguments)
    for usage in (None, {"include_usage": True}):
        *earlier_chunks, last_chunk = client.chat.completions.create(**arguments, stream=True, stream_options=usage)
        assert last_chunk.snpatch == want.snpatch
        assert not any(hasattr(chunk, "snpatch") for chunk in earlier_chunks)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in (*earlier_chunks, last_chunk) if chunk.choices)
        assert text == want.choices[0].message.content
        reasons = [choice.finish_reason for chunk in (*earlier_chunks, last_chunk) for choice in chunk.choices]
        assert reasons[-1] == "length"
        assert not any(reasons[:-1])
    prompts = {"model": "safe", "prompt": [IDS[0], IDS[1]], "max_tokens": 4, "temperature": 0}
    *_, last_chunk = client.completions.create(**prompts, stream=True)
    assert last_chunk.snpatch == client.completions.create(**prompts).snpatch


def test_responses_and_messages_are_patched_and_have_receipt(server, client):
    arguments = {"model": "safe", "input": WORDS, "max_output_tokens": 6, "temperature": 0}
    answer = client.responses.create(**arguments)
    assert answer.snpatch["overwrites"] > 0
    inline = client.responses.create(**{**arguments, "model": "base"}, extra_body={"snpatch": SAFE})
    assert inline.output_text == answer.output_text
    *_, last = client.responses.create(**arguments, stream=True)
    assert last.response.snpatch == answer.snpatch
    anthropic = pytest.importorskip("anthropic").Anthropic(base_url=server.url, api_key="none", max_retries=0)
    arguments = {"model": "safe", "messages": CHAT, "max_tokens": 6}
    greedy = {**arguments, "extra_body": {"temperature": 0}}
    answer = anthropic.messages.create(**greedy)
    chat = client.chat.completions.create(**arguments, temperature=0)
    assert answer.content[0].text == chat.choices[0].message.content
    assert answer.snpatch == chat.snpatch
    inline = anthropic.messages.create(**{**arguments, "model": "base"}, extra_body={"temperature": 0, "snpatch": SAFE})
    assert inline.content[0].text == answer.content[0].text
    receipts = [
        event.snpatch for event in anthropic.messages.create(**greedy, stream=True) if hasattr(event, "snpatch")
    ]
    assert receipts == [answer.snpatch]


def test_vllm_features_work_with_patch(client):
    arguments = {"model": "safe", "messages": CHAT, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**arguments)
    scored = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=3)
    assert [len(token.top_logprobs) for token in scored.choices[0].logprobs.content] == [3] * 6
    assert scored.choices[0].message.content == answer.choices[0].message.content
    word = answer.choices[0].message.content.split()[2]
    stopped_answer = client.chat.completions.create(**arguments, stop=[word])
    assert (stopped_answer.choices[0].finish_reason, stopped_answer.choices[0].stop_reason) == ("stop", word)
    assert word not in stopped_answer.choices[0].message.content
    assert stopped_answer.snpatch["verified"]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    called = client.chat.completions.create(**arguments, tools=[tool], tool_choice="none")
    assert called.snpatch["verified"]
    choice = {"structured_outputs": {"choice": ["bala bama", "bara"]}}
    if versions.minor() >= GRAMMARS_SINCE:
        choice_answer = client.chat.completions.create(**arguments, extra_body=choice)
        assert choice_answer.choices[0].message.content.strip() in choice["structured_outputs"]["choice"]
        assert choice_answer.snpatch["verified"]
    else:
        with pytest.raises(openai.BadRequestError, match=r"expected vLLM 0\.28 or newer"):
            client.chat.completions.create(**arguments, extra_body=choice)
    echoed = client.completions.create(model="safe", prompt=IDS[0], max_tokens=1, echo=True, logprobs=1, temperature=0)
    assert len(echoed.choices[0].logprobs.token_logprobs) == len(IDS[0]) + 1


# ---- receipts that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def miscounting_server(server):
    """Yield a server whose workers report fewer overwrites than they did."""
    server.post(MISCOUNT, {})
    yield server
    server.post(MISCOUNT, {})


def test_failed_receipt_is_500_or_error_chunk_without_finish_reason(miscounting_server, client):
    before = _metric(miscounting_server, "snpatch_receipts_failed_total")
    chat = {"model": "safe", "messages": CHAT, "max_tokens": 4, "temperature": 0}
    texts = {"model": "safe", "prompt": IDS[0], "max_tokens": 4, "temperature": 0}
    calls = [
        (client.chat.completions.create, chat),
        (client.chat.completions.create, {**chat, "n": 2, "temperature": 1.0}),
        (client.completions.create, texts),
        (client.responses.create, {"model": "safe", "input": WORDS, "max_output_tokens": 4}),
    ]
    for create, arguments in calls:
        with pytest.raises(openai.InternalServerError, match="a patch was not applied in full"):
            create(**arguments)
    for create, arguments in calls:
        chunks, reason = [], None
        try:
            for chunk in create(**arguments, stream=True):
                chunks.append(chunk)
        except openai.APIError as error:
            reason = str(error)
        # For Responses the client returns errors as events.
        assert "a patch was not applied in full" in (reason or chunks[-1].message)
        assert not any(choice.finish_reason for event in chunks for choice in getattr(event, "choices", ()))
        assert not any(
            getattr(event, "type", "") == "response.completed" or hasattr(event, "snpatch") for event in chunks
        )
    message = {"model": "safe", "messages": CHAT, "max_tokens": 4}
    answer = miscounting_server.post("/v1/messages", message)
    assert (answer.status_code, "a patch was not applied in full" in answer.text) == (500, True)
    streamed = miscounting_server.post("/v1/messages", {**message, "stream": True}).text
    assert "event: error" in streamed
    assert "message_stop" not in streamed
    assert ("event: message_start" in streamed) == (versions.minor() >= GRAMMARS_SINCE)
    assert "stop_reason" not in streamed.partition("event: message_start")[2].partition("event: ")[2]
    unpatched = client.chat.completions.create(**{**chat, "model": "sft"})
    assert unpatched.snpatch["verified"], "no patch, so no receipt can fail"
    assert _metric(miscounting_server, "snpatch_receipts_failed_total") >= before + 10


# ---- guard -----------------------------------------------------------------------------------------------------------


def test_guard_refuses_same_prompts_as_offline(offline, server, client):
    guard, refused = offline.guard, 0
    before = _metric(server, "snpatch_refused_prompts_total")
    for ids, harm in zip(IDS, offline.harm, strict=True):
        arguments = {"model": "kept", "prompt": ids, "max_tokens": 4, "temperature": 0}
        answer = client.completions.create(**arguments)
        *_, last = client.completions.create(**arguments, stream=True)
        assert answer.snpatch["harm"] == pytest.approx(harm, abs=1e-6)
        assert last.snpatch == answer.snpatch
        is_refused = bool(harm > guard.threshold)
        assert answer.snpatch["refused"] is is_refused
        if is_refused:
            refused += 1
            assert answer.choices[0].text == guard.refusal
            assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("content_filter", "guard")
        else:
            unguarded = client.completions.create(**{**arguments, "model": "sft"})
            assert answer.choices[0].text == unguarded.choices[0].text
    assert 0 < refused < len(IDS)
    assert _metric(server, "snpatch_refused_prompts_total") == before + 2 * refused


def _metric(server, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))
