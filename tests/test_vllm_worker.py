"""What the worker checks when an engine starts, and what the user's process keeps registered."""

import sys
from types import SimpleNamespace

import pytest
import torch

from snpatch import SnpatchError
from snpatch.executors.vllm import registry
from snpatch.executors.vllm.settings import TwinSettings

pytest.importorskip("vllm", reason="vLLM is not installed")


def group_of(**heads):
    return SimpleNamespace(metadata_builders=[SimpleNamespace(**heads)], layer_names=["layer"])


LAYERS = {"layer": SimpleNamespace(num_heads=8, num_kv_heads=4)}


@pytest.mark.parametrize(
    "heads",
    [{"num_heads_q": 4, "num_heads_kv": 4}, {"num_heads_q": 8, "num_heads_kv": 2}, {"num_qo_heads": 4},
     {"num_heads": 8, "num_kv_heads": 2}],
    ids=str,
)  # fmt: skip
def test_attention_planned_for_other_head_counts_is_refused(heads):
    """As FlashAttention of vLLM 0.24 would be, which takes them from the model config; no CPU test runs that."""
    from snpatch.executors.vllm.worker.commands import _check_heads

    with pytest.raises(SnpatchError, match="plans attention for"):
        _check_heads(group_of(**heads), LAYERS)
    doubled = {name: 4 if "kv" in name else 8 for name in heads}
    _check_heads(group_of(**doubled), LAYERS)
    with pytest.raises(SnpatchError, match="layer was not made by the twin surgery"):
        _check_heads(group_of(**doubled), {})


def test_the_twins_model_config_tells_twice_the_heads():
    from vllm.config import ModelConfig

    from snpatch.executors.vllm.worker.surgery import TwinModelConfig

    config = TwinModelConfig.__new__(TwinModelConfig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "get_num_attention_heads", lambda self, *_: 5)
        patch.setattr(ModelConfig, "get_num_kv_heads", lambda self, *_: 3)
        assert (config.get_num_attention_heads(None), config.get_num_kv_heads(None)) == (10, 6)


def test_an_unknown_model_runner_is_refused():
    from snpatch.executors.vllm.worker import runners
    from snpatch.executors.vllm.worker.commands import _runner_kind

    runners.hook_v1()

    class Other:
        pass

    v1 = runners.runner_v1()

    class Replaced(v1):
        def __init__(self):
            pass

        def _prepare_inputs(self, *_):
            pass

    assert _runner_kind(v1.__new__(v1)) == "v1"
    for runner, message in ((Other(), "Other is not known to snpatch"), (Replaced(), "replaces _prepare_inputs")):
        with pytest.raises(SnpatchError, match=message):
            _runner_kind(runner)


def test_a_vllm_without_model_runner_v1_serves_v2(monkeypatch):
    from snpatch.executors.vllm.worker import runners
    from snpatch.executors.vllm.worker.commands import _runner_kind

    class State:
        pass

    monkeypatch.setattr(runners, "twin_model_state", lambda: State)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", None)
    runners.runner_v1.cache_clear()
    try:
        runners.hook_v1()
        assert _runner_kind(SimpleNamespace(model_state=State())) == "v2"
        with pytest.raises(SnpatchError, match="SimpleNamespace is not known to snpatch"):
            _runner_kind(SimpleNamespace())
    finally:
        runners.runner_v1.cache_clear()


def test_a_stale_handle_and_a_broken_row_are_errors():
    from snpatch.executors.vllm.worker.banks import Banks
    from snpatch.executors.vllm.worker.feed import Feed
    from snpatch.op.plan import Entry

    feed = Feed(Banks(TwinSettings(), 1, 0, 8, None, 64, torch.device("cpu")))
    row = [0] * len(Entry)
    row[Entry.GROUP] = -1
    for place, value, message in (
        (Entry.RANKING, 7, "no ranking is registered under 7"),
        (Entry.SECOND, 9, "no adapter is registered under 9"),
        (Entry.GROUP, 4, "no statistics group 4"),
    ):
        with pytest.raises(SnpatchError, match=message):
            feed.add("request", {"snpatch": [1, *row[:place], value, *row[place + 1 :]]})
    with pytest.raises(SnpatchError, match="wanted 22 integers for snpatch, got 3"):
        feed.add("request", {"snpatch": [1, 2, 3]})
    feed.add("plain", None)
    feed.add("plain", {"other": 1})
    assert not feed._records


def test_a_bank_gives_the_longest_unused_row_away_and_never_a_used_one():
    bank = registry.Bank("ranking", 0, 2, "max_rankings")
    ids, writes = bank.take({"a": {}, "b": {}})
    assert [writes[key][2] for key in "ab"] == [0, 1]
    assert not bank.has_room({"c": {}})
    with pytest.raises(SnpatchError, match=r"needs 3 rankings at once, .* room for 2: .* larger max_rankings"):
        bank.check(3)
    bank.give_back("ab")
    assert bank.take({"a": {}}) == ({"a": ids["a"]}, {})
    assert bank.has_room({"c": {}})
    fresh, writes = bank.take({"c": {}})
    assert writes["c"][2] == 1  # b's row: a is used
    assert fresh["c"] not in ids.values()
    bank.give_back("ac")
    again, writes = bank.take({"b": {}})
    assert again["b"] not in (*ids.values(), *fresh.values())
    assert writes["b"][2] == 0
