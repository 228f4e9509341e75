"""Patched generation and contrasts inside vLLM against native vLLM and against hooks: `make bench-generate`.

SNPATCH_BENCH_SIZE: tiny, 160m (default on a CPU), 1b, 7b (default on a GPU; random weights made by vLLM), rehearsal
(smallest, for bench/gpu_check.py --rehearse). Why two engines take turns: a drift of the machine affects both equally;
a ratio is the median of the ratios of adjacent runs. Prompts are new in every run, so nothing is read from the prefix
cache. VLLM_USE_V2_MODEL_RUNNER selects the model runner of both engines.

A patched token is two rows, the recipient's and the donor's: "native 2B" runs the same number of rows as "twin B".
"""

import gzip
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import geometry
import pytest
import torch
import trace_events
from hooked import Hooked

from snpatch import Engine, Patch, Ranking, Sampling
from snpatch.executors.base import Observation
from snpatch.ranking.contrast_statistics import Statistics

GPU = torch.cuda.is_available()
SIZE = os.environ.get("SNPATCH_BENCH_SIZE", "7b" if GPU else "160m")
LAYERS, NEURONS = geometry.SIZES[SIZE]["num_hidden_layers"], geometry.SIZES[SIZE]["intermediate_size"]
IS_REHEARSAL = SIZE == "rehearsal"
BATCHES = [1, 3] if IS_REHEARSAL else [1, 8, 32, 64, 128, 256] if GPU else [1, 4, 16, 32]
PROMPT, NEW = 32, 16 if IS_REHEARSAL else 128 if GPU else 48
# (prompt, new) of batches whose full-length sequences would not fit into both caches on a card of 80 GB
SHORTER = {128: (8, 112), 256: (8, 56)} if GPU else {}
ROUNDS = int(os.environ.get("SNPATCH_BENCH_ROUNDS", 11))
K = LAYERS * NEURONS // 20


