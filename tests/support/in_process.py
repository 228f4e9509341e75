"""vLLM engines in the tests' own process, one at a time."""

import gc

import pytest
import torch

from snpatch import Engine

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
if torch.cuda.is_available():
    SMALL["gpu_memory_utilization"] = 0.3  # vLLM wants this share free at its start, and 0.92 by default


@pytest.fixture(scope="module")
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def start(in_process, zoo):
    """start(architecture, **options): an engine; the one before is closed, as two cannot share a process."""
    held = []

    def get(architecture="llama", **options) -> Engine:
        while held:
            held.pop().close()
        gc.collect()
        made = zoo(architecture) if isinstance(architecture, str) else architecture
        held.append(Engine(made.folder, **made.given, backend="vllm", **{**SMALL, **options}))
        return held[0]

    yield get
    while held:
        held.pop().close()
