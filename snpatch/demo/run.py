"""`snpatch demo`: the main experiment on the demo world, from contrast to curve."""

from collections.abc import Callable
from pathlib import Path

from snpatch.data import load
from snpatch.demo import WORLD
from snpatch.engine import Engine
from snpatch.patch import Window
from snpatch.sampling import Sampling
from snpatch.score_model import ScoreModel
from snpatch.sweep import SweepConfig, SweepResult, sweep

SHARES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
SAMPLING = Sampling(max_tokens=32)
PROMPTS = 100
BATCH = 512


def run(out: Path, progress: Callable, backend: str = "auto") -> SweepResult:
    """Contrast SFT with DPO, save the ranking in `out`, sweep k for both recipients, judge by the world's cost model.

    progress: a context manager that takes a name and gives a Progress. backend: as Engine's.
    """
    adapters = {"sft": WORLD / "sft", "dpo": [WORLD / "sft", WORLD / "dpo"]}
    prompts = load(WORLD / "eval" / "beavertails.jsonl").first(PROMPTS).prompts
    judge = ScoreModel(WORLD / "cost", format="tulu", backend="transformers")
    with Engine(WORLD / "base", adapters, backend=backend, template="tulu", batch_size=BATCH) as engine:
        with progress("contrast") as report:
            ranking = engine.contrast(
                load(WORLD / "contrast.jsonl").prompts, "sft", "dpo", sampling=SAMPLING, progress=report
            )
        ranking.save(out / "ranking.safetensors")
        windows = tuple(Window(0, round(share * len(ranking))) for share in SHARES)
        config = SweepConfig(("sft", "base"), "dpo", windows, controls=3, sampling=SAMPLING)
        with progress("sweep") as report:
            return sweep(engine, prompts, {"safety": ranking}, judge, config, store=out, progress=report)
