"""vLLM engines in the test process, one at a time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
import torch._dynamo
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3Model

from snpatch import Engine
from snpatch.executors.vllm import versions

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32}
if torch.cuda.is_available():
    SMALL["gpu_memory_utilization"] = 0.3  # share that must be free when vLLM starts; 0.92 by default


freeze = gc.freeze


@pytest.fixture(scope="module")
def in_process():
    """Run engines in this process.

    vLLM freezes its heap after a start, and at an end puts everything back into garbage collection, which then takes
    0.4 s eight times an engine. Here `start` freezes what outlives the engines instead, above all modules.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture
def compilation(monkeypatch):
    """Switch torch.compile on, here and in processes that start later."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    with torch._dynamo.config.patch(disable=False):
        yield


@contextmanager
def _untouched(*classes: type) -> Iterator[None]:
    """Restore transformers' classes after vLLM has marked them for compilation, because the oracle uses them too."""
    originals = [(cls, cls.__bases__, {name: cls.__dict__.get(name) for name in MARKED}) for cls in classes]
    yield
    for cls, bases, attributes in originals:
        cls.__bases__ = bases
        for name, value in attributes.items():
            if value is not None:
                setattr(cls, name, value)
            elif name in cls.__dict__:
                delattr(cls, name)


def architectures() -> list[str]:
    """Return the architectures that vLLM runs here: before 0.32 its OLMo 3 cannot read transformers 5's configs."""
    version = tuple(map(int, versions.check().split(".")[:2]))
    return [name for name in tiny.ARCHITECTURES if name != "olmo3" or version >= (0, 32)]


MARKED = ("__init__", "__call__", "_ignore_compile_vllm", "load_weights")


@pytest.fixture(scope="module")
def start(in_process, zoo):
    """start(architecture, **options): open an engine and close the last one, because two cannot share a process."""
    engines = []

    def get(architecture="llama", **options) -> Engine:
        while engines:
            engines.pop().close()
        gc.collect()
        freeze()
        tiny_model = zoo(architecture) if isinstance(architecture, str) else architecture
        with _untouched(Olmo2Model, Olmo3Model):
            engines.append(
                Engine(tiny_model.folder, **tiny_model.engine_arguments, backend="vllm", **{**SMALL, **options})
            )
        return engines[0]

    yield get
    while engines:
        engines.pop().close()
