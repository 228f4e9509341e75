"""One engine with secondary weights against two native engines, and one stream against native: `make bench-pair`.

The pair engine generates B patched completions. The two native engines, which take turns with it, generate B
completions each, one engine after the other: the same models without snpatch and without a patch. Sizes: see
bench_generate.py.
"""

from contextlib import contextmanager
from functools import partial

import geometry
import pytest
from bench_generate import (
    BATCHES,
    COMMON,
    IS_REHEARSAL,
    PROMPT,
    RANKING,
    SIZE,
    K,
    get_runner,
    run_native,
    run_twin,
    time_with_baselines,
)

from snpatch import Engine, Patch

SHOWN = BATCHES if IS_REHEARSAL else [b for b in BATCHES if 4 <= b <= 64]
PATCH = Patch("base", "dpo", RANKING, K)
OPTIONS = {"max_model_len": 512, **COMMON} | ({"load_format": "dummy"} if SIZE == "7b" else {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return two models of one shape with independent random weights."""
    homes = [tmp_path_factory.mktemp(name) for name in ("recipient", "donor")]
    return [geometry.make(SIZE, home, weights=SIZE != "7b", draw=draw) for draw, home in enumerate(homes)]


@pytest.fixture(scope="class")
def pair(folders):
    recipient, donor = folders
    with Engine(recipient, models={"dpo": donor}, backend="vllm", **OPTIONS) as engine:
        if SIZE != "7b":
            assert_correct(engine, folders)
        yield engine


def assert_correct(engine, folders) -> None:
    """Assert that patched log-probabilities equal the transformers executor's."""
    prompts = [[(7 * i + 3 * j) % 500 + 3 for j in range(PROMPT)] for i in range(4)]
    with Engine(folders[0], models={"dpo": folders[1]}, backend="transformers") as reference:
        for patch in (PATCH, "base", "dpo"):
            actual, expected = engine.logprobs(prompts, patch), reference.logprobs(prompts, patch)
            for actual_row, expected_row in zip(actual, expected, strict=True):
                assert (actual_row.values - expected_row.values).abs().mean() < 0.05


@contextmanager
def native_engines(folders):
    from vllm import LLM

    engines = [LLM(str(folder), dtype="bfloat16", disable_log_stats=True, **OPTIONS) for folder in folders]
    yield engines
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="class")
def natives(folders):
    with native_engines(folders) as engines:
        yield engines


@pytest.fixture(scope="class")
def native(folders):
    with native_engines(folders[:1]) as engines:
        yield engines[0]


@pytest.fixture(scope="class")
def one_stream(folders):
    with Engine(folders[0], backend="vllm", streams=1, **OPTIONS) as engine:
        yield engine


class TestPair:
    @pytest.mark.parametrize("batch", SHOWN)
    def test_pair_against_two_native_engines(self, benchmark, pair, natives, batch):
        def run_both():
            for native in natives:
                run_native(native, batch)

        run = partial(run_twin, pair, batch, PATCH)
        runner, memory = pair.executor.worker_info.runner, pair.executor.memory
        assert runner == get_runner(natives[0])
        time_with_baselines(
            benchmark,
            "pair",
            run,
            {"two natives": run_both},
            batch=batch,
            runner=runner,
            memory={
                "weights": memory.weights,
                "second": memory.secondary,
                "cache": memory.kv_cache,
                "twice": memory.duplicated,
            },
        )


class TestOneStream:
    """Only the two compared engines exist: four would disturb each other by more than they differ."""

    @pytest.mark.parametrize("batch", SHOWN)
    def test_one_stream_against_native(self, benchmark, one_stream, native, batch):
        run = partial(run_twin, one_stream, batch, "base")
        baselines = {"native B": lambda: run_native(native, batch)}
        time_with_baselines(
            benchmark, "one stream", run, baselines, batch=batch, runner=one_stream.executor.worker_info.runner
        )
