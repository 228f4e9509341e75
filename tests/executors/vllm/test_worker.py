"""Checks of a worker when an engine starts, slots, plans, and vLLM features that are rejected."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from snpatch import SnpatchError
from snpatch.executors.vllm import slots
from snpatch.executors.vllm.engine_settings import KEY, DualStreamSettings
from snpatch.op.plan import PlanColumn, RequestColumn

pytest.importorskip("vllm", reason="vLLM is not installed")


def attention_group(**heads):
    return SimpleNamespace(metadata_builders=[SimpleNamespace(**heads)], layer_names=["layer"])


LAYERS = {"layer": SimpleNamespace(num_heads=8, num_kv_heads=4)}


@pytest.mark.parametrize(
    "heads",
    [{"num_heads_q": 4, "num_heads_kv": 4}, {"num_heads_q": 8, "num_heads_kv": 2}, {"num_qo_heads": 4},
     {"num_heads": 8, "num_kv_heads": 2}],
    ids=str,
)  # fmt: skip
def test_check_planned_heads_with_other_counts_raises(heads):
    """FlashAttention of vLLM 0.24 takes the counts from the model config; no CPU test runs it."""
    from snpatch.executors.vllm.worker.commands import _check_planned_heads

    with pytest.raises(SnpatchError, match="plans attention for"):
        _check_planned_heads(attention_group(**heads), LAYERS)
    doubled = {name: 4 if "kv" in name else 8 for name in heads}
    _check_planned_heads(attention_group(**doubled), LAYERS)
    with pytest.raises(SnpatchError, match="layer was not made by the dual-stream surgery"):
        _check_planned_heads(attention_group(**doubled), {})


def test_dual_stream_model_config_doubles_head_counts():
    from vllm.config import ModelConfig

    from snpatch.executors.vllm.worker.surgery import DualStreamModelConfig

    config = DualStreamModelConfig.__new__(DualStreamModelConfig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "get_num_attention_heads", lambda self, *_: 5)
        patch.setattr(ModelConfig, "get_num_kv_heads", lambda self, *_: 3)
        assert (config.get_num_attention_heads(None), config.get_num_kv_heads(None)) == (10, 6)


def test_runner_kind_of_an_unknown_runner_raises():
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
    for runner, message in ((Other(), "Other is not supported by snpatch"), (Replaced(), "replaces _prepare_inputs")):
        with pytest.raises(SnpatchError, match=message):
            _runner_kind(runner)


def test_runner_kind_without_model_runner_v1_is_v2(monkeypatch):
    from snpatch.executors.vllm.worker import runners
    from snpatch.executors.vllm.worker.commands import _runner_kind

    class State:
        pass

    monkeypatch.setattr(runners, "dual_stream_model_state", lambda: State)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", None)
    runners.runner_v1.cache_clear()
    try:
        runners.hook_v1()
        assert _runner_kind(SimpleNamespace(model_state=State())) == "v2"
        with pytest.raises(SnpatchError, match="SimpleNamespace is not supported by snpatch"):
            _runner_kind(SimpleNamespace())
    finally:
        runners.runner_v1.cache_clear()


def test_tracker_add_with_stale_handle_or_broken_row_raises():
    from snpatch.executors.vllm.worker.op_tables import OpTables
    from snpatch.executors.vllm.worker.request_tracker import RequestTracker

    tracker = RequestTracker(OpTables(DualStreamSettings(), 1, 0, 8, None, 64, torch.device("cpu")))
    row = [0] * len(RequestColumn)
    row[RequestColumn.GROUP] = -1
    for place, value, message in (
        (RequestColumn.RANKING, 7, "no ranking is registered under 7"),
        (RequestColumn.ADAPTER_1, 9, "no adapter is registered under 9"),
        (RequestColumn.GROUP, 4, "no statistics group 4"),
    ):
        with pytest.raises(SnpatchError, match=message):
            tracker.add("request", {"snpatch": [1, *row[:place], value, *row[place + 1 :]]})
    with pytest.raises(SnpatchError, match="request row: expected 22 integers, got 3"):
        tracker.add("request", {"snpatch": [1, 2, 3]})
    tracker.add("plain", None)
    tracker.add("plain", {"other": 1})
    assert not tracker._records


def test_slot_pool_reassigns_least_recent_unused_slot():
    pool = slots.SlotPool("ranking", 0, 2, "max_rankings")
    ids, writes = pool.acquire({"a": {}, "b": {}})
    assert [writes[key][2] for key in "ab"] == [0, 1]
    assert not pool.has_room({"c": {}})
    with pytest.raises(SnpatchError, match=r"needs 3 rankings at once, .* slots for 2: .* larger max_rankings"):
        pool.check_size(3)
    pool.release("ab")
    assert pool.acquire({"a": {}}) == ({"a": ids["a"]}, {})
    assert pool.has_room({"c": {}})
    fresh, writes = pool.acquire({"c": {}})
    assert writes["c"][2] == 1  # b's row: a is used
    assert fresh["c"] not in ids.values()
    pool.release("ac")
    new_slots, writes = pool.acquire({"b": {}})
    assert new_slots["b"] not in (*ids.values(), *fresh.values())
    assert writes["b"][2] == 0


def test_planner_leaves_no_row_of_an_earlier_step_in_the_plan():
    """Random steps; the op then runs over all rows, as in a padded graph, with NaN past the step's last token."""
    from snpatch.executors.vllm.worker.op_tables import OpTables
    from snpatch.executors.vllm.worker.request_tracker import RequestTracker
    from snpatch.executors.vllm.worker.step_planner import StepPlanner
    from snpatch.op import ops

    tokens, neurons = 24, 48
    tables = OpTables(DualStreamSettings(max_receipts=8), 1, 0, neurons, None, tokens, torch.device("cpu"))
    tracker, draw = RequestTracker(tables), np.random.default_rng(0)
    planner = StepPlanner(tracker)
    blank = tables.plan[0].clone()
    for number in range(6):
        row = np.zeros(len(RequestColumn), dtype=int)
        row[[RequestColumn.HI, RequestColumn.GROUP]] = neurons, number % 4
        row[[RequestColumn.PATCH_STOP, RequestColumn.OBSERVE_STOP]] = 10**6
        row[RequestColumn.RECEIPT] = row[RequestColumn.CAPTURE] = -1
        tracker.add(str(number), {KEY: [number, *map(int, row)]})
    for _ in range(200):
        n = int(draw.integers(0, 4))
        names = [str(i) for i in draw.permutation(7)[:n]]  # "6" is not a request of snpatch
        if n == 0:
            planner.clear()
            count = np.zeros(0, dtype=int)
        else:
            count = draw.integers(1, 8, n)
            planner.plan_step(names, draw.integers(0, 50, n), count)
        num_rows = int(count.sum())
        blank_rows = tables.plan[num_rows:].clone()
        blank_rows[:, PlanColumn.POSITION] = 0  # a blank row may have any position
        assert (blank_rows == blank).all(), (names, count)
        before = [tensor.clone() for tensor in (tables.receipt, tables.layers[0].stats, tables.layers[0].count)]
        layer = tables.layers[0]
        rows = torch.full((2 * (tokens - num_rows), 2 * neurons), torch.nan)
        ops.patched_glu(rows, layer.scale, layer.rank, layer.constant, tables.plan[num_rows:], layer.stats, layer.count,
                        tables.capture, tables.receipt, activation="silu", streams=2, layer=0)  # fmt: skip
        for expected, actual in zip(before, (tables.receipt, layer.stats, layer.count), strict=True):
            assert torch.equal(expected, actual)


