"""vLLM's processes as forks of the process that starts them.

On a CPU vLLM spawns them, and each of an engine's two processes imports vLLM again for 6 s. Tests of the start
(executors/vllm/test_start.py), the examples and the commands that run in a shell start engines as users do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snpatch.executors.vllm import versions

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@contextmanager
def forked_processes() -> Iterator[None]:
    """Let vLLM fork in this block, on a CPU; with vLLM before 0.28 forked servers end streams too early at SIGTERM."""
    if versions.minor() < (0, 28):
        yield
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_fork(config) -> None:
        check(config)
        os.environ[METHOD] = "fork"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(METHOD, "fork")
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_fork))
        yield


@pytest.fixture
def forked():
    """Let vLLM fork in a test."""
    with forked_processes():
        yield
