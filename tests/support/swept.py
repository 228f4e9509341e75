"""Small sweep on the golden model, and processes that run it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from commands import GOLDEN

from snpatch import Engine, Ranking, Sampling
from snpatch.data import load_dataset
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep import sweep

GREEDY = Sampling(max_tokens=6)
CONFIG = SweepConfig(  # without readings, whose last digits depend on the batch
    ("sft",), "dpo", (0, 70, 300), controls=1, extra_controls=(), coherence=False, sampling=GREEDY, resamples=50
)
LONG = replace(CONFIG, windows=tuple(range(0, 301, 30)))  # what the processes below run
ADAPTERS = {"sft": GOLDEN / "adapters/sft", "dpo": [GOLDEN / "adapters/sft", GOLDEN / "adapters/dpo"]}


def judge(prompts, completions):
    """Return scores that depend only on the completion."""
    return [sum(map(ord, completion)) % 97 / 10 for completion in completions]


def start(**options) -> Engine:
    return Engine(GOLDEN / "model", ADAPTERS, backend="transformers", template="tulu", **options)


def run(engine, prompts, ranking, folder=None, config=CONFIG, judges=None, **arguments):
    return sweep(engine, prompts, {"safety": ranking}, judges or {"cost": judge}, config, store=folder, **arguments)


class Forks:
    """Process with a loaded engine; forks of it run the sweep into a folder."""

    def __init__(self, prompts: Path, ranking: Path) -> None:
        paths = os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))
        command = [sys.executable, __file__, str(prompts), str(ranking)]
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def start(self, folder: Path) -> int:
        """Start a fork, and return its process number."""
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> str:
        """Wait for the fork, and return its number of records (empty if it was killed)."""
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


def _serve(prompts: str, ranking: str) -> None:
    engine, chats = start(batch_size=2, device="cpu"), load_dataset(prompts).prompts
    neuron_ranking = Ranking.load(ranking)
    for folder in map(str.strip, sys.stdin):
        read_end, write_end = os.pipe()
        if not (pid := os.fork()):
            os.write(write_end, str(len(run(engine, chats, neuron_ranking, folder, LONG).records)).encode())
            os._exit(0)
        print(pid, flush=True)
        os.close(write_end)
        os.waitpid(pid, 0)
        print(os.read(read_end, 100).decode(), flush=True)
        os.close(read_end)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
