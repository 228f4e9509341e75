"""`snpatch serve` under vLLM's serving benchmark, and the overhead of HTTP over the offline engine: `make bench-serve`.

Patched requests are compared with plain requests to the same server and with vLLM's server at the same and at twice
the concurrency. Why the client of `vllm bench serve` is called in this process: its command line requires a package
named vllm, and vLLM's build for CPUs has another name. Servers take turns, as in bench_generate.py; prompts are new in
every run. On a CPU, client, HTTP server and engine share the cores.
"""

import argparse
import asyncio
import statistics
import time
from functools import partial
from itertools import count
from pathlib import Path

import aiohttp
import pytest
from bench_generate import COMMON, NEW, PATCH, PROMPT, RANKING, ROUNDS, SIZE, K, about, folder, prompts  # noqa: F401
from served import Server

from snpatch import Engine, Sampling

CONCURRENCY = (1, 8, 32)
WAVES = 4  # requests per run, as a multiple of the concurrency
FEW = max(3, ROUNDS // 2)
METRICS = ("request_throughput", "median_ttft_ms", "median_tpot_ms", "p99_ttft_ms", "p99_tpot_ms")
WAIT_S = 600
SERVED, NATIVE = ("-m", "snpatch.cli", "serve"), ("-m", "vllm.entrypoints.openai.api_server")
_seeds = count()


def flags(max_model_len: int) -> list[str]:
    """Return COMMON as command-line flags."""
    words = [f"--max-model-len={max_model_len}", "--no-enable-log-requests", "--disable-uvicorn-access-log"]
    words += ["--load-format=dummy"] if SIZE == "7b" else []
    for name, value in COMMON.items():
        flag = name.replace("_", "-")
        words.append((f"--{flag}" if value else f"--no-{flag}") if isinstance(value, bool) else f"--{flag}={value}")
    return words


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):  # noqa: F811
    RANKING.save(folder / "ranking.safetensors")
    pair = [f"-asft={folder / 'sft'}", f"-adpo={folder / 'sft'},{folder / 'dpo'}"]
    patch_options = [
        f"--ranking=ranking={folder / 'ranking.safetensors'}",
        f"--patch=patched=recipient=sft,donor=dpo,ranking=ranking,k={K}",
    ]
    words = [str(folder / "model"), *pair, *patch_options, *flags(512)]
    server = Server(tmp_path_factory.mktemp("served"), *words, program=SERVED, wait_s=WAIT_S)
    yield server
    server.end()


@pytest.fixture(scope="module")
def native(folder, tmp_path_factory):  # noqa: F811
    words = ["--model", str(folder / "model"), "--dtype", "bfloat16", *flags(513)]
    server = Server(tmp_path_factory.mktemp("native"), *words, program=NATIVE, wait_s=WAIT_S)
    yield server
    server.end()


def bench_serve(server: Server, model: str, tokenizer: Path, concurrency: int) -> dict:
    """Run `vllm bench serve` once and return its metrics."""
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    n = WAVES * concurrency
    args = parser.parse_args(
        f"""--backend openai --base-url {server.url} --model {tokenizer} --served-model-name {model}
        --dataset-name random --random-input-len {PROMPT} --random-output-len {NEW} --num-prompts {n} --ignore-eos
        --max-concurrency {concurrency} --seed {next(_seeds)} --temperature 0 --disable-tqdm
        --ready-check-timeout-sec 0""".split()
    )
    result = main(args)
    assert result["completed"] == n
    return {name: result[name] for name in METRICS}


@pytest.mark.parametrize("concurrency", CONCURRENCY)
def test_patched_against_plain_and_native(benchmark, folder, served, native, concurrency):  # noqa: F811
    """Ratios are of request throughputs in adjacent runs."""
    tokenizer, native_name = folder / "model", str(folder / "model")
    sides = {
        "served patched": partial(bench_serve, served, "patched", tokenizer, concurrency),
        "served plain": partial(bench_serve, served, "base", tokenizer, concurrency),
        "native server 2B": partial(bench_serve, native, native_name, tokenizer, 2 * concurrency),
        "native server B": partial(bench_serve, native, native_name, tokenizer, concurrency),
    }
    results: dict[str, list[dict]] = {name: [] for name in sides}

    def turn():
        for name, run in sides.items():
            results[name].append(run())

    benchmark.pedantic(turn, rounds=FEW, iterations=1, warmup_rounds=1)
    patched = [result["request_throughput"] for result in results["served patched"][1:]]
    for name in sides.keys() - {"served patched"}:
        ratios = [p / baseline["request_throughput"] for p, baseline in zip(patched, results[name][1:], strict=True)]
        if name == "native server 2B":
            ratios = [2 * ratio for ratio in ratios]  # it serves two requests while a patched one runs two rows
        low, middle, high = statistics.quantiles(ratios, n=4)
        benchmark.extra_info[name] = {"ratio": middle, "q1": low, "q3": high}
    figures = {
        name: {key: statistics.median(run[key] for run in runs[1:]) for key in METRICS}
        for name, runs in results.items()
    }
    benchmark.extra_info.update(**about(), side="served", batch=concurrency, prompt=PROMPT, new=NEW, figures=figures)


def test_http_overhead(benchmark, folder, served):  # noqa: F811
    """Seconds per request over HTTP, 32 at a time, without streaming, minus those of the offline engine."""
    concurrency, n = 32, 128
    adapters = {"sft": folder / "sft", "dpo": [folder / "sft", folder / "dpo"]}
    body = {"model": "patched", "max_tokens": NEW, "temperature": 0, "ignore_eos": True}

    async def send_all(token_ids) -> None:
        waiting = iter(token_ids)

        async def client(session):
            for ids in waiting:
                async with session.post(f"{served.url}/v1/completions", json={**body, "prompt": ids}) as answer:
                    assert (await answer.json())["usage"]["completion_tokens"] == NEW

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
            await asyncio.gather(*(client(session) for _ in range(concurrency)))

    options = {**COMMON, "max_num_seqs": concurrency, "max_model_len": 512}
    options |= {"load_format": "dummy"} if SIZE == "7b" else {}
    with Engine(folder / "model", adapters, backend="vllm", **options) as engine:
        http, offline = [], []

        def turn():
            start = time.perf_counter()
            asyncio.run(send_all(prompts(n)))
            http.append(time.perf_counter() - start)
            start = time.perf_counter()
            engine.generate(prompts(n), PATCH, Sampling(max_tokens=NEW, ignore_eos=True))
            offline.append(time.perf_counter() - start)

        benchmark.pedantic(turn, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    overhead_ms = [1e3 * (a - b) / n for a, b in zip(http[1:], offline[1:], strict=True)]
    low, middle, high = statistics.quantiles(overhead_ms, n=4)
    benchmark.extra_info.update(
        **about(), side="http", batch=concurrency, new=NEW, requests=n, added_ms=middle, added_q1=low, added_q3=high,
        offline_ms=1e3 * statistics.median(offline[1:]) / n,
    )  # fmt: skip
