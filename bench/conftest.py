"""Records keep medians and quartiles, not every sample, and say what they were measured on."""

import platform
from importlib.metadata import version

import torch

from snpatch.executors.vllm import versions

KEPT = ("median", "iqr", "q1", "q3", "min", "rounds")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"] = {name: benchmark["stats"][name] for name in KEPT}
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
