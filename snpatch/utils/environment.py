"""Versions and devices, as `snpatch env` prints them and bug reports need them."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("snpatch", "torch", "transformers", "triton", "vllm", "peft", "trl", "scikit-learn", "safetensors")


def describe_environment(implementations: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return versions, devices and the implementation of each op, as name -> value by group."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": _devices(),
        "ops": dict(implementations),
    }


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _devices() -> dict[str, str]:
    devices = {"cpu threads": str(torch.get_num_threads()), "cpu capability": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return devices
