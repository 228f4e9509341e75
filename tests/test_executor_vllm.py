"""The engine on vLLM against the oracle, and the promises of design.md by name.

Engines live in this process here, so that faults can be put into them; tests/test_vllm_processes.py has vLLM's own
processes.
"""

import gc
import math

import oracle
import pytest
import tiny
import torch
from jobs import (
    ALL,
    CLEAR,
    COMPLETIONS,
    IDS,
    JOBS,
    RANKINGS,
    VALUES,
    Job,
    assert_as_the_oracle,
    assert_ranking,
    forced,
    generate,
    told,
    written,
)

from snpatch import Engine, Patch, ReceiptError, Sampling, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
KV_JOBS = [Job(j.prompt, j.recipient, j.donor, j.window, j.where, j.order, j.seed, suffix="_kv") for j in JOBS[:11]]
PLAIN = [Job(i, name) for i in range(8) for name in ("base", "sft", "dpo")]


@pytest.fixture(scope="module")
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def start(in_process, zoo):
    """start(architecture, **options): an engine; the one before is closed, as two cannot share a process."""
    held = []

    def get(architecture="llama", **options) -> Engine:
        while held:
            held.pop().close()
        gc.collect()
        made = zoo(architecture)
        kv = {"scales_kv": True} if architecture in tiny.KV_ARCHITECTURES else {}
        adapters = {name: list(folders) for name, folders in made.adapters.items()}
        held.append(Engine(made.folder, adapters, backend="vllm", **{**SMALL, **kv, **options}))
        return held[0]

    yield get
    while held:
        held.pop().close()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_mixed_batch_is_what_the_oracle_writes(zoo, start, architecture):
    """Texts, log-probabilities and receipts of one batch; then statistics, captures and log-probabilities of prompts."""
    engine, made = start(architecture), zoo(architecture)
    jobs = [*JOBS, *(KV_JOBS if architecture in tiny.KV_ARCHITECTURES else ())]
    jobs += [job for job in PLAIN if told(made, job).gap > CLEAR]
    assert len(jobs) >= 32
    assert_as_the_oracle(made, jobs, generate(engine, jobs))

    models = {name: oracle.model(made.folder, made.of[name]) for name in ("base", "sft", "dpo")}
    ranking = engine.contrast(IDS, "base", "dpo", completions=COMPLETIONS)
    assert_ranking(ranking, oracle.contrast(models["base"], models["dpo"], forced("emitted")))
    captured = engine.capture(IDS, "sft", RANKINGS[0], 40)
    activations = [models["sft"].activations(ids)[-1] for ids in IDS]
    want = torch.stack([a[tuple(RANKINGS[0].top(40).T)] for a in activations])
    assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
    for job, logprobs in zip(JOBS[:8], engine.logprobs(IDS, [job.patch for job in JOBS[:8]]), strict=True):
        recipient, patch = job.oracle(made)
        want = oracle.logprobs(recipient, IDS[JOBS.index(job)], patch)
        torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-4)
