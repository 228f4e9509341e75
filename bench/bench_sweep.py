"""Sweeps in vLLM: many windows against one, the cost of the store, a repeated sweep: `make bench-sweep`.

Sizes: see bench_generate.py. The store is measured on the demo model, whose completions are the fastest to generate.
"""

import functools
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from bench_generate import (  # noqa: F401 - fixtures
    GPU,
    IS_REHEARSAL,
    PAIR,
    RANKING,
    about,
    folder,
    prompts,
    random_ranking,
    time_with_baselines,
    traces,
    twin,
)

from snpatch import Engine, Patch, Sampling
from snpatch.data import load_dataset
from snpatch.experiments.config import load_experiment_config
from snpatch.judges.factory import open_judge
from snpatch.sweeps import generation
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.minimal import find_minimal
from snpatch.sweeps.queue import WorkQueue
from snpatch.sweeps.store import Store
from snpatch.sweeps.sweep import sweep

WINDOWS, PROMPTS, NEW = (4, 4, 8) if IS_REHEARSAL else (32, 64, 8)
MANY = 40 if IS_REHEARSAL else 10_000
ROUNDS = 2


def write(engine, patches, prompts) -> None:
    """Generate every patch on every prompt, as a sweep does."""
    sampling = Sampling(max_tokens=NEW, ignore_eos=True)
    items = [
        generation.CompletionTask(
            f"{number} {index}", index, "", 0, engine.requests.patched(ids, patch, sampling=sampling)
        )
        for number, patch in enumerate(patches)
        for index, ids in enumerate(prompts)
    ]
    with Store(None) as store:
        generation.generate_missing(engine, items, store)
        texts = store.texts([item.key for item in items])
    assert sum(len(text.token_ids) for text in texts.values()) == NEW * len(items)


def windows_in_one_batch(benchmark, engine, ranking, prompts, rounds, **info) -> None:
    """Time windows up to half of the neurons in one batch.

    The baselines are the same number of requests with one window, and one window after the other.

    prompts: function that returns n new ones.
    """
    ks = [round(len(ranking) * (i + 1) / (2 * WINDOWS)) for i in range(WINDOWS)]
    patches = [Patch(*PAIR, ranking, k) for k in ks]

    def one_after_the_other():
        chats = prompts(PROMPTS)
        for patch in patches:
            write(engine, [patch], chats)

    baselines = {
        "one window": lambda: write(engine, patches[:1], prompts(PROMPTS * WINDOWS)),
        "one after the other": one_after_the_other,
    }
    runner = engine.executor.worker_info.runner
    time_with_baselines(
        benchmark,
        "sweep",
        lambda: write(engine, patches, prompts(PROMPTS)),
        baselines,
        rounds=rounds,
        windows=WINDOWS,
        prompts=PROMPTS,
        new=NEW,
        runner=runner,
        **info,
    )


def test_windows(benchmark, twin):  # noqa: F811
    windows_in_one_batch(benchmark, twin, RANKING, prompts, ROUNDS)


def test_windows_of_the_demo(benchmark, demo):
    engine, _ = demo
    ranking = random_ranking(engine.geometry.n_layers, engine.geometry.n_neurons)
    draw_prompts = functools.partial(prompts, words=len(engine.tokenizer))
    windows_in_one_batch(benchmark, engine, ranking, draw_prompts, 5 * ROUNDS, size="demo", dtype="float32")


@pytest.fixture(scope="module")
def demo():
    experiment = load_experiment_config("demo")
    config = experiment.engine_config("vllm", **({} if GPU else {"enforce_eager": True}))
    with Engine.from_config(config) as engine:
        source = experiment.sets[experiment.benchmarks[0]]
        yield engine, load_dataset(experiment.resolve_path(source.source)).prompts