def test_plugin_in_a_process_forked_after_cuda_started_raises(monkeypatch, tmp_path):
    """torch.cuda.is_available() may start CUDA without initializing it for torch, so vLLM forks."""
    from snpatch.executors.vllm import processes
    from snpatch.executors.vllm.worker import plugin

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setenv(processes.ERROR_FILE_VARIABLE, str(tmp_path / "reason"))
    with pytest.raises(SnpatchError, match="import snpatch first, or set VLLM_WORKER_MULTIPROC_METHOD=spawn"):
        plugin.register()
    assert "asked torch about a GPU before it imported snpatch" in (tmp_path / "reason").read_text()


def test_reloading_weights_raises():
    from snpatch.executors.vllm.worker.commands import _refuse_reload

    message = r"a dual-stream model's weights cannot be loaded again.*start another engine"
    with pytest.raises(SnpatchError, match=message):
        _refuse_reload(weights_path="other")


CONFIG = {
    "model_config": {
        "use_mla": False, "is_hybrid": False, "is_attention_free": False, "uses_mrope": False, "quantization": None,
        "is_encoder_decoder": False, "runner_type": "generate", "enable_sleep_mode": False,
    },
    "parallel_config": {"pipeline_parallel_size": 1, "data_parallel_size": 1, "use_ray": False},
    "compilation_config": {"pass_config": SimpleNamespace(), "compile_sizes": [], "custom_ops": [],
                           "dynamic_shapes_config": SimpleNamespace(type="backed")},
    "cache_config": {"kv_sharing_fast_prefill": False, "cache_dtype": "auto"},
}  # fmt: skip


