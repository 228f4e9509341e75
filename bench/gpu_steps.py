"""The steps of gpu_check.py as data, in order of value, with the requirements of each part.

A part is one child process. Its `rehearsal` is the replacement on a machine without a card, or the reason why there is
none. Why the rehearsed benches of one file share a child: engines start only once.
"""

import re
import sys
from dataclasses import dataclass, field, replace

GENERATE, PAIR, OP = "bench/bench_generate.py", "bench/bench_pair.py", "bench/bench_patched_glu.py"
KERNELS = "tests/op/test_patched_glu_native.py"
GRAPHS = "graph_capture or (equals and 688-2-silu-torch.bfloat16-triton)"
BENCHES = ["-s", "--benchmark-enable", "--benchmark-columns=median"]  # -s: keep vLLM's log
IN_CI = "CI runs these tests directly"
RUNNERS = {"v2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}  # attention's tl.dot would be TF32, and float32 tests allow 1e-4
# A rehearsal's engines wait for each other on few cores; spinning threads would occupy all of them.
SMALL = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **RUNNERS["v1"]}
COMPILED, INTERPRETED = {"TRITON_INTERPRET": "0"}, {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Part:
    """One child process of a step.

    kind: "probe" (runs gpu_probe.py), "tests" or "benches" (pytest on `targets`, with -k `select`).
    limit_s: it is killed after this time. expect_s: it is not started with less time left.
    needs: some of "card", "vllm", "sanitizer".
    prefix: a program that runs the child. {sanitizer} and {kind} are replaced by the program's path and by the card's
    name in predict.py. workers: processes that share the tests, if pytest-xdist is installed.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    select: str = ""
    env: dict[str, str] = field(default_factory=dict)
    limit_s: int = 240
    expect_s: int = 30
    needs: tuple[str, ...] = ("card",)
    prefix: tuple[str, ...] = ()
    workers: int = 1
    rehearsal: "Part | str" = IN_CI

    @property
    def command(self) -> list[str]:
        if self.kind == "probe":
            return [*self.prefix, sys.executable, "bench/gpu_probe.py", *self.targets]
        command = [*self.prefix, sys.executable, "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", *self.targets]
        command += ["-k", self.select] if self.select else []
        return command + (BENCHES if self.kind == "benches" else [])


@dataclass(frozen=True)
class CheckStep:
    name: str
    title: str
    parts: tuple[Part, ...]


def generate(
    name: str,
    *tests: str,
    size: str,
    env: dict[str, str],
    file: str = GENERATE,
    rounds: int = 3,
    is_rehearsed: bool = False,
    **options,
) -> Part:
    """Build a part with benches of engines.

    Those of Model Runner V1 are rehearsed, with `is_rehearsed` others too.
    """
    sized = {**env, **COMPILED, "SNPATCH_BENCH_SIZE": size, "SNPATCH_BENCH_ROUNDS": str(rounds)}
    targets = tuple(f"{file}::{test}" for test in tests)
    part = Part(
        name, "benches", targets, env={**sized, "VLLM_LOGGING_LEVEL": "INFO"}, needs=("card", "vllm"), **options
    )
    if env is RUNNERS["v2"] and not is_rehearsed:
        return replace(part, rehearsal="Model Runner V2 needs a GPU")
    tiny_env = {**SMALL, "SNPATCH_BENCH_SIZE": "rehearsal", "SNPATCH_BENCH_ROUNDS": "2"}
    rehearsed = (re.sub(r"native\[\d+\]", "native", test.replace("[100000]", "[1000]")) for test in targets)
    return replace(
        part, rehearsal=replace(part, targets=tuple(dict.fromkeys(rehearsed)), env=tiny_env, needs=("vllm",))
    )


def tests(name: str, file: str, select: str, env: dict[str, str], **options) -> Part:
    """Build a part with tests of the vLLM executor, whose models are float32."""
    settings = {**env, **COMPILED, **FLOAT32}
    return Part(name, "tests", (file,), select, settings, needs=("card", "vllm"), **options)


def modes(name: str, env: dict[str, str], **options) -> Part:
    part = tests(name, "tests/executors/vllm/test_gpu.py", "float32", env, **options)
    if env is RUNNERS["v2"]:
        return replace(part, rehearsal="Model Runner V2 needs a GPU")
    rehearsal = replace(part, select="float32 and eager", env={"SNPATCH_REHEARSAL": "1", **SMALL}, needs=("vllm",))
    return replace(part, rehearsal=rehearsal)


def equal(runner: str, env: dict[str, str]) -> tuple[Part, ...]:
    """Build the parts that compare the two-stream engine with transformers.

    They run in every graph mode and in bfloat16.
    """
    return (
        modes(f"float32-{runner}", env, limit_s=300, expect_s=90),
        tests(f"bfloat16-{runner}", "tests/executors/vllm/test_gpu.py", "bfloat16", env, limit_s=240, expect_s=60),
        tests(f"goldens-{runner}", "tests/engine/test_goldens_vllm.py", "", env, limit_s=240, expect_s=60),
    )


def promises(runner: str, env: dict[str, str]) -> tuple[Part, ...]:
    executor = "tests/executors/vllm/test_executor.py"
    return (
        tests(f"promises-{runner}", executor, "promise", env, limit_s=240, expect_s=60),
        tests(f"pair-{runner}", "tests/executors/vllm/test_pair.py", "not workers", env, limit_s=300, expect_s=90),
    )


def speed(runner: str, env: dict[str, str]) -> tuple[Part, ...]:
    """Build the parts that time the engine against native vLLM at 7b.

    They also time 160m against transformers.
    """
    sides = [f"test_twin_against_native[{batch}]" for batch in (1, 8, 32, 64)]
    return (
        generate(f"twin-{runner}", *sides, size="7b", env=env, rounds=7, limit_s=470, expect_s=300),
        generate(f"160m-{runner}", "test_windows", size="160m", env=env, limit_s=200, expect_s=60),
    )


def profile(runner: str, env: dict[str, str]) -> tuple[Part, ...]:
    return (
        generate(f"profile-{runner}", "test_profile", size="7b", env=env, limit_s=360, expect_s=180),
        generate(f"prefill-{runner}", "test_prefill", "test_contrast[100000]", size="7b", env=env,
                 limit_s=360, expect_s=180),
    )  # fmt: skip


def extra_benches(runner: str, env: dict[str, str]) -> Part:
    sides = (*(f"test_twin_against_native[{batch}]" for batch in (128, 256)),
             "test_plain_requests_on_a_twin_engine", "test_windows", "test_statistics")  # fmt: skip
    return generate(f"more-{runner}", *sides, size="7b", env=env, limit_s=470, expect_s=400)


def steps() -> tuple[CheckStep, ...]:
    v2, v1 = RUNNERS["v2"], RUNNERS["v1"]
    select, interpreted_env = "equals and triton and 60 and silu and float32", {**INTERPRETED, **SMALL}
    rehearsal = Part("tests", "tests", (KERNELS,), select, interpreted_env, needs=())
    op_bench = Part("bench", "benches", (OP,), "snpatch and 688 and float32", needs=())
    sanitized = {**COMPILED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return (
        CheckStep(
            "kernels",
            "environment; the Triton kernel against the reference, graph capture and replay: three compilations",
            (
                Part("machine", "probe", ("machine",), needs=()),
                Part("ceilings", "probe", ("ceilings",), limit_s=60, expect_s=15, rehearsal="needs a card"),
                Part("graphs", "tests", (KERNELS,), GRAPHS, COMPILED, 200),
            ),
        ),
        CheckStep(
            "op",
            "the kernel against copies of the same bytes and vLLM's silu_and_mul; predicted next to measured",
            (
                Part("predicted", "probe", ("predicted", "{kind}"), needs=()),
                Part("bench", "benches", (OP,), "F11008 and not tile and (T16 or T64 or T256 or T8192)", COMPILED,
                     240, 60, rehearsal=op_bench),
            ),
        ),
        CheckStep(
            "end-to-end",
            "patched generation at 7b against native vLLM with the same rows and requests, on Model Runner V2",
            (
                Part("vllm", "probe", ("vllm",), limit_s=120, needs=("card", "vllm"), rehearsal="needs a card"),
                *speed("v2", v2),
            ),
        ),
        CheckStep(
            "equal", "two streams == transformers: eager, piecewise, full graphs; FlashAttention in bf16; goldens",
            equal("v2", v2),
        ),
        CheckStep("profile", "profile of a decode step; prefill; a contrast of 10^5 positions", profile("v2", v2)),
        CheckStep(
            "more",
            "promises, pairs, hooks, larger batches, windows, statistics; Model Runner V1; all of the op",
            (
                *promises("v2", v2),
                extra_benches("v2", v2),
                generate("hooks-v2", "test_against_hooks[B32-static]", "test_against_hooks[B32-ragged]", size="7b",
                         env=v2, is_rehearsed=True, limit_s=300, expect_s=150),
                generate("pairs-v2", "TestPair", "TestOneStream", size="1b",
                         env=v2, file=PAIR, limit_s=300, expect_s=150),
                *speed("v1", v1),
                *equal("v1", v1),
                *promises("v1", v1),
                *profile("v1", v1),
                extra_benches("v1", v1),
                Part("op", "benches", (OP,), "", COMPILED, 400, 60),
            ),
        ),
        CheckStep(
            "sanitizer",
            "compute-sanitizer's memcheck on small cases of the Triton kernel",
            (
                Part("memcheck", "tests", (KERNELS,), "triton and bfloat16 and silu and equals and (63 or 129) and 60",
                     sanitized, 300, 60, ("card", "sanitizer"),
                     ("{sanitizer}", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"),
                     rehearsal="needs a card"),
            ),
        ),
        CheckStep(
            "tests",
            "the kernel in every dtype, and the executor's other tests, on both model runners",
            (
                Part("kernels", "tests", (KERNELS,), "triton", COMPILED, 470, 60, workers=8, rehearsal=rehearsal),
                *(
                    tests(f"executor-{r}", "tests/executors/vllm/test_executor.py", "not promise and not soak", e,
                          limit_s=470, expect_s=200)
                    for r, e in RUNNERS.items()
                ),
            ),
        ),
    )  # fmt: skip
