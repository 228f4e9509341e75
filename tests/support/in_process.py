"""vLLM engines in the tests' own process, one at a time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3Model

from snpatch import Engine
from snpatch.executors.vllm import versions

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
if torch.cuda.is_available():
    SMALL["gpu_memory_utilization"] = 0.3  # vLLM wants this share free at its start, and 0.92 by default


@pytest.fixture(scope="module")
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@contextmanager
def _untouched(*classes: type) -> Iterator[None]:
    """Where vLLM runs a model of transformers it marks its class for compilation; the oracle needs it as it was."""
    kept = [(cls, cls.__bases__, {name: cls.__dict__.get(name) for name in MARKED}) for cls in classes]
    yield
    for cls, bases, own in kept:
        cls.__bases__ = bases
        for name, value in own.items():
            if value is not None:
                setattr(cls, name, value)
            elif name in cls.__dict__:
                delattr(cls, name)


def architectures() -> list[str]:
    """Those that the installed vLLM can run: before 0.32 its own OLMo 3 does not read transformers 5's configs."""
    version = tuple(map(int, versions.check().split(".")[:2]))
    return [name for name in tiny.ARCHITECTURES if name != "olmo3" or version >= (0, 32)]


MARKED = ("__init__", "__call__", "_ignore_compile_vllm", "load_weights")


@pytest.fixture(scope="module")
def start(in_process, zoo):
    """start(architecture, **options): an engine; the one before is closed, as two cannot share a process."""
    held = []

    def get(architecture="llama", **options) -> Engine:
        while held:
            held.pop().close()
        gc.collect()
        made = zoo(architecture) if isinstance(architecture, str) else architecture
        with _untouched(Olmo2Model, Olmo3Model):
            held.append(Engine(made.folder, **made.given, backend="vllm", **{**SMALL, **options}))
        return held[0]

    yield get
    while held:
        held.pop().close()
