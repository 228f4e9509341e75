"""Engines in vLLM's own processes: two workers, crashes, Ctrl-C, and the end of the client process."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from jobs import (
    ALL,
    COMPLETIONS,
    IDS,
    JOBS,
    RANKINGS,
    Job,
    assert_equals_oracle,
    assert_ranking,
    forced_sequences,
    generate,
)
from processes import command_line, descendants, is_running, wait_for

from snpatch import Engine, Sampling, SnpatchError
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import STORE_FILE
from snpatch.sweeps.sweep import sweep

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
KV_JOBS = [Job(j.prompt, j.recipient, j.donor, j.window, j.positions, j.order, j.seed, suffix="_kv") for j in JOBS[:11]]


def start(tiny_model, **options) -> Engine:
    adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
    return Engine(tiny_model.folder, adapters, backend="vllm", **{**SMALL, **options})


@pytest.mark.full
def test_two_compiled_workers_match_the_oracle_and_a_crash_raises(compilation, forked, zoo):
    """A mixed batch, statistics and captures with the neurons split over two workers; then the engine is killed."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    tiny_model = zoo("llama")
    with start(tiny_model, enforce_eager=False, tensor_parallel_size=2) as engine:
        jobs = [*JOBS, *KV_JOBS]
        assert_equals_oracle(tiny_model, jobs, generate(engine, jobs))
        models = [oracle.model(*tiny_model.checkpoints[name]) for name in ("sft", "dpo")]
        ranking = engine.contrast(IDS, "sft", "dpo", completions=COMPLETIONS, exclude_layers=())
        assert_ranking(ranking, oracle.contrast(*models, forced_sequences("completion")))
        captured = engine.capture(IDS, "sft", RANKINGS[0], ALL)
        want = torch.stack([models[0].activations(ids)[-1][tuple(RANKINGS[0].top(ALL).T)] for ids in IDS])
        assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
        with pytest.raises(SnpatchError, match="got 'nobody'"):
            engine.generate(IDS, "nobody")
        # vLLM's own client would wait forever for a killed process.
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        threading.Timer(0.5, os.kill, (core, signal.SIGKILL)).start()
        with pytest.raises(SnpatchError, match="vLLM's engine has ended"):
            while True:
                engine.generate(IDS * 8, "sft", Sampling(max_tokens=100, ignore_eos=True))
    with pytest.raises(SnpatchError, match="closed"):
        engine.generate(IDS)
    wait_for(lambda: not any(b"VLLM" in command_line(pid) for pid in descendants(os.getpid())), 10)


def test_sweep_after_killed_engine_continues_with_a_new_one(forked, zoo, tmp_path, caplog):
    """vLLM's engine is killed during generation; no completion is missing or generated twice."""
    chats = [[{"role": "user", "content": prompt}] for prompt in tiny.PROMPTS]
    config = SweepConfig(("base",), "dpo", (0, 60, 200), controls=1, resamples=20,
                         sampling=Sampling(max_tokens=60, ignore_eos=True))  # fmt: skip

    def run(folder=None):
        return sweep(engine, chats, {"safety": RANKINGS[0]}, {"length": lengths}, config, store=folder)

    def kill_the_engine():
        wait_for(lambda: num_written() >= 6, 60)
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        os.kill(core, signal.SIGKILL)

    def num_written() -> int:
        if not (tmp_path / STORE_FILE).is_file():
            return 0
        with closing(sqlite3.connect(tmp_path / STORE_FILE)) as file:
            tables = file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'texts'").fetchone()[0]
            return file.execute("SELECT count(*) FROM texts").fetchone()[0] if tables else 0

    with start(zoo("llama"), max_num_seqs=4) as engine:
        killer = threading.Thread(target=kill_the_engine)
        killer.start()
        result = run(tmp_path)
        killer.join()
        assert "the engine run failed and is retried: vLLM's engine has ended" in caplog.text
        assert result.failures == []
        assert result.rows == run().rows
    wait_for(lambda: not any(b"VLLM" in command_line(pid) for pid in descendants(os.getpid())), 10)


def lengths(prompts, completions):
    return [float(len(completion)) for completion in completions]


@pytest.fixture
def client(zoo):
    """Yield a client process that starts an engine."""
    tiny_model = zoo("llama")
    adapters = {name: [str(f) for f in folders] for name, folders in tiny_model.adapters.items()}
    child = Path(__file__).parents[2] / "support" / "vllm_child.py"
    process = subprocess.Popen([sys.executable, child, tiny_model.folder, json.dumps(adapters)], stdout=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    yield process
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_ctrl_c_keeps_the_engine_and_a_killed_client_ends_it(client):
    """SIGINT goes to the whole process group during generation, as a terminal or a notebook sends it.

    Only the client reacts, and its engine can be used again; then the client is killed.
    """
    lines = iter(client.stdout.readline, "")
    assert any(line == "round\n" for line in lines), "the engine did not start"
    children = descendants(client.pid)
    assert len(children) >= 2
    time.sleep(0.3)
    start_time = time.monotonic()
    os.killpg(client.pid, signal.SIGINT)
    assert any(line == "KeyboardInterrupt\n" for line in lines)
    assert next(lines) == "completion 1\n"
    assert time.monotonic() - start_time < 15
    assert next(lines) == "round\n"
    assert all(map(is_running, children))
    client.kill()
    client.wait()
    wait_for(lambda: not any(map(is_running, children)), 10)


def test_ctrl_c_during_vllms_start_ends_all_processes(client):
    """vLLM's own start ignores it, and may wait ten minutes for an engine that has ended."""
    wait_for(lambda: len(descendants(client.pid)) > 1, 120)
    time.sleep(1)
    children = descendants(client.pid)
    os.killpg(client.pid, signal.SIGINT)
    wait_for(lambda: client.poll() is not None, 30)
    assert "ready" not in client.stdout.read()
    wait_for(lambda: not any(map(is_running, children)), 10)
