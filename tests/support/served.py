"""`snpatch serve` in its own process, with three further routes: what the workers hold, and workers that miscount or
overflow.

Run as a program it is the command line of snpatch, with these routes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch
from forked import forked_processes

# Routes of the tests.
RESOURCES, MISCOUNT, SPOIL = (f"/v1/snpatch/{name}" for name in ("resources", "miscount", "spoil"))
SERVE = (__file__, "serve")


class Server:
    """A running server. options: of `snpatch serve`, or of another program."""

    def __init__(self, folder: Path, *options: str, program: Sequence[str] = SERVE, wait_s: float = 180) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        words = [sys.executable, *program, *map(str, options), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if program is SERVE:
            environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its routes send functions to the workers
        with self._log.open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        end = time.monotonic() + wait_s
        while not self.is_up():
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < end, self.read_log()
            time.sleep(0.2)

    def read_log(self) -> str:
        """Return the server's log."""
        return self._log.read_text()

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, table: object, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=table, timeout=60, **options)

    def count_resources(self) -> dict[str, int]:
        """Return what the engine and its workers hold for requests, summed over workers."""
        return self.get(RESOURCES).json()

    def end(self, number: int = signal.SIGTERM, wait_s: float = 60) -> int:
        """Stop the server and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(wait_s)

    def is_up(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False


def count_worker_resources(worker) -> dict[str, int]:
    """Return, in a worker, what it holds for requests."""
    tracker = worker.model_runner.get_model().snpatch.tracker
    return {
        "records": len(tracker._records),
        "rows": len(tracker._rows),
        "tickets": len(tracker._tickets),
        "receipts": tracker.num_receipts,
        "captures": int(tracker._capture_used.sum()),
    }


def miscount(worker) -> None:
    """Toggle, in a worker, whether it reports one overwrite less than it did."""
    tracker = worker.model_runner.get_model().snpatch.tracker
    if "fetch" in vars(tracker):
        del tracker.fetch
        return
    fetch = tracker.fetch

    def fetch_less(tickets):
        records_by_worker = fetch(tickets)
        for record in (record for records in records_by_worker for record in records):
            record["overwrites"] -= record["overwrites"] > 0
        return records_by_worker

    tracker.fetch = fetch_less


def spoil(worker) -> None:
    """Make, in a worker, every completion overflow at layer 1."""
    worker.model_runner.get_model().snpatch.tables.layers[1].scale[:] = torch.inf


def main() -> None:
    from snpatch import cli
    from snpatch.server import routes as server_routes

    def build_router(state):
        routes, executor = plain_router(state), state.engine.executor

        @routes.get(RESOURCES)
        async def count_resources() -> dict:
            worker_counts = await executor.engine.collective_rpc(count_worker_resources)
            engine_counts = {**executor.slots.num_in_use, "waiting": executor.num_waiting, "sweeps": len(state.sweeps)}
            return engine_counts | {name: sum(counts[name] for counts in worker_counts) for name in worker_counts[0]}

        @routes.post(MISCOUNT)
        async def toggle() -> None:
            await executor.engine.collective_rpc(miscount)

        @routes.post(SPOIL)
        async def overflow() -> None:
            await executor.engine.collective_rpc(spoil)

        return routes

    plain_router, server_routes.build_router = server_routes.build_router, build_router
    with forked_processes():
        cli.program()


if __name__ == "__main__":
    main()