def judge(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_store_of_many_texts(benchmark, demo, tmp_path, monkeypatch):
    """CPU seconds in the store's methods during a sweep of MANY completions; then the same command again.

    Why not wall time: with an engine on all cores, the driver waits for a core in whatever it does.
    """
    engine, chats = demo
    spent, depth = Counter(), [0]

    def time_method(name, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            start, depth[0] = time.thread_time(), depth[0] + 1
            try:
                return method(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent[name] += time.thread_time() - start

        return call

    for owner, names in (
        (Store, ("add", "completions", "scores", "add_scores", "set_labels", "set_judges")),
        (WorkQueue, ("claim", "enqueue", "finish", "is_suspect", "num_missing", "errors")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, time_method(name, getattr(owner, name)))
    size = engine.geometry.n_layers * engine.geometry.n_neurons
    ranking = engine.contrast(chats[:20], "sft", "dpo", sampling=Sampling(max_tokens=16), exclude_layers=())
    n = max(1, MANY // len(chats))
    windows = tuple(1 + i * (size - 1) // n for i in range(n))
    config = SweepConfig(("sft",), "dpo", windows, controls=0, extra_controls=(), coherence=False, resamples=10,
                         sampling=Sampling(max_tokens=24))  # fmt: skip
    seconds = []

    def run():
        start = time.perf_counter()
        result = sweep(engine, chats, {"safety": ranking}, {"length": judge}, config, store=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert len(result.records) >= MANY - len(chats)

    run()
    store_s, by = sum(spent.values()), dict(spent)
    spent.clear()
    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update({**about(), "side": "again", "texts": MANY, "first_s": seconds[0],
                                 "store_s": store_s, "store_share": store_s / seconds[0], "store_by": by,
                                 "again_s": seconds[1]})  # fmt: skip


def test_readings(benchmark, demo, tmp_path):
    """Time in which both unpatched models read a sweep's completions, against that of generating them."""
    engine, chats = demo
    ranking = engine.contrast(chats[:20], "sft", "dpo", sampling=Sampling(max_tokens=16))
    ks = tuple(round(len(ranking) * i / 20) for i in range(3 if IS_REHEARSAL else 21))
    config = SweepConfig(("sft",), "dpo", ks, controls=0, extra_controls=(), coherence=False, resamples=10,
                         sampling=Sampling(max_tokens=24))  # fmt: skip
    start = time.perf_counter()
    sweep(engine, chats, {"safety": ranking}, {"length": judge}, config, store=tmp_path)
    generation_s = time.perf_counter() - start
    read = replace(config, coherence=True)
    result = benchmark.pedantic(
        sweep, (engine, chats, {"safety": ranking}, {"length": judge}, read), {"store": tmp_path}, rounds=1
    )
    assert all(len(record["logprobs"]) == 2 for record in result.records)
    info = {"side": "readings", "texts": len(result.records), "generation_s": generation_s}
    benchmark.extra_info.update({**about(), **info})


def test_minimal(benchmark, demo, tmp_path):
    """Search for the smallest k that recovers 90 %, and compare with the whole grid.

    The search does not reuse the grid's completions.
    """
    engine, chats = demo
    experiment = load_experiment_config("demo")
    arguments = dict(experiment.judges[experiment.cost])
    cost = open_judge(experiment.resolve_path(arguments.pop("source")), backend="transformers", **arguments)
    contrast = load_dataset(experiment.resolve_path(experiment.sets[experiment.safety.prompts].source)).prompts
    ranking = engine.contrast(contrast, "sft", "dpo", sampling=Sampling(max_tokens=experiment.contrast_tokens))
    ks = tuple(round(len(ranking) * i / 24) for i in range(25))
    config = SweepConfig(("sft", "base"), "dpo", ks, controls=0, extra_controls=(), coherence=False,
                         sampling=Sampling(max_tokens=experiment.max_tokens))  # fmt: skip
    grid = sweep(engine, chats, {"safety": ranking}, {"cost": cost}, config, store=tmp_path / "grid")

    def search():
        return find_minimal(engine, chats, {"safety": ranking}, cost, config, store=tmp_path / "search")

    for result in benchmark.pedantic(search, rounds=1):
        line = grid.line("cost", result.recipient, "safety")
        exact = next((row.rank_hi for row in line if row.effect is not None and row.effect >= 0.9), None)
        minimal = result.search
        record = {"k": minimal.k, "low": minimal.low, "high": minimal.high, "used": minimal.used, "full": minimal.full}
        benchmark.extra_info[result.recipient] = {**record, "rounds": minimal.rounds, "whole_grid": exact}
    benchmark.extra_info.update({**about(), "side": "minimal"})


def test_two_processes(benchmark, tmp_path):
    """Two processes on one folder against one, on all cores, including start and end."""
    size = 8 if IS_REHEARSAL else 40
    spec = {
        "config": "demo", "engine": {"enforce_eager": not GPU},
        "rankings": {"safety": {"recipient": "sft", "donor": "dpo", "prompts": "contrast"}},
        "sweep": {"recipients": ["sft"], "donors": ["dpo"], "windows": [16 * i for i in range(size)], "controls": 0,
                  "extra_controls": [], "coherence": False,
                  "sets": [load_experiment_config("demo").benchmarks[0]], "judges": ["cost"]},
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))

    def run(name, processes):
        command = [sys.executable, "-m", "snpatch.cli", "sweep", tmp_path / "spec.json", "-o", tmp_path / name]
        start = time.perf_counter()
        children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(processes)]
        assert [child.wait() for child in children] == [0] * processes
        return time.perf_counter() - start

    one_s = run("one", 1)
    benchmark.pedantic(run, args=("two", 2), rounds=1)
    benchmark.extra_info.update({**about(), "side": "two processes", "texts": (size + 2) * 100, "one_s": one_s})
