"""`snpatch serve` under attack: completions, memory of each process, and `/health`: `make bench-attack`.

The attack is bench/attackers.py, in a separate process; SNPATCH_BENCH_REQUESTS shortens it. Server, attack and this
process share the machine's cores, so the times of `/health` include waiting for a core. `/health` is requested at a
fixed rate: a slow answer does not delay the next request.
"""

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace

import aiohttp
import attackers
import numpy as np
import psutil
import pytest
import tiny
from jobs import RANKINGS, VALUES, oracle_completion
from processes import wait_for
from served import Server
from serving import CAPACITY_OPTIONS, CONSTANTS, SERVED, patch_json, serve_options

from snpatch import Constant

REQUESTS = int(os.environ.get("SNPATCH_BENCH_REQUESTS", 30_000))
EVERY = max(1, min(100, REQUESTS // 100))  # requests between two samples of the processes
RECORD_EVERY = 10  # samples; the others are not written to the record
HEALTH_S = 0.05  # between two requests of /health
KNOWN = SERVED[:20]
MEAN, STD = 0.5 * VALUES, 0.2 * VALUES.abs()
MOMENTS = {"recipient_mean": MEAN, "recipient_std": STD, "donor_mean": -MEAN, "donor_std": 2 * STD}
PROCESS = "VLLM::"  # prefix of the titles of vLLM's processes
MB = 1e6


@pytest.fixture
def tiny_model(tmp_path):
    """Write the tiny model and its server's files."""
    tiny_model = tiny.make("llama", tmp_path)
    for name, ranking in zip(("first", "second"), RANKINGS, strict=True):
        replace(ranking, moments=MOMENTS).save(tmp_path / f"{name}.safetensors")
    for name, values in CONSTANTS.items():
        Constant(values).save(tmp_path / f"{name}.safetensors")
    return tiny_model


@pytest.fixture
def server(tiny_model, tmp_path):
    server = Server(tmp_path, *serve_options(tiny_model, tmp_path), *CAPACITY_OPTIONS, wait_s=600)
    yield server
    assert server.end() == 0, server.read_log()


def test_attack(benchmark, tiny_model, server):
    bodies = [
        {"model": "base", "prompt": job.ids, "max_tokens": 10, "temperature": 0, "return_token_ids": True}
        | {"snpatch": patch_json(job)}
        for job in KNOWN
    ]
    expected = [(body, oracle_completion(tiny_model, job).ids) for body, job in zip(bodies, KNOWN, strict=True)]
    assert_exact(server, expected)
    watch = Watch(server)
    benchmark.pedantic(lambda: asyncio.run(watch.run(expected)), rounds=1, iterations=1)
    wait_for(lambda: not any(server.count_resources().values()), 60)
    assert_exact(server, expected)
    assert not watch.results["faults"], watch.results["faults"]
    assert all(process.is_running() for process in watch.processes.values()), server.read_log()
    watch.sample(REQUESTS)
    benchmark.extra_info.update(
        side="attack", requests=REQUESTS, clients=attackers.CLIENTS, slow_sockets=attackers.SLOW_SOCKETS,
        cores=len(os.sched_getaffinity(0)), known=len(expected), held=server.count_resources(),
        health=watch.health(), **watch.results,
        processes={name: summarize(samples) for name, samples in watch.samples.items()},
    )  # fmt: skip


def assert_exact(server: Server, expected: list[tuple[dict, list[int]]]) -> None:
    for body, ids in expected:
        answer = server.post(attackers.COMPLETIONS, body).json()
        assert answer["choices"][0]["token_ids"] == ids, body
        assert answer["snpatch"]["verified"] is True


class Watch:
    """Samples of a server's processes and times of its `/health` during an attack. results: of the attack."""

    def __init__(self, server: Server) -> None:
        self._server, api = server, psutil.Process(server.process.pid)
        titles = {child.cmdline()[0]: child for child in api.children(recursive=True) if child.cmdline()}
        children = {title.removeprefix(PROCESS): p for title, p in titles.items() if title.startswith(PROCESS)}
        self.processes = {"API server": api, **children}
        self.samples: dict[str, list[dict]] = {name: [] for name in self.processes}
        self.results: dict = {}
        self._health_s: list[float] = []

    async def run(self, expected: list[tuple[dict, list[int]]]) -> None:
        self.sample(0)
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": 2**24}
        attack = await asyncio.create_subprocess_exec(sys.executable, attackers.__file__, **pipes)
        order = {"url": self._server.url, "requests": REQUESTS, "every": EVERY, "known": expected}
        attack.stdin.write(json.dumps(order).encode())
        attack.stdin.write_eof()
        polling = asyncio.create_task(self._poll_health())
        async for line in attack.stdout:
            if line.startswith(b"{"):
                self.results = json.loads(line)
            else:
                await asyncio.to_thread(self.sample, int(line))
        assert await attack.wait() == 0
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling

    def sample(self, requests: int) -> None:
        for name, process in self.processes.items():
            memory = process.memory_full_info()
            self.samples[name].append(
                {"requests": requests, "rss_mb": memory.rss / MB, "pss_mb": memory.pss / MB}
                | {"descriptors": process.num_fds(), "threads": process.num_threads()}
            )

    def health(self) -> dict[str, float]:
        median, p99, worst = (1e3 * np.quantile(self._health_s, (0.5, 0.99, 1))).tolist()
        return {"asked": len(self._health_s), "median_ms": median, "p99_ms": p99, "worst_ms": worst}

    async def _poll_health(self) -> None:
        async with aiohttp.ClientSession(self._server.url) as session, asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._time_health(session))
                await asyncio.sleep(HEALTH_S)

    async def _time_health(self, session: aiohttp.ClientSession) -> None:
        start = time.perf_counter()
        async with session.get("/health") as answer:
            assert answer.status == 200
        self._health_s.append(time.perf_counter() - start)


def summarize(samples: list[dict]) -> dict:
    """Return a process's samples and the least-squares growth of its memory in MB per 1,000 requests."""
    during = samples[1:-1]  # under load
    fits = {
        f"{kind}_{name}": _fit_slope(part, f"{kind}_mb")
        for kind in ("rss", "pss")
        for name, part in {"all": during, "second_half": during[len(during) // 2 :]}.items()
    }
    growth, errors = ({name: fit[i] for name, fit in fits.items()} for i in range(2))
    ends = {"before": samples[0], "after": samples[-1]}
    return {"growth_mb": growth, "growth_error_mb": errors, **ends, "samples": during[::RECORD_EVERY]}


def _fit_slope(samples: list[dict], key: str) -> tuple[float, float]:
    """Return the slope of a sampled value per 1,000 requests and its standard error."""
    requests = [s["requests"] / 1000 for s in samples]
    slopes, covariance = np.polyfit(requests, [s[key] for s in samples], 1, cov=True)
    return float(slopes[0]), float(np.sqrt(covariance[0, 0]))
