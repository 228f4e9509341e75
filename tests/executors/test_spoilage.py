"""Overflows that require a restart of their engine, and those that do not."""

import pytest

from snpatch.errors import EngineCrashedError, OverflowedError, ReceiptError, SpoiledEngineError
from snpatch.executors.spoilage import Spoilage
from snpatch.server.errors import http_status


def overflow(unpatched: str | None) -> OverflowedError:
    return OverflowedError("the completion overflowed in float16 at layer 3", unpatched=unpatched)


def test_spoilage_of_patched_completion_keeps_its_error():
    error, spoilage = overflow(None), Spoilage()
    assert spoilage.judge(error) is error
    assert spoilage.judge(error) is error


def test_spoilage_of_unpatched_completion_restarts_once():
    spoilage = Spoilage()
    first = spoilage.judge(overflow("a"))
    assert isinstance(first, SpoiledEngineError)
    assert "the engine is spoiled: the completion overflowed in float16 at layer 3" in str(first)
    second_error = spoilage.judge(overflow("a"))
    assert type(second_error) is OverflowedError
    assert "the model itself overflows on this prompt" in str(second_error)
    assert "Use bfloat16 or float32" in str(second_error)


def test_spoilage_of_inherent_overflow_does_not_restart_again():
    spoilage = Spoilage()
    for text in ("a", "a"):
        spoilage.judge(overflow(text))
    assert type(spoilage.judge(overflow("b"))) is OverflowedError


def test_spoilage_after_a_patched_overflow_restarts_again():
    spoilage = Spoilage()
    for text in ("a", "a", None):
        spoilage.judge(overflow(text))
    assert isinstance(spoilage.judge(overflow("a")), SpoiledEngineError)


@pytest.mark.parametrize("kind", [ReceiptError, EngineCrashedError])
def test_spoiled_engine_error_is_both_kinds_of_error(kind):
    with pytest.raises(kind):
        raise Spoilage().judge(overflow("a"))


@pytest.mark.parametrize("error", [overflow(None), Spoilage().judge(overflow("a"))], ids=["patched", "plain"])
def test_http_status_of_overflow_is_500(error):
    assert http_status(error) == 500