def random_ranking(layers: int, neurons: int) -> Ranking:
    order = torch.randperm(layers * neurons, generator=torch.Generator().manual_seed(0))
    return Ranking.from_order(torch.stack([order // neurons, order % neurons], dim=1), (layers, neurons))


RANKING = random_ranking(LAYERS, NEURONS)
PAIR = "sft", "dpo"
PATCH = Patch(*PAIR, RANKING, K)
CACHE_BYTES = {"rehearsal": 64 << 20, "tiny": 128 << 20, "160m": 2 << 30, "1b": 4 << 30, "7b": 17 << 30}[SIZE]
COMMON = {"kv_cache_memory_bytes": CACHE_BYTES, "max_num_seqs": 512, "enforce_eager": not GPU}
# vLLM requires this fraction of the card's memory to be free at startup, even with kv_cache_memory_bytes.
COMMON |= {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.3} if GPU else {"max_num_batched_tokens": 4096}
if GPU:  # only the batches of these benches: graphs for all of vLLM's 50 sizes take half a minute per engine
    COMMON["compilation_config"] = {"cudagraph_capture_sizes": [2**i for i in range(10)]}
PROFILED_AFTER, PROFILED = 5, 6  # steps; a completion of the rehearsal has 16
_draw = torch.Generator().manual_seed(1)


def prompts(n: int, length: int = PROMPT, words: int = geometry.SIZES[SIZE]["vocab_size"]) -> list[list[int]]:
    return torch.randint(3, words, (n, length), generator=_draw).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    geometry.make(SIZE, home, weights=SIZE != "7b")
    return home


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Return the folder of each engine's profiler, which runs only while a test starts it."""
    return {side: tmp_path_factory.mktemp(side) for side in ("twin", "native")}


def profiler(folder: Path):
    from vllm.config import ProfilerConfig

    return ProfilerConfig(
        profiler="torch",
        torch_profiler_dir=str(folder),
        torch_profiler_with_stack=False,
        delay_iterations=PROFILED_AFTER,
        max_iterations=PROFILED,
    )


@pytest.fixture(scope="module")
def twin(folder, traces):
    adapters = {"sft": folder / "sft", "dpo": [folder / "sft", folder / "dpo"]}
    options = {"max_model_len": 512, "profiler_config": profiler(traces["twin"]), **COMMON}
    options |= {"load_format": "dummy"} if SIZE == "7b" else {}
    with Engine(folder / "model", adapters, backend="vllm", **options) as engine:
        assert_correct(engine, folder, adapters)
        yield engine


def assert_correct(engine, folder, adapters) -> None:
    """Assert that the engine computes what it should.

    A model patched with all neurons of the donor gives the donor's log-probabilities; and patched log-probabilities
    equal the transformers executor's, if the weights are on disk.
    """
    ids, full_patch = prompts(4), Patch("sft", "dpo", RANKING, len(RANKING))
    for actual, expected in zip(engine.logprobs(ids, full_patch), engine.logprobs(ids, "dpo"), strict=True):
        assert (actual.values - expected.values).abs().max() < 0.1
    if SIZE != "7b":
        with Engine(folder / "model", adapters, backend="transformers") as reference:
            for actual, expected in zip(engine.logprobs(ids, PATCH), reference.logprobs(ids, PATCH), strict=True):
                assert (actual.values - expected.values).abs().mean() < 0.05


@pytest.fixture(scope="module")
def native(folder, traces):
    from vllm import LLM

    options = {"max_model_len": 513, "profiler_config": profiler(traces["native"]), **COMMON}
    options |= {"load_format": "dummy"} if SIZE == "7b" else {}
    return LLM(str(folder / "model"), dtype="bfloat16", disable_log_stats=True, **options)


def get_runner(native) -> str:
    return "v2" if native.llm_engine.vllm_config.use_v2_model_runner else "v1"


def run_twin(twin, batch: int, patch=PATCH, lengths: int | list[int] = NEW, prompt: int = PROMPT) -> None:
    lengths = [lengths] * batch if isinstance(lengths, int) else lengths
    samplings = [Sampling(max_tokens=n, ignore_eos=True) for n in lengths]
    completions = twin.generate(prompts(batch, prompt), patch, samplings)
    assert [len(completion.token_ids) for completion in completions] == lengths


def run_native(native, batch: int, new: int = NEW, prompt: int = PROMPT) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    inputs = [{"prompt_token_ids": ids} for ids in prompts(batch, prompt)]
    results = native.generate(inputs, params, use_tqdm=False)
    assert all(len(result.outputs[0].token_ids) == new for result in results)


def time_with_baselines(benchmark, name: str, run, baselines: dict, rounds: int = ROUNDS, **info) -> None:
    """Time `run`, and each baseline before each round of it.

    Ratios are baseline seconds / seconds of `run`.
    """
    seconds: dict[str, list[float]] = {baseline: [] for baseline in baselines}
    run_seconds: list[float] = []

    def take_turns():
        for baseline, call in baselines.items():
            start = time.perf_counter()
            call()
            seconds[baseline].append(time.perf_counter() - start)

    def time_run():
        start = time.perf_counter()
        run()
        run_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(time_run, setup=take_turns, rounds=rounds, iterations=1, warmup_rounds=1)
    for baseline, times in seconds.items():
        ratios = [t / o for t, o in zip(times[1:], run_seconds[1:], strict=True)]  # without the warm-up
        low, middle, high = statistics.quantiles(ratios, n=4)
        quartiles = {"ratio": middle, "q1": low, "q3": high}
        benchmark.extra_info[baseline] = {"median_s": statistics.median(times[1:]), **quartiles}
    benchmark.extra_info.update({**about(), "side": name, "prompt": PROMPT, "new": NEW, **info})


def about() -> dict:
    """Return size and device for a record; the tests add the model runner."""
    return {"size": SIZE, "device": "cuda" if GPU else "cpu", "card": torch.cuda.get_device_name() if GPU else None}


def against_native(benchmark, twin, native, name: str, sides: dict[str, int], run, new: int, prompt: int, **info):
    """Time `run` against native vLLM with each number of requests in `sides`, both on one model runner."""
    runner = twin.executor.worker_info.runner
    assert runner == get_runner(native), "the two sides run different model runners"
    baselines = {side: lambda n=n: run_native(native, n, new, prompt) for side, n in sides.items()}
    time_with_baselines(benchmark, name, run, baselines, runner=runner, new=new, prompt=prompt, **info)


@pytest.mark.parametrize("batch", BATCHES)
def test_twin_against_native(benchmark, twin, native, batch):
    prompt, new = SHORTER.get(batch, (PROMPT, NEW))
    sides = {"native 2B": 2 * batch, "native B": batch}
    run = partial(run_twin, twin, batch, PATCH, new, prompt)
    against_native(benchmark, twin, native, "twin", sides, run, new, prompt, batch=batch)


@pytest.mark.parametrize("batch", BATCHES[-2:])
def test_plain_requests_on_a_twin_engine(benchmark, twin, native, batch):
    prompt, new = SHORTER.get(batch, (PROMPT, NEW))
    run = partial(run_twin, twin, batch, "base", new, prompt)
    against_native(benchmark, twin, native, "plain on twin", {"native 2B": 2 * batch}, run, new, prompt, batch=batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_native_alone(benchmark, native, batch):
    prompt, new = SHORTER.get(batch, (PROMPT, NEW))
    rounds = max(2, ROUNDS // 2)
    benchmark.pedantic(run_native, (native, batch, new, prompt), rounds=rounds, iterations=1, warmup_rounds=1)
    speed = batch * new / benchmark.stats.stats.median
    benchmark.extra_info.update(
        **about(), side="native", runner=get_runner(native), batch=batch, prompt=prompt, new=new, tokens_per_s=speed
    )


def test_prefill(benchmark, twin, native):
    """Prefill, with one generated token: compute-bound, so the second stream costs its arithmetic."""
    batch, prompt = (4, 100) if IS_REHEARSAL else (32, 400)
    sides = {"native 2B": 2 * batch, "native B": batch}
    run = partial(run_twin, twin, batch, PATCH, 1, prompt)
    against_native(benchmark, twin, native, "prefill", sides, run, 1, prompt, batch=batch)


def test_windows(benchmark, twin):
    """32 different windows in one batch against one window for all requests."""
    patches = [Patch("sft", "dpo", RANKING, (i, i + K)) for i in range(32)]
    baselines = {"one window": lambda: run_twin(twin, 32)}
    runner = twin.executor.worker_info.runner
    time_with_baselines(
        benchmark, "32 windows", lambda: run_twin(twin, 32, patches), baselines, batch=32, runner=runner
    )


def test_statistics(benchmark, twin):
    """Statistics of every position of a batch against no statistics."""

    def run(observes):
        sampling = Sampling(max_tokens=NEW, ignore_eos=True)
        statistics = Statistics.zeros(LAYERS, NEURONS)
        observe = Observation(statistics, 0, 10**6) if observes else None
        twin.execute([twin.requests.observing(ids, PAIR, observe, sampling=sampling) for ids in prompts(32)])
        assert (statistics.count == (32 * (PROMPT + NEW - 1) if observes else 0)).all()

    baselines = {"without": lambda: run(False)}
    time_with_baselines(
        benchmark, "statistics", lambda: run(True), baselines, batch=32, runner=twin.executor.worker_info.runner
    )


@pytest.mark.parametrize(
    ("batch", "lengths"), [(4, "static"), (32, "ragged"), (32, "static")], ids=["B4", "B32-ragged", "B32-static"]
)
def test_against_hooks(benchmark, twin, folder, batch, lengths):
    """Compare with two transformers models with hooks.

    Both sides have the same neurons, prompts and threads, and the same weights if these are on disk.
    """
    if SIZE == "7b" and not GPU:
        pytest.skip("7b has no weights on disk; drawing them twice needs a GPU")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    adapters = [folder / "sft"], [folder / "sft", folder / "dpo"]
    hooked = Hooked(folder / "model", *adapters, RANKING.top(K), "cuda" if GPU else "cpu")
    num_tokens = [NEW] * batch if lengths == "static" else [8 + 120 * i // (batch - 1) for i in range(batch)]
    baselines = {"hooks": lambda: hooked.generate(prompts(batch), num_tokens)}
    time_with_baselines(
        benchmark,
        "twin",
        lambda: run_twin(twin, batch, PATCH, num_tokens),
        baselines,
        max(3, ROUNDS // 2),
        batch=batch,
        lengths=lengths,
        runner=twin.executor.worker_info.runner,
    )


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *(p for child in children for p in processes(int(child)))]


@pytest.fixture(scope="module")
def filled_cache(twin):
    """Fill the whole KV cache once.

    Its memory is reserved at startup but resident only after its first use.
    """
    token = 2 * 2 * 2 * LAYERS * geometry.SIZES[SIZE]["hidden_size"]  # two streams, keys and values, bfloat16
    sequences = prompts(1 + CACHE_BYTES // token // 250, 250)
    twin.execute([twin.requests.observing(ids, PAIR, None) for ids in sequences])


@pytest.mark.parametrize("positions", [10**3, 10**4, 10**5, 10**6])
def test_contrast(benchmark, twin, filled_cache, positions):
    """Positions per second when both models read given texts, and the growth of all processes' memory."""
    if SIZE in ("160m", "1b", "rehearsal") and not GPU and positions > 10**4:
        pytest.skip("takes minutes on a CPU: SNPATCH_BENCH_SIZE=tiny goes to 10^6")
    length = 250
    texts = prompts(positions // length, length)
    process_ids = processes(os.getpid())
    before = sum(map(resident_bytes, process_ids))

    def run():
        statistics = Statistics.zeros(LAYERS, NEURONS)
        twin.execute([twin.requests.observing(ids, PAIR, Observation(statistics, 0, length)) for ids in texts])
        assert (statistics.count == len(texts) * length).all()

    benchmark.pedantic(run, rounds=1 if positions > 10**4 else 3, iterations=1)
    grown = sum(map(resident_bytes, process_ids)) - before
    benchmark.extra_info.update(
        **about(), side="contrast", runner=twin.executor.worker_info.runner, positions=len(texts) * length,
        positions_per_s=len(texts) * length / benchmark.stats.stats.median, grown_bytes=grown,
        stored_bytes=2 * 4 * LAYERS * NEURONS * len(texts) * length,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["twin", "native 2B", "native B"])
def test_profile(request, benchmark, traces, side):
    """Profile of a decode step by vLLM's profiler. Last in this file, because its engines stay annotated."""
    batch = (3 if IS_REHEARSAL else 32) * (2 if side == "native 2B" else 1)
    name = "twin" if side == "twin" else "native"
    engine = request.getfixturevalue(name)

    def run(new: int = NEW) -> None:
        run_twin(engine, batch, PATCH, new) if side == "twin" else run_native(engine, batch, new)

    profiled = engine.executor.engine if side == "twin" else engine.llm_engine
    runner = engine.executor.worker_info.runner if side == "twin" else get_runner(engine)
    before = set(traces[name].glob("*.json.gz"))

    def profile():
        profiled.start_profile()
        run()
        profiled.stop_profile()

    benchmark.pedantic(profile, rounds=1, iterations=1)
    (trace_file,) = set(traces[name].glob("*.json.gz")) - before
    with gzip.open(trace_file, "rt") as file:
        events = json.load(file)["traceEvents"]
    try:
        steps = trace_events.decode_steps(events, "kernel" if GPU else "cpu_op")
    except trace_events.NoKernelsError as error:
        steps = {"step_us": step_us(run), "busy_us": 0.0, "groups_us": {}, "top": [], "no_kernels": str(error)}
    benchmark.extra_info.update(**about(), side=f"profile of {side}", runner=runner, batch=batch, **steps)


def step_us(run, rounds: int = 5) -> float:
    """Return the microseconds of a decode step without a profiler.

    They are computed from the time of the completions' second half.
    """
    halves = []
    for _ in range(rounds):
        seconds = []
        for new in (NEW, NEW // 2):
            start = time.perf_counter()
            run(new)
            seconds.append(time.perf_counter() - start)
        halves.append(1e6 * (seconds[0] - seconds[1]) / (NEW - NEW // 2))
    return statistics.median(halves)