def fake_config(streams: int = 2, has_secondary: bool = False, top: dict | None = None, **parts) -> SimpleNamespace:
    """Build the attributes of a vLLM config that `check_supported` reads. top, parts: changes to a supported config."""
    settings = DualStreamSettings(streams=streams, has_secondary=has_secondary)
    configs = {name: SimpleNamespace(**{**fields, **parts.get(name, {})}) for name, fields in CONFIG.items()}
    unset_configs = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None, "quant_config": None}
    return SimpleNamespace(**{**configs, **unset_configs, "additional_config": settings.as_config(), **(top or {})})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("sleep mode", {"model_config": {"enable_sleep_mode": True}}),
        ("a KV connector", {"top": {"kv_transfer_config": object()}}),
        ("weights that change while the engine runs", {"top": {"weight_transfer_config": object()}}),
        ("Ray as the executor", {"parallel_config": {"use_ray": True}}),
    ],
)
@pytest.mark.parametrize("streams", [1, 2])
def test_check_supported_with_silently_wrong_feature_raises(streams, message, changes):
    from snpatch.executors.vllm.engine_settings import check_supported

    check_supported(fake_config(streams))
    with pytest.raises(SnpatchError, match=f"a dual-stream model cannot be combined with {message}"):
        check_supported(fake_config(streams, **changes))


def test_check_supported_rejects_batch_invariant_kernels_only_with_secondary_weights(monkeypatch):
    from snpatch.executors.vllm.engine_settings import check_supported

    check_supported(fake_config(has_secondary=True))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    check_supported(fake_config())
    with pytest.raises(SnpatchError, match="batch-invariant kernels"):
        check_supported(fake_config(has_secondary=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config": {"is_hybrid": True}},
        {"model_config": {"use_mla": True}},
        {"model_config": {"uses_mrope": True}},
        {"compilation_config": {"dynamic_shapes_config": SimpleNamespace(type="unbacked")}},
        {"compilation_config": {"dynamic_shapes_config": SimpleNamespace(type="backed_size_oblivious")}},
    ],
    ids=str,
)
def test_check_supported_rejects_some_features_only_with_two_streams(changes):
    from snpatch.executors.vllm.engine_settings import check_supported

    check_supported(fake_config(streams=1, **changes))
    with pytest.raises(SnpatchError, match="a dual-stream model cannot be combined with"):
        check_supported(fake_config(streams=2, **changes))


def test_capture_sizes_include_vllms_and_some_between_its_small_ones():
    from snpatch.executors.vllm.engine_settings import dual_stream_capture_sizes

    vllm_sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert set(vllm_sizes) <= set(dual_stream_capture_sizes(None))
    assert set(dual_stream_capture_sizes(None)) - set(vllm_sizes) == {6, 12, 20}
    assert dual_stream_capture_sizes(5) == [1, 2, 4, 6, 8]


def test_plugin_applies_vllms_config_changes_to_dual_stream_classes(monkeypatch):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from snpatch.executors.vllm.worker import plugin

    monkeypatch.setenv(plugin.UNTESTED_VARIABLE, "Gemma4ForCausalLM")
    if "Gemma4ForCausalLM" not in MODELS_CONFIG_MAP:
        pytest.skip("this vLLM changes nothing for Gemma 4")
    plugin.register()
    assert MODELS_CONFIG_MAP["SnpatchGemma4ForCausalLM"] is MODELS_CONFIG_MAP["Gemma4ForCausalLM"]


HEAP_SCRIPT = """
import resource, psutil, torch
from snpatch.executors.vllm.worker.heap import HEAP, REQUESTS_PER_TRIM

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 2**20), torch.ones(2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

faults_of_a_step()
unchanged = faults_of_a_step()
HEAP.step(REQUESTS_PER_TRIM - 1)
for _ in range(10):  # until the heap has grown to what a step needs
    faults_of_a_step()
kept, size = faults_of_a_step(), resident()
HEAP.step(1)
print(unchanged, kept, size - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library is not glibc")
def test_worker_heap_keeps_freed_memory_and_returns_it_after_enough_requests():
    output = subprocess.run([sys.executable, "-c", HEAP_SCRIPT], capture_output=True, text=True, check=True).stdout
    unchanged_bytes, kept_bytes, returned_bytes = map(int, output.split())
    assert (
        unchanged_bytes > 64 * 2**20 / os.sysconf("SC_PAGE_SIZE") / 2
    )  # a fault for each page of 64 MiB, or a few fewer
    assert kept_bytes < unchanged_bytes / 10
    assert returned_bytes > 60e6
