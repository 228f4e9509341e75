"""bench/gpu_check.py as a user runs it: a rehearsal of all steps without a card, and parts that fail, hang, skip, or
have no time left. The numbers of a rehearsal are meaningless, so none is checked.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import gpu_check
import gpu_steps
import pytest
import torch
import trace_events
from gpu_host import ALWAYS, Host, register_plugin
from gpu_steps import CheckStep, Part

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
STEPS = [step.name for step in gpu_steps.steps()]
# What runs without a card, in a rehearsal.
REHEARSED = {
    "kernels": {"machine"},
    "op": {"predicted", "bench"},
    "end-to-end": set(),
    "equal": set(),
    "profile": set(),
    "more": {"160m-v1", "twin-v1", "float32-v1", "profile-v1", "prefill-v1", "more-v1", "hooks-v2"},
    "sanitizer": set(),
    "tests": {"kernels"},
}


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "bench/gpu_check.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


def records(folder: Path) -> dict[str, dict]:
    assert [path.name for path in folder.iterdir()] == ["records.json"]
    return gpu_check.load_records(folder)


def results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_rehearsal_of_two_steps_writes_their_records(tmp_path):
    rehearse(tmp_path, ["kernels", "op"])


@pytest.mark.full
@pytest.mark.engine
def test_rehearsal_runs_every_step_and_writes_its_records(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    step_records, printed = rehearse(tmp_path, STEPS, "--all")
    sides = {b["extra_info"]["side"] for record in step_records.values() for p in record["parts"].values()
             for b in p.get("benchmarks", ())}  # fmt: skip
    assert {"twin", "plain on twin", "32 windows", "statistics", "prefill", "contrast", "profile of twin"} <= sides
    table = printed[printed.index("steps (a rehearsal") :]
    assert all(f"\n{step}" in table for step in STEPS)
    assert "profile of" not in table
    assert "native 2B / native B" in printed


def rehearse(tmp_path, steps: list[str], *words: str) -> tuple[dict[str, dict], str]:
    """Rehearse steps, check their records and return these and what is printed. words: the steps by default."""
    words = words or tuple(steps)
    before = results()
    run = call(*words, "--rehearse", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert results() == before
    step_records = records(tmp_path / "out")
    assert sorted(step_records) == sorted(steps)
    for name, record in step_records.items():
        assert str(ROOT) not in json.dumps(record)
        assert record["rehearsal"] is True
        assert {"step", "title", "card", "versions", "commit", "source", "parts"} <= record.keys()
        passed = {name for name, part in record["parts"].items() if part["status"] == "ok"}
        assert passed == REHEARSED[name]
        for part, part_record in record["parts"].items():
            command = f"python bench/gpu_check.py {' '.join(words)} --rehearse --out OUT --work WORK"
            assert part_record["asked"] == command
            assert part in passed or (part_record["status"] == "skipped" and part_record["reason"])
            if "command" in part_record:
                assert (
                    part_record["benchmarks"]
                    if "--benchmark-enable" in part_record["command"]
                    else part_record["seconds"]
                )
    return step_records, run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_run_without_a_card_reports_skipped_parts(tmp_path):
    run = call("2", "sanitizer", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sanitizer: memcheck skipped no NVIDIA card here" in run.stdout
    step_records = records(tmp_path / "out")
    assert step_records["op"]["parts"]["predicted"]["status"] == "ok"
    assert step_records["op"]["parts"]["bench"]["status"] == "skipped"
    assert step_records["op"]["card"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected step names, --all or --list"),
        (["nonsense"], "unknown step nonsense; the steps are kernels, op"),
        (
            ["1", "--rehearse", "--out", str(RESULTS / "gpu")],
            "--out: records of a rehearsal must not be written to bench/results",
        ),
    ],
)
def test_invalid_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


TESTS = """
import json, os, subprocess, sys, time, pytest
def test_good(): pass
def test_bad(): assert False, "what went wrong"
def test_skipped(): pytest.skip("has a reason")
def test_hangs():
    with open(os.environ["SNPATCH_BENCH_LOG"], "a") as file:
        file.write(json.dumps({"name": "test_hangs", "extra_info": {}, "stats": {}}) + "\\n")
    subprocess.run([sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); "
                    "time.sleep(100)", os.environ["CHILD"]])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(part, ...): runs a step of these parts; (exit status, the record's parts)."""
    file = tmp_path / "test_parts.py"
    file.write_text(TESTS)
    machine = {"card": None, "versions": {}, "has_vllm": False, "sanitizer": None}
    monkeypatch.setattr(Host, "machine", lambda self: dict(machine))
    monkeypatch.setattr(gpu_check, "source", lambda: run.source)

    def run(*parts: Part, options=()) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "steps", lambda: (CheckStep("fake", "parts of a test", parts),))
        status = gpu_check.main(["fake", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *options])
        return status, records(tmp_path / "out")["fake"]["parts"]

    def part(name: str, **options) -> Part:
        return Part(name, "tests", (str(file),), name, expect_s=1, needs=(), **options)

    run.part, run.machine, run.source = part, machine, "this code"
    return run


