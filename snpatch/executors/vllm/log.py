"""vLLM's own messages, and those of what lies beneath it: in a file that errors name, instead of on the user's screen.

Why file descriptors are turned while vLLM starts: its processes inherit them, write before any of our code runs in
them, and C++ asks no logger. What the user's other threads print in that time is in the file, too.
"""

import atexit
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import TextIO

from snpatch.executors.vllm.temporary import TemporaryFolder

_OUTPUTS = (1, 2)
_turning = threading.RLock()  # two that start at once would give each other's descriptors back


@contextmanager
def quiet() -> Iterator[None]:
    """All that this process and those that it starts write inside this block, and vLLM's logger ever after, is in the
    log; where the user asked for vLLM's messages they are on stderr."""
    if _is_loud():
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        yield
        return
    with _turning:
        log = _log_of(os.getpid())
        _flush()
        screen = [os.dup(output) for output in _OUTPUTS]
        try:
            for output in _OUTPUTS:
                os.dup2(log.fileno(), output)
            with redirect_stdout(log), redirect_stderr(log):  # in a notebook they are no descriptors
                yield
        finally:
            _flush()
            for output, own in zip(_OUTPUTS, screen, strict=True):
                os.dup2(own, output)
                os.close(own)
            for handler in logging.getLogger("vllm").handlers:
                if type(handler) is logging.StreamHandler:  # vLLM's own
                    handler.setStream(log)


def named() -> str:
    """Return where vLLM's messages are, for an error; from now on the log is kept, outside of its temporary folder."""
    if _is_loud():
        return "its own messages above say more"
    path = Path(_log_of(os.getpid()).name)
    kept = path.parent.with_suffix(".log")
    if path.exists():
        path.rename(kept)  # what writes to it goes on
    return f"its log: {kept}"


def environment() -> dict[str, str]:
    """Environment variables to start vLLM in: a log that an error names is to hold more than errors."""
    return {} if _is_loud() else {"VLLM_LOGGING_LEVEL": "INFO"}


def _is_loud() -> bool:
    """Whether somebody wants vLLM's messages on the screen; level ERROR is what an import of trl leaves behind."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR").upper()
    return level != "ERROR" or bool(os.environ.get("VLLM_LOGGING_CONFIG_PATH"))


@cache
def _log_of(process: int) -> TextIO:
    folder = TemporaryFolder(tempfile.gettempdir())
    atexit.register(_remove, process, folder)
    return open(folder.path / "vllm.log", "a", buffering=1, encoding="utf-8")


def _remove(process: int, folder: TemporaryFolder) -> None:
    if os.getpid() == process:
        folder.remove()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
