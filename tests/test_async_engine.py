"""AsyncEngine: concurrent callers of one engine, waiting for slots, aborts, and the death of vLLM."""

import asyncio
import os
import signal

import oracle
import pytest
import torch
from jobs import IDS, JOBS, RANKINGS, SHAPE, VALUES, Job
from processes import command_line, descendants

from snpatch import AsyncEngine, Noise, Patch, Sampling, Scale, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16, "max_rankings": 2, "max_adapters": 3}
TEN = Sampling(max_tokens=10)
ENDLESS = Sampling(max_tokens=400, ignore_eos=True)


async def listen(engine, job: Job, until: int = 999, sampling: Sampling = TEN, begun: asyncio.Event | None = None):
    """Return the deltas of a job, left after some tokens; the first sets `begun`."""
    seen, deltas = [], engine.generate(job.ids, job.patch, sampling)
    async for delta in deltas:
        seen.append(delta)
        if begun:
            begun.set()
        if sum(len(d.token_ids) for d in seen) >= until:
            break
    await deltas.aclose()
    return seen


LATE = Job(0, "base", 0.2 * VALUES.abs(), (0, 60), seed=7)  # whose ranking the workers have, but not its constant


async def left_while_written(engine, text) -> tuple[list[int], list[tuple]]:
    """A caller leaves between the two writes of what its patch names, when another's constant is to be written.

    The other's text, and the writes in their order: (kind, handle, row).
    """
    await text(Patch("base", Scale(0.5), LATE.patch.ranking, 60))
    first, between, written, command = asyncio.Event(), asyncio.Event(), [], engine.executor.command

    async def slow(name, *arguments):
        if name == "snpatch_write":
            written.append(arguments[:3])
            first.set()
            await between.wait()
        return await command(name, *arguments)

    engine.executor.command = slow
    fresh = RANKINGS[0].random_control(40, seed=100)
    leaving = asyncio.create_task(text(Patch("base", Noise(torch.ones(SHAPE), seed=3), fresh, 40)))
    await first.wait()
    other = asyncio.create_task(text(LATE.patch, LATE.ids))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.sleep(0)
    between.set()
    told = await other
    del engine.executor.command
    return told, written


async def everything(made) -> dict:
    """Return the results that the tests check, from one engine."""
    adapters = {name: list(made.adapters[name]) for name in ("sft", "dpo")}
    rankings = [RANKINGS[0].random_control(40, seed=seed) for seed in range(8)]
    many = [Patch("sft", "dpo", ranking, 40) for ranking in rankings]
    found = {}
    async with AsyncEngine(made.folder, adapters, **SMALL) as engine:
        jobs = [job for job in JOBS if job.positions == "all" and not isinstance(job.donor, torch.Tensor)]
        *found["streams"], found["left early"] = await asyncio.gather(
            *(listen(engine, job) for job in jobs), listen(engine, jobs[3], until=2)
        )
        found["jobs"] = jobs

        async def text(patch, ids=IDS[0]):
            return [d async for d in engine.generate(ids, patch, TEN)][-1].completion.token_ids

        found["alone"] = [await text(patch) for patch in many]
        found["at once"] = await asyncio.gather(*map(text, many))
        begun = asyncio.Event()
        found["left while written"] = await left_while_written(engine, text)
        task = asyncio.create_task(listen(engine, jobs[3], sampling=ENDLESS, begun=begun))
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        found["cancelled"] = task.cancelled()
        await asyncio.sleep(0.5)
        found["in use"] = engine.executor.slots.num_in_use
        found["after"] = await text(many[3])
        stop = found["alone"][0][4]
        word = engine.tokenizer.decode([stop])
        deltas = [d async for d in engine.generate(IDS[0], many[0], Sampling(max_tokens=10, stop=(word,)))]
        found["stopped"] = word, deltas
        for name, call in {
            "no such model": lambda: engine.generate(IDS[0], "nobody"),
            "n": lambda: engine.generate(IDS[0], "sft", Sampling(n=2, temperature=1.0)),
        }.items():
            with pytest.raises(SnpatchError) as caught:
                call()
            found[name] = str(caught.value)
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        begun = [asyncio.Event() for _ in jobs[:4]]
        calls = (listen(engine, job, sampling=ENDLESS, begun=one) for job, one in zip(jobs, begun, strict=False))
        open_ones = [asyncio.create_task(call) for call in calls]
        await asyncio.gather(*(one.wait() for one in begun))
        os.kill(core, signal.SIGKILL)
        found["deaths"] = await asyncio.wait_for(asyncio.gather(*open_ones, return_exceptions=True), 20)
        found["after death"] = await asyncio.wait_for(asyncio.gather(text("sft"), return_exceptions=True), 20)
    with pytest.raises(SnpatchError, match="closed"):
        await text("sft")
    return found


@pytest.fixture(scope="module")
def found(zoo):
    made = zoo("llama")
    return {"made": made, **asyncio.run(everything(made))}


def test_concurrent_callers_get_oracle_completions(found):
    made = found["made"]
    for job, deltas in zip(found["jobs"], found["streams"], strict=True):
        want = oracle.generate(job.oracle(made)[0], job.ids, 10, job.oracle(made)[1])
        *_, last = deltas
        assert last.completion.token_ids == want.ids
        assert last.completion.overwrites == job.overwrites(10)
        assert [t for d in deltas for t in d.token_ids] == want.ids
        assert "".join(d.text for d in deltas) == last.completion.text
        assert all(d.completion is None for d in deltas[:-1])
        assert len(deltas) > 2


def test_caller_leaving_ends_its_own_request_only(found):
    assert sum(len(d.token_ids) for d in found["left early"]) < 10
    assert found["cancelled"]
    assert not any(found["in use"].values())
    assert found["after"] == found["alone"][3]


def test_caller_leaving_during_writes_changes_no_other_slot(found):
    told, written = found["left while written"]
    recipient, patch = LATE.oracle(found["made"])
    assert told == oracle.generate(recipient, LATE.ids, 10, patch).ids
    rows = [row for kind, _, row in written if kind == "constant"]
    assert len(rows) == 2
    assert rows[0] != rows[1]


def test_requests_wait_for_slot_of_ranking(found):
    assert found["at once"] == found["alone"]
    assert len({tuple(ids) for ids in found["alone"]}) > 1


def test_deltas_exclude_stop_strings(found):
    word, deltas = found["stopped"]
    assert deltas[-1].completion.finish_reason == "stop"
    told = "".join(d.text for d in deltas)
    assert word not in told
    assert told == deltas[-1].completion.text


def test_generate_invalid_input_raises_at_call(found):
    assert "no model named 'nobody'" in found["no such model"]
    assert "n: expected 1, got" in found["n"]


def test_vllm_death_raises_for_waiting_callers(found):
    errors = [*found["deaths"], *found["after death"]]
    assert len(errors) == 5
    for error in errors:
        assert isinstance(error, SnpatchError), error
        assert "vLLM's engine has ended" in str(error)


def test_async_engine_requires_vllm_backend(found):
    with pytest.raises(SnpatchError, match="AsyncEngine runs in vLLM"):
        AsyncEngine(found["made"].folder, backend="transformers")
