"""The engine in vLLM's own processes: the worker across a process boundary, two workers, streaming, and their end."""

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
from jobs import ALL, COMPLETIONS, IDS, JOBS, RANKINGS, Job, assert_as_the_oracle, assert_ranking, forced, generate
from processes import command_line, descendants, is_running, wait_for

from snpatch import Engine, Sampling, SnpatchError
from snpatch.runs.config import SweepConfig
from snpatch.runs.store import NAME
from snpatch.runs.sweep import sweep

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
KV_JOBS = [Job(j.prompt, j.recipient, j.donor, j.window, j.where, j.order, j.seed, suffix="_kv") for j in JOBS[:11]]


def start(made, **options) -> Engine:
    adapters = {name: list(folders) for name, folders in made.adapters.items()}
    return Engine(made.folder, adapters, backend="vllm", **{**SMALL, **options})


def test_a_mixed_batch_statistics_and_captures_are_the_oracles(zoo):
    """In processes of their own, compiled, with the neurons split over two workers; then one of them dies."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    made = zoo("llama")
    with start(made, enforce_eager=False, tensor_parallel_size=2) as engine:
        jobs = [*JOBS, *KV_JOBS]
        assert_as_the_oracle(made, jobs, generate(engine, jobs))
        models = [oracle.model(*made.of[name]) for name in ("sft", "dpo")]
        ranking = engine.contrast(IDS, "sft", "dpo", completions=COMPLETIONS, exclude_layers=())
        assert_ranking(ranking, oracle.contrast(*models, forced("emitted")))
        captured = engine.capture(IDS, "sft", RANKINGS[0], ALL)
        want = torch.stack([models[0].activations(ids)[-1][tuple(RANKINGS[0].top(ALL).T)] for ids in IDS])
        assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
        with pytest.raises(SnpatchError, match="no model named 'nobody'"):
            engine.generate(IDS, "nobody")
        # vLLM's own client would wait for ever for a process that ended without a word.
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        threading.Timer(0.5, os.kill, (core, signal.SIGKILL)).start()
        with pytest.raises(SnpatchError, match="vLLM's engine has ended"):
            while True:
                engine.generate(IDS * 8, "sft", Sampling(max_tokens=100, ignore_eos=True))
    with pytest.raises(SnpatchError, match="closed"):
        engine.generate(IDS)
    wait_for(lambda: not any(b"VLLM" in command_line(pid) for pid in descendants(os.getpid())), 10)


def test_a_sweep_goes_on_with_a_new_engine(zoo, tmp_path, capsys):
    """vLLM's engine is killed while texts are written: another is started, and nothing is missing or written twice."""
    chats = [[{"role": "user", "content": prompt}] for prompt in tiny.PROMPTS]
    config = SweepConfig(("base",), "dpo", (0, 60, 200), controls=1, resamples=20,
                         sampling=Sampling(max_tokens=60, ignore_eos=True))  # fmt: skip

    def run(folder=None):
        return sweep(engine, chats, {"safety": RANKINGS[0]}, {"length": lengths}, config, store=folder)

    def kill_the_engine():
        wait_for(lambda: written() >= 6, 60)
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        os.kill(core, signal.SIGKILL)

    def written() -> int:
        if not (tmp_path / NAME).is_file():
            return 0
        with closing(sqlite3.connect(tmp_path / NAME)) as file:
            tables = file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'texts'").fetchone()[0]
            return file.execute("SELECT count(*) FROM texts").fetchone()[0] if tables else 0

    with start(zoo("llama"), max_num_seqs=4) as engine:
        killer = threading.Thread(target=kill_the_engine)
        killer.start()
        result = run(tmp_path)
        killer.join()
        assert "a run failed and is begun again: vLLM's engine has ended" in capsys.readouterr().err
        assert result.failures == []
        assert result.rows == run().rows
    wait_for(lambda: not any(b"VLLM" in command_line(pid) for pid in descendants(os.getpid())), 10)


def lengths(prompts, completions):
    return [float(len(completion)) for completion in completions]


@pytest.fixture
def starting(zoo):
    """A user's process that starts an engine."""
    made = zoo("llama")
    adapters = {name: [str(f) for f in folders] for name, folders in made.adapters.items()}
    child = Path(__file__).parent / "support" / "vllm_child.py"
    process = subprocess.Popen([sys.executable, child, made.folder, json.dumps(adapters)], stdout=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    yield process
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_ctrl_c_answers_and_no_process_outlives_a_killed_parent(starting):
    """SIGINT to the whole group, as a terminal or a notebook sends it, while texts are being written.

    It is for the user's process alone, and its engine can be used again; then the user's process is killed.
    """
    lines = iter(starting.stdout.readline, "")
    assert any(line == "round\n" for line in lines), "the engine did not start"
    below = descendants(starting.pid)
    assert len(below) >= 2
    time.sleep(0.3)
    sent = time.monotonic()
    os.killpg(starting.pid, signal.SIGINT)
    assert any(line == "KeyboardInterrupt\n" for line in lines)
    assert next(lines) == "goes on 1\n"
    assert time.monotonic() - sent < 15
    assert next(lines) == "round\n"
    assert all(map(is_running, below))
    starting.kill()
    starting.wait()
    wait_for(lambda: not any(map(is_running, below)), 10)


def test_ctrl_c_answers_while_vllm_starts(starting):
    """vLLM's own start passes over it, and may wait for an engine that has gone for ten minutes."""
    wait_for(lambda: len(descendants(starting.pid)) > 1, 120)
    time.sleep(1)
    below = descendants(starting.pid)
    os.killpg(starting.pid, signal.SIGINT)
    wait_for(lambda: starting.poll() is not None, 30)
    assert "ready" not in starting.stdout.read()
    wait_for(lambda: not any(map(is_running, below)), 10)
