"""Settings of all benches: records have medians and quartiles instead of samples, and describe the machine.

SNPATCH_BENCH_LOG: file to which every record is appended as soon as it is measured, so that a stopped run keeps them.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

# The benches ask torch about a card before an engine starts; gpu_host.ALWAYS gives the reason.
for _name, _value in {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
import torch  # noqa: E402

from snpatch.executors.vllm import versions  # noqa: E402

RECORDED_STATS = ("median", "iqr", "q1", "q3", "min", "rounds")


@pytest.fixture(autouse=True)
def append_to_log(request):
    """Append the test's measurement to SNPATCH_BENCH_LOG."""
    log = os.environ.get("SNPATCH_BENCH_LOG")
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if log and benchmark is not None and benchmark.stats is not None:
        stats = {name: getattr(benchmark.stats.stats, name) for name in RECORDED_STATS}
        record = {"name": request.node.name, "extra_info": benchmark.extra_info, "stats": stats}
        with Path(log).open("a") as file:
            file.write(json.dumps(record) + "\n")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {name: benchmark["stats"][name] for name in RECORDED_STATS}
        for noise in ("fullname", "group", "options", "param"):
            benchmark.pop(noise, None)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else output_json["machine_info"]["cpu"]
    output_json["machine_info"] = {
        "device": device if isinstance(device, str) else device.get("brand_raw", platform.processor()),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "pytest-benchmark")},
    }
    output_json["machine_info"]["versions"]["vllm"] = versions.installed()
    commit = output_json["commit_info"]
    output_json["commit_info"] = {"id": commit.get("id"), "dirty": commit.get("dirty"), "time": commit.get("time")}
