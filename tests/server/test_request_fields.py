"""Request fields that nothing reads are refused; those of vLLM and of client libraries are accepted."""

import pytest

from snpatch import SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from snpatch.server.install import PUBLISHED_FIELDS
from snpatch.server.request_fields import check_fields

PATCH = {"recipient": "sft"}
MODELS = {
    "openai_serving_chat": ChatCompletionRequest,
    "openai_serving_completion": CompletionRequest,
    "openai_serving_responses": ResponsesRequest,
    "anthropic_serving_messages": AnthropicMessagesRequest,
}


def check(kind, body):
    check_fields(MODELS[kind], body, PUBLISHED_FIELDS[kind])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("body", "field", "hint"),
    [
        ({"snpach": PATCH}, "snpach", "Send 'snpatch' as a field"),
        ({"Snpatch": PATCH}, "Snpatch", "Send 'snpatch' as a field"),
        ({"SNPTACH": PATCH}, "SNPTACH", "Send 'snpatch' as a field"),
        ({"sn_patch": None}, "sn_patch", "Send 'snpatch' as a field"),
        ({"metadata": {"snpatch": "x"}}, "metadata.snpatch", "Send 'snpatch' as a field"),
        ({"vllm_xargs": {"snpach": "{}"}}, "vllm_xargs.snpach", "as JSON in vllm_xargs"),
        ({"extra_body": {"snpatch": PATCH}}, "extra_body.snpatch", "Send 'snpatch' as a field"),
        ({"extra_body": {}}, "extra_body", "an argument of OpenAI's Python client"),
        ({"a": [{"b": {"snpatch": PATCH}}]}, "a.b.snpatch", "Send 'snpatch' as a field"),
        ({"recipient": "sft"}, "recipient", "It is a field of 'snpatch'"),
        ({"guard": "guard"}, "guard", "It is a field of 'snpatch'"),
        ({"temprature": 0}, "temprature", "Did you mean 'temperature'?"),
        ({"Model": "base"}, "Model", "Did you mean 'model'?"),
        ({"x" * 10**6: 1}, "x" * 100, "Leave it out"),
    ],
)
def test_unknown_field_is_refused_with_hint(kind, body, field, hint):
    with pytest.raises(SnpatchError, match=r"^request: expected ") as error:
        check(kind, body)
    assert error.value.field == field
    assert hint in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("openai_serving_chat", "store service_tier metadata safety_identifier prompt_cache_key parallel_tool_calls "
         "reasoning_effort verbosity audio modalities user top_k min_p structured_outputs cache_salt stream"),
        ("openai_serving_completion", "best_of echo suffix logit_bias user stream_options ignore_eos return_token_ids"),
        ("openai_serving_responses", "store truncation text reasoning include previous_response_id max_tool_calls "
         "service_tier top_logprobs stream"),
        ("anthropic_serving_messages", "top_k top_p stop_sequences thinking metadata service_tier container "
         "context_management mcp_servers stream"),
    ],
)  # fmt: skip
def test_fields_of_vllm_and_client_libraries_are_accepted(kind, names):
    check(kind, {name: None for name in names.split()} | {"snpatch": PATCH})


@pytest.mark.parametrize("kind", MODELS)
def test_every_field_of_vllm_model_is_accepted(kind):
    check(kind, {field.alias or name: None for name, field in MODELS[kind].model_fields.items()})


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x", "snpatch": 1}]},
        {"tools": [{"function": {"parameters": {"snpatch": {}}}}]},
        {"metadata": {"dispatch": "x", "snapshot": "y"}},
        {"vllm_xargs": {"snpatch": "{}"}},
        {"snpatch": {"snpatch": 1}},  # refused by the patch's own schema
    ],
)
def test_free_fields_are_not_checked(body):
    check("openai_serving_chat", body)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(("openai_serving_completion", {"max_tokens": value}) for value in ("5", 3.0, True, [1])),
        *(("openai_serving_chat", {"max_tokens": value}) for value in ("5", 3.0, True)),
        *(("openai_serving_chat", {"temperature": value}) for value in ("0.7", True)),
        *(("openai_serving_completion", {"seed": value}) for value in (1.5, "3", True)),
        *(("openai_serving_completion", {"stop": value}) for value in (1, [None], [1])),
        *(("openai_serving_completion", {"prompt": value}) for value in ([1, True], [1.0, 2], [[1], [2.0]], 3)),
        ("openai_serving_completion", {"echo": 1}),
        ("openai_serving_completion", {"prompt": "a\ud83d"}),
        ("openai_serving_chat", {"messages": [{"role": "user", "content": "a\ud83d"}]}),
    ],
)
def test_value_of_wrong_type_is_refused(kind, fields):
    """vLLM would convert "5", 3.0 and true to numbers, and true to a token id."""
    (field,) = fields
    with pytest.raises(SnpatchError, match=f"^request: {field}: expected .*, got ") as error:
        check(kind, fields)
    assert error.value.field == field


def test_values_of_right_type_are_accepted():
    for prompt in ("a", ["a", "b"], [1, 2], [[1], [2]]):
        check("openai_serving_completion", {"prompt": prompt, "max_tokens": 3, "temperature": 1, "stop": None})
    check("openai_serving_chat", {"max_tokens": None, "temperature": 0.5, "stop": ["a"], "seed": 3, "logprobs": True})
