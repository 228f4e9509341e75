import gc
import os
from functools import cache

# The models are tiny: threads that wait for each other spin, and are ten times as slow if another process runs.
os.environ["OMP_NUM_THREADS"] = "1"
for name, value in {
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling one helper of vLLM's sampler takes each process 7 s; see `compilation`
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import tiny  # noqa: E402
from commands import prompts, ranking  # noqa: E402, F401
from forked import forked  # noqa: E402, F401
from in_process import compilation, in_process, start  # noqa: E402, F401
from serving import RUNNING, client, offline, server  # noqa: E402, F401


def pytest_runtest_setup(item):
    """Take all objects out of garbage collection before a test that may start an engine.

    Each process of an engine collects garbage about eight times, in 0.4 s each if all modules take part.
    """
    if item.get_closest_marker("engine") and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    """Undo the freezing, because Python does not free frozen objects when it ends, and nanobind reports them."""
    gc.unfreeze()


def pytest_runtest_teardown(item, nextitem):
    """Stop the server after the last test that may use it, because later tests look at all child processes."""
    if nextitem is None or nextitem.path.parent.name != "server":
        while RUNNING:
            RUNNING.pop().end()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Return a function architecture -> tiny.TinyModel (folder, adapters), built once per session."""
    models = {}

    def get(architecture: str, **options) -> tiny.TinyModel:
        key = (architecture, *sorted(options.items()))
        if key not in models:
            models[key] = tiny.make(architecture, tmp_path_factory.mktemp(architecture), **options)
        return models[key]

    return get


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Return a function architecture -> tiny.TinyModel on two sets of weights, built once per session."""
    return cache(lambda architecture: tiny.make_pair(architecture, tmp_path_factory.mktemp(f"{architecture}-pair")))
