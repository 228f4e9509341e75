import os
from functools import cache

# Models are tiny here: threads that wait for one another spin, and take ten times as long beside another process.
os.environ["OMP_NUM_THREADS"] = "1"
for name, value in {
    "TRITON_INTERPRET": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import tiny  # noqa: E402
from commands import prompts, ranking  # noqa: E402, F401
from in_process import in_process, start  # noqa: E402, F401
from serving import RUNNING, client, offline, server  # noqa: E402, F401


def pytest_runtest_teardown(item, nextitem):
    """The server ends with the last test that may use it: others look at all processes below this one."""
    if nextitem is None or not nextitem.path.name.startswith("test_serve"):
        while RUNNING:
            RUNNING.pop().end()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """zoo(architecture): its tiny.TinyModel (folder, adapters), made once a session."""
    made = {}

    def get(architecture: str, **options) -> tiny.TinyModel:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.make(architecture, tmp_path_factory.mktemp(architecture), **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """pairs(architecture): its tiny.TinyModel on two sets of weights, made once a session."""
    return cache(lambda architecture: tiny.make_pair(architecture, tmp_path_factory.mktemp(f"{architecture}-pair")))