def test_failing_part_is_reported_and_the_next_part_runs(fake, capsys):
    status, parts = fake(fake.part("bad"), fake.part("good"), fake.part("skipped"), fake.part("nothing"))
    assert status == 1
    assert [part["status"] for part in parts.values()] == ["failed", "ok", "skipped", "failed"]
    assert any("what went wrong" in line for line in parts["bad"]["tail"])
    assert parts["good"]["counts"]["passed"] == 1
    assert parts["skipped"]["reason"].endswith("has a reason")
    assert parts["nothing"]["reason"] == "exit status 5"
    assert "what went wrong" in capsys.readouterr().out


def test_hanging_part_is_killed_with_its_children_and_keeps_its_measurements(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD", str(tmp_path / "pid"))
    monkeypatch.setattr(gpu_check.gpu_tables, "measurements", lambda records: "")
    hanging = Part("hangs", "benches", fake.part("hangs").targets, "hangs", limit_s=6, expect_s=1, needs=())
    status, parts = fake(hanging, fake.part("good"))
    assert status == 1
    assert (parts["hangs"]["status"], parts["good"]["status"]) == ("timed out", "ok")
    assert parts["hangs"]["reason"] == "killed after 6 s"
    assert [b["name"] for b in parts["hangs"]["benchmarks"]] == ["test_hangs"]
    process = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not process.exists()


def test_part_without_time_is_left_for_the_next_call(fake):
    slow = Part("slow", "tests", fake.part("good").targets, "good", expect_s=600, needs=())
    status, first = fake(fake.part("good"), slow, options=("--minutes", "1"))
    assert status == 3
    assert [part["status"] for part in first.values()] == ["ok", "left"]
    quick = replace(slow, expect_s=1)
    status, second = fake(fake.part("good"), quick)
    assert status == 0
    assert second["good"] == first["good"]
    assert second["slow"]["status"] == "ok"
    _, third = fake(fake.part("good"), quick, options=("--again",))
    assert third["good"] != first["good"]


def test_records_are_reused_for_the_same_card_and_code(fake, tmp_path):
    fake.machine["card"] = "NVIDIA H200"
    _, first = fake(fake.part("good"))
    shutil.rmtree(tmp_path / "out")
    assert fake(fake.part("good"))[1] == first
    fake.source = "other code"
    assert fake(fake.part("good"), options=("--any-commit",))[1] == first
    assert fake(fake.part("good"))[1]["good"]["source"] == "other code"
    fake.machine["card"] = "NVIDIA H100 80GB HBM3"
    assert fake(fake.part("bad"))[1].keys() == {"bad"}
    assert records(tmp_path / "out")["fake"]["card"] == "NVIDIA H100 80GB HBM3"


def test_plugin_is_found_without_an_install(tmp_path):
    host = Host(tmp_path, tmp_path / "site")
    register_plugin(host.entry)
    (distribution,) = distributions(path=[str(host.entry)])
    points = {point.group: point.value for point in distribution.entry_points}
    assert distribution.metadata["Name"] == "snpatch"
    assert points["vllm.general_plugins"] == "snpatch.executors.vllm.worker.plugin:register"


def test_decode_steps_sums_time_by_kernel():
    """Three steps of 10 us; nested events count once; prefill and the last step do not count."""
    names = ["execute_context_2(9)_generation_0(0)", *["execute_context_0(0)_generation_2(2)"] * 4]
    events = [{"cat": "user_annotation", "name": n, "ts": 10 * i, "ph": "X", "dur": 9} for i, n in enumerate(names)]
    for start in (0, 10, 20, 30, 40):
        for name, at, dur in (("outer_gemm", 1, 6), ("_patched_glu_kernel", 2, 4), ("flash_fwd", 8, 1)):
            events.append({"cat": "kernel", "ph": "X", "name": name, "ts": start + at, "dur": dur, "pid": 0, "tid": 7})
    result = trace_events.decode_steps(events, "kernel")
    assert (result["steps"], result["step_us"], result["busy_us"]) == (3, 10, 7)
    assert result["groups_us"] == {"snpatch's op": 4, "matrix products": 2, "attention": 1}
    assert result["top"][0] == {"name": "_patched_glu_kernel", "us": 4, "calls": 1}
    with pytest.raises(ValueError, match="expected at least 3 decode steps, got 1"):
        trace_events.decode_steps(events[:2], "kernel")
    marks = [event for event in events if event["cat"] == "user_annotation"]
    with pytest.raises(trace_events.NoKernelsError, match="no event of category kernel in 3 decode steps"):
        trace_events.decode_steps(marks, "kernel")  # as on a machine that blocks profilers from its card


def test_timed_out_part_is_tried_once_more(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD", str(tmp_path / "pid"))
    monkeypatch.setattr(gpu_check.gpu_tables, "measurements", lambda records: "")
    hanging = Part("hangs", "benches", fake.part("hangs").targets, "hangs", limit_s=4, expect_s=1, needs=())
    tries = [fake(hanging)[1]["hangs"] for _ in range(3)]
    assert [part["tries"] for part in tries] == [1, 2, 2]
    assert tries[1] == tries[2]


def test_sanitizer_that_cannot_access_the_card_skips_the_part(fake, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho 'Device not supported' >&2\nexit 1\n")
    program.chmod(0o755)
    fake.machine.update(card="NVIDIA H200", sanitizer=str(program))
    checked = replace(fake.part("good"), needs=("card", "sanitizer"), prefix=("{sanitizer}",))
    status, parts = fake(checked)
    assert status == 0
    assert parts["good"]["status"] == "skipped"
    assert parts["good"]["reason"] == "compute-sanitizer does not work here: exit status 1, Device not supported"


def test_first_parts_fit_into_two_calls_of_ten_minutes():
    """By their minimum seconds; the first one by its Triton compilations, of 16 s at most."""
    first = {part.name: part for step in gpu_steps.steps()[:5] for part in step.parts if "card" in part.needs}
    assert list(first) == ["ceilings", "graphs", "bench", "vllm", "twin-v2", "160m-v2", "float32-v2", "bfloat16-v2",
                           "goldens-v2", "profile-v2", "prefill-v2"]  # fmt: skip
    calls = list(first.values())[:6], list(first.values())[6:]
    assert [sum(part.expect_s for part in call) <= 570 for call in calls] == [True, True]
    assert first["twin-v2"].env["SNPATCH_BENCH_ROUNDS"] == "7"
    assert num_compiled(first["graphs"]) * 16 < first["graphs"].limit_s


def num_compiled(part: Part) -> int:
    """Return how many specializations of the kernel a part's tests launch, counted with the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "specializations", *part.targets]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run([*command, "-k", part.select], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout
    return int(run.stdout.split("specializations: ")[1].split()[0])


def test_benches_do_not_start_cuda_before_an_engine():
    """Asking torch without NVML starts CUDA, which vLLM's forked processes then cannot use."""
    command = [sys.executable, "-c", LIST_CUDA_QUERIES]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "bench", env={
        **{n: v for n, v in os.environ.items() if n not in ("PYTORCH_NVML_BASED_CUDA_CHECK", "PYTHONPATH")},
        "SNPATCH_BENCH_SIZE": "rehearsal", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
    })  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[]", "spawn"]
    assert {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}.items() <= ALWAYS.items()


LIST_CUDA_QUERIES = """
import json, os, sys, traceback
import torch
queries = []

def is_available():
    if os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1":
        queries.append(traceback.extract_stack()[-2].filename)
    return False

torch.cuda.is_available = is_available
import conftest
for name in ("bench_generate", "bench_pair", "bench_sweep", "bench_serve", "bench_zeroing", "bench_patched_glu"):
    __import__(name)
from snpatch import Engine
print(json.dumps(queries), os.environ["VLLM_WORKER_MULTIPROC_METHOD"])
"""


def test_import_of_snpatch_makes_torch_use_nvml():
    code = "import os, snpatch; print(os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'])"
    for variables, expected in (({}, "1"), ({"PYTORCH_NVML_BASED_CUDA_CHECK": "0"}, "0")):
        environment = {n: v for n, v in os.environ.items() if n != "PYTORCH_NVML_BASED_CUDA_CHECK"} | variables
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert run.stdout.strip() == expected, run.stderr
