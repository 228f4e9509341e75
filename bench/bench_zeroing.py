"""The cost of zeroing KV blocks before vLLM uses them again: `make bench-zeroing`.

Both sides are one engine in this process, with zeroing switched on and off. Their runs take turns, so that a drift of
the machine affects both. Prompts are new in every run: each run gets used blocks, and none is read from the prefix
cache. On a CPU the seconds inside the zeroing are summed as well, because the machine's noise does not affect them.
"""

import os
import statistics
import time

import geometry
import pytest
from bench_generate import GPU, PAIR, prompts, random_ranking, time_with_baselines
from in_process import in_process  # noqa: F401

from snpatch import Engine, Patch, Sampling

CACHE_BYTES = {"tiny": 64 << 20, "160m": 512 << 20}  # two batches, so that all blocks are used ones after a warm-up
BATCH, PROMPT, NEW = 16, 128, 64
PAIRS = int(os.environ.get("SNPATCH_BENCH_ROUNDS", 21))


class Zeroing:
    """Switchable replacement of the model runner's function that zeroes blocks; counts blocks and seconds."""

    def __init__(self, engine: Engine) -> None:
        runner = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        is_v1 = hasattr(runner, "_zero_block_ids")
        owner, name = (runner, "_zero_block_ids") if is_v1 else (runner.kv_block_zeroer, "zero_block_ids")
        self._zero = getattr(owner, name)
        self.is_on, self.blocks, self.seconds = True, 0, 0.0
        setattr(owner, name, self)

    def __call__(self, block_ids: list[int]) -> None:
        if self.is_on:
            start = time.perf_counter()
            self._zero(block_ids)
            self.seconds += time.perf_counter() - start
            self.blocks += len(block_ids)


class BatchGenerator:
    """An engine that generates batches with or without zeroing. shares: fraction of each run's time spent zeroing."""

    def __init__(self, size: str, engine: Engine) -> None:
        sizes = geometry.SIZES[size]
        layers, neurons = sizes["num_hidden_layers"], sizes["intermediate_size"]
        self.size, self.engine, self.zeroing = size, engine, Zeroing(engine)
        self.shares: list[float] = []
        self._words = sizes["vocab_size"]
        self._patch = Patch(*PAIR, random_ranking(layers, neurons), layers * neurons // 20)

    def draw(self) -> list[list[int]]:
        return prompts(BATCH, PROMPT, self._words)

    def generate(self, texts: list[list[int]], max_tokens: int, has_zeroing: bool) -> list[list[int]]:
        zeroing, blocks, seconds = self.zeroing, self.zeroing.blocks, self.zeroing.seconds
        zeroing.is_on = has_zeroing
        start = time.perf_counter()
        completions = self.engine.generate(texts, self._patch, Sampling(max_tokens=max_tokens, ignore_eos=True))
        if has_zeroing:
            self.shares.append((zeroing.seconds - seconds) / (time.perf_counter() - start))
        assert (zeroing.blocks > blocks) == has_zeroing
        return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module", params=CACHE_BYTES)
def writer(request, in_process, tmp_path_factory):  # noqa: F811
    """Yield the engine, after both sides generated the same completions."""
    size, folder = request.param, tmp_path_factory.mktemp(request.param)
    geometry.make(size, folder)
    adapters = {"sft": folder / "sft", "dpo": [folder / "sft", folder / "dpo"]}
    options = {"max_model_len": 256, "max_num_seqs": BATCH, "max_num_batched_tokens": 4096, "enforce_eager": not GPU}
    options |= {"kv_cache_memory_bytes": CACHE_BYTES[size]}
    options |= {"gpu_memory_utilization": 0.3} if GPU else {}  # vLLM requires this fraction to be free at startup
    with Engine(folder / "model", adapters, backend="vllm", **options) as engine:
        writer = BatchGenerator(size, engine)
        texts = writer.draw()
        zeroed = writer.generate(texts, NEW, True)
        engine.executor.engine.reset_prefix_cache()
        assert writer.generate(texts, NEW, False) == zeroed
        yield writer


@pytest.mark.parametrize("new", [NEW, 1], ids=["whole texts", "first tokens"])
def test_zeroing_against_none(benchmark, writer, new):
    """Compare with the same engine without zeroing.

    Ratios are of speeds; with one token, of the time until every prompt of the batch has its first token.
    """
    writer.shares.clear()
    baselines = {"no zeroing": lambda: writer.generate(writer.draw(), new, False)}
    sizes = {"size": writer.size, "batch": BATCH, "prompt": PROMPT, "new": new}
    time_with_baselines(
        benchmark, "zeroing", lambda: writer.generate(writer.draw(), new, True), baselines, PAIRS, **sizes
    )
    if not GPU:  # on a GPU zeroing runs asynchronously
        benchmark.extra_info["zeroing_share"] = statistics.median(writer.shares[1:])  # without the warm-up
