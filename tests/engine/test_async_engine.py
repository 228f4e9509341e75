"""AsyncEngine: concurrent callers of one engine, waiting for slots, aborts, and the death of vLLM."""

import asyncio
import os
import signal

import oracle
import pytest
import torch
from forked import forked_processes
from jobs import IDS, JOBS, RANKINGS, SHAPE, VALUES, Job
from processes import command_line, descendants

from snpatch import AsyncEngine, Noise, Patch, Sampling, Scale, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16, "max_rankings": 2, "max_adapters": 3}
TEN = Sampling(max_tokens=10)
ENDLESS = Sampling(max_tokens=400, ignore_eos=True)


async def listen(engine, job: Job, until: int = 999, sampling: Sampling = TEN, started: asyncio.Event | None = None):
    """Return the deltas of a job, left after some tokens; the first sets `started`."""
    received, deltas = [], engine.generate(job.ids, job.patch, sampling)
    async for delta in deltas:
        received.append(delta)
        if started:
            started.set()
        if sum(len(d.token_ids) for d in received) >= until:
            break
    await deltas.aclose()
    return received


LATE = Job(0, "base", 0.2 * VALUES.abs(), (0, 60), seed=7)  # its ranking is loaded in the workers, its constant is not


async def leave_during_writes(engine, text) -> tuple[list[int], list[tuple]]:
    """Let a caller leave between the two writes of its patch, while another caller waits to write a constant.

    Return the other caller's token ids, and the writes in order: (kind, handle, slot).
    """
    await text(Patch("base", Scale(0.5), LATE.patch.ranking, 60))
    first, between, writes, command = asyncio.Event(), asyncio.Event(), [], engine.executor.command

    async def slow(name, *arguments):
        if name == "snpatch_write":
            writes.append(arguments[:3])
            first.set()
            await between.wait()
        return await command(name, *arguments)

    engine.executor.command = slow
    fresh = RANKINGS[0].random_control(40, seed=100)
    leaving = asyncio.create_task(text(Patch("base", Noise(torch.ones(SHAPE), seed=3), fresh, 40)))
    await first.wait()
    task = asyncio.create_task(text(LATE.patch, LATE.ids))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.sleep(0)
    between.set()
    token_ids = await task
    del engine.executor.command
    return token_ids, writes


async def collect_results(tiny_model) -> dict:
    """Return the results that the tests check, from one engine."""
    adapters = {name: list(tiny_model.adapters[name]) for name in ("sft", "dpo")}
    rankings = [RANKINGS[0].random_control(40, seed=seed) for seed in range(8)]
    patches = [Patch("sft", "dpo", ranking, 40) for ranking in rankings]
    results = {}
    async with AsyncEngine(tiny_model.folder, adapters, **SMALL) as engine:
        jobs = [job for job in JOBS if job.positions == "all" and not isinstance(job.donor, torch.Tensor)]
        *results["streams"], results["left early"] = await asyncio.gather(
            *(listen(engine, job) for job in jobs), listen(engine, jobs[3], until=2)
        )
        results["jobs"] = jobs

        async def text(patch, ids=IDS[0]):
            return [d async for d in engine.generate(ids, patch, TEN)][-1].completion.token_ids

        results["alone"] = [await text(patch) for patch in patches]
        results["at once"] = await asyncio.gather(*map(text, patches))
        begun = asyncio.Event()
        results["left while written"] = await leave_during_writes(engine, text)
        task = asyncio.create_task(listen(engine, jobs[3], sampling=ENDLESS, started=begun))
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        results["cancelled"] = task.cancelled()
        await asyncio.sleep(0.5)
        results["in use"] = engine.executor.slots.num_in_use
        results["after"] = await text(patches[3])
        stop = results["alone"][0][4]
        word = engine.tokenizer.decode([stop])
        deltas = [d async for d in engine.generate(IDS[0], patches[0], Sampling(max_tokens=10, stop=(word,)))]
        results["stopped"] = word, deltas
        for name, call in {
            "no such model": lambda: engine.generate(IDS[0], "nobody"),
            "n": lambda: engine.generate(IDS[0], "sft", Sampling(n=2, temperature=1.0)),
        }.items():
            with pytest.raises(SnpatchError) as caught:
                call()
            results[name] = str(caught.value)
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        begun = [asyncio.Event() for _ in jobs[:4]]
        calls = (listen(engine, job, sampling=ENDLESS, started=event) for job, event in zip(jobs, begun, strict=False))
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.gather(*(event.wait() for event in begun))
        os.kill(core, signal.SIGKILL)
        results["deaths"] = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        results["after death"] = await asyncio.wait_for(asyncio.gather(text("sft"), return_exceptions=True), 20)
    with pytest.raises(SnpatchError, match="closed"):
        await text("sft")
    return results


@pytest.fixture(scope="module")
def results(zoo):
    tiny_model = zoo("llama")
    with forked_processes():
        return {"tiny_model": tiny_model, **asyncio.run(collect_results(tiny_model))}


def test_concurrent_callers_get_oracle_completions(results):
    tiny_model = results["tiny_model"]
    for job, deltas in zip(results["jobs"], results["streams"], strict=True):
        expected = oracle.generate(job.oracle(tiny_model)[0], job.ids, 10, job.oracle(tiny_model)[1])
        *_, last = deltas
        assert last.completion.token_ids == expected.ids
        assert last.completion.overwrites == job.overwrites(10)
        assert [t for d in deltas for t in d.token_ids] == expected.ids
        assert "".join(d.text for d in deltas) == last.completion.text
        assert all(d.completion is None for d in deltas[:-1])
        assert len(deltas) > 2


def test_caller_leaving_ends_its_own_request_only(results):
    assert sum(len(d.token_ids) for d in results["left early"]) < 10
    assert results["cancelled"]
    assert not any(results["in use"].values())
    assert results["after"] == results["alone"][3]


def test_caller_leaving_during_writes_changes_no_other_slot(results):
    token_ids, writes = results["left while written"]
    recipient, patch = LATE.oracle(results["tiny_model"])
    assert token_ids == oracle.generate(recipient, LATE.ids, 10, patch).ids
    slots = [slot for kind, _, slot in writes if kind == "constant"]
    assert len(slots) == 2
    assert slots[0] != slots[1]


def test_requests_wait_for_slot_of_ranking(results):
    assert results["at once"] == results["alone"]
    assert len({tuple(ids) for ids in results["alone"]}) > 1


def test_deltas_exclude_stop_strings(results):
    word, deltas = results["stopped"]
    assert deltas[-1].completion.finish_reason == "stop"
    text = "".join(d.text for d in deltas)
    assert word not in text
    assert text == deltas[-1].completion.text


def test_generate_invalid_input_raises_at_call(results):
    assert "got 'nobody'" in results["no such model"]
    assert "n: expected 1, got" in results["n"]


def test_vllm_death_raises_for_waiting_callers(results):
    errors = [*results["deaths"], *results["after death"]]
    assert len(errors) == 5
    for error in errors:
        assert isinstance(error, SnpatchError), error
        assert "vLLM's engine has ended" in str(error)


def test_async_engine_requires_vllm_backend(results):
    with pytest.raises(SnpatchError, match="AsyncEngine: expected the vllm backend, got transformers"):
        AsyncEngine(results["tiny_model"].folder, backend="transformers")
