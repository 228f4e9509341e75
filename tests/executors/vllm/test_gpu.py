"""Dual-stream models under CUDA graphs on a GPU.

float32 is compared with transformers in every graph mode. bfloat16 runs with FlashAttention, which does not support
float32, and is compared with the oracle at odd batch sizes that a captured graph pads. VLLM_USE_V2_MODEL_RUNNER chooses
the model runner. `bench/gpu_check.py --rehearse` runs the eager case without a GPU.
"""

import gc
import itertools
import os

import oracle
import pytest
import tiny
import torch
from jobs import (
    ALL,
    COMPLETIONS,
    GREEDY,
    IDS,
    JOBS,
    MIN_LOGIT_GAP,
    Job,
    assert_equals_oracle,
    assert_logprobs_equal_generation,
    assert_ranking,
    forced_sequences,
    generate,
    oracle_completion,
)
from spoiled import TOO_LARGE, build_overflow_request, fill_with_nan
from transformers import AutoModelForCausalLM

from snpatch import Engine

pytest.importorskip("vllm", reason="vLLM is not installed")
GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not (GPU or os.environ.get("SNPATCH_REHEARSAL")), reason="needs a GPU"),
    pytest.mark.usefixtures("compilation"),
]

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
SMALL |= {"gpu_memory_utilization": 0.3} if GPU else {}
MODES = {
    "eager": {"enforce_eager": True},
    "piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "full": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL"}},
    "default": {"enforce_eager": False},
}
BATCHES = (1, 3, 5, 9, 17, 33)
MANY_JOBS = [*JOBS, *(Job(i % 8, "sft", "dpo", (i, 29 + 9 * i)) for i in range(17))]
# bfloat16 against a float32 oracle of the same weights; on a CPU they differ by up to 0.05 and 0.09
MIN_LOGIT_GAP_BF16 = 0.15  # between the two best logits, above which both models choose the same token
LOGPROB_TOLERANCE_BF16 = 0.2


@pytest.fixture(scope="module")
def start():
    """start(made, mode, **options): open an engine in this process and close the last one."""
    engines = []

    def get(tiny_model: tiny.TinyModel, mode: str, **options) -> Engine:
        while engines:
            engines.pop().close()
        gc.collect()
        adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
        engines.append(Engine(tiny_model.folder, adapters, backend="vllm", **SMALL, **MODES[mode], **options))
        return engines[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield get
        while engines:
            engines.pop().close()


@pytest.mark.parametrize("mode", MODES)
def test_float32_in_each_graph_mode_matches_transformers(zoo, start, mode):
    """Completions, log-probabilities, receipts, statistics and captures, also of batches without a captured graph."""
    tiny_model = zoo("llama")
    engine = start(tiny_model, mode)
    jobs = [job for job in MANY_JOBS if oracle_completion(tiny_model, job).gap > MIN_LOGIT_GAP]
    assert len(jobs) >= 30
    for size in BATCHES:
        assert_equals_oracle(tiny_model, jobs[:size], generate(engine, jobs[:size]))
    for source in TOO_LARGE:
        error = dict(engine.run([build_overflow_request(engine, [40, 41], source)]))[0].error
        assert "overflowed in float32 at layer 0 under its patch" in str(error)
        assert_equals_oracle(tiny_model, jobs[:8], generate(engine, jobs[:8]))
    fill_with_nan(engine)  # attention kernels may read a block past the end of its tokens
    assert_equals_oracle(tiny_model, jobs, generate(engine, jobs))
    assert_logprobs_equal_generation(engine, tiny_model, JOBS)
    models = [oracle.model(*tiny_model.checkpoints[name]) for name in ("base", "dpo")]
    ranking = engine.contrast(IDS, "base", "dpo", completions=COMPLETIONS)
    assert_ranking(ranking, oracle.contrast(*models, forced_sequences("completion")))
    adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
    patches = [job.patch for job in JOBS[:8]]
    with Engine(tiny_model.folder, adapters, backend="transformers") as reference:
        for actual, expected in zip(engine.logprobs(IDS, patches), reference.logprobs(IDS, patches), strict=True):
            torch.testing.assert_close(actual.values, expected.values, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """Return a Llama with heads of 64, which FlashAttention supports; oracle and engine load its bfloat16 weights."""
    folder = tmp_path_factory.mktemp("bf16")
    model = AutoModelForCausalLM.from_config(tiny.config("llama", head_dim=64), dtype=torch.float32)
    tiny.init_weights(model, 1)
    tiny.write_adapter(model, folder / "sft", ["down_proj"], seed=11)
    tiny.write_adapter(model, folder / "dpo", ["down_proj"], seed=12)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return tiny.TinyModel(folder / "model", {"sft": (folder / "sft",), "dpo": (folder / "sft", folder / "dpo")})


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_at_odd_batch_sizes_is_near_the_oracle(bf16, start, mode):
    """Receipts are exact; tokens are equal while the oracle's two best logits differ clearly; logprobs are near."""
    engine = start(bf16, mode)
    if GPU and torch.cuda.get_device_capability() == (9, 0):
        worker = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker
        layers = worker.model_runner.get_model().snpatch.attention
        assert {layer.attn_backend.get_name() for layer in layers} == {"FLASH_ATTN"}
    compared = 0
    for size in BATCHES:
        jobs = MANY_JOBS[:size]
        for job, completion in zip(jobs, generate(engine, jobs, GREEDY), strict=True):
            assert completion.overwrites == job.overwrites(10), job
            want = oracle_completion(bf16, job)
            num_equal = sum(
                itertools.accumulate((a == b for a, b in zip(completion.token_ids, want.ids, strict=True)), min)
            )
            if num_equal < len(want.ids):
                top_logit, second_logit = want.logits[num_equal].topk(2).values.tolist()
                assert top_logit - second_logit < MIN_LOGIT_GAP_BF16, f"{job}: token {num_equal} differs"
            assert completion.logprobs[:num_equal] == pytest.approx(
                want.logprobs[:num_equal], abs=LOGPROB_TOLERANCE_BF16
            ), job
            compared += num_equal
    assert compared >= 5 * sum(BATCHES), f"{compared} of {10 * sum(BATCHES)} tokens could be compared"
    engine.contrast(IDS, "sft", "dpo", positions="prompt")  # counts every token once, or raises
    full_patches = generate(engine, [Job(i, "sft", "dpo", (0, ALL)) for i in range(8)])
    assert [c.token_ids for c in full_patches] == [
        c.token_ids for c in generate(engine, [Job(i, "dpo") for i in range(8)])
    ]
