"""What `snpatch env` tells: versions, device, and which implementation serves each op."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from snpatch.op import ops

PACKAGES = ("snpatch", "torch", "transformers", "triton", "vllm", "peft", "trl", "scikit-learn", "safetensors")


def describe() -> dict[str, dict[str, str]]:
    """Groups of name -> value: versions, device, ops."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": _device(),
        "ops": ops.implementations(),
    }


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _device() -> dict[str, str]:
    found = {"cpu threads": str(torch.get_num_threads()), "cpu capability": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found
