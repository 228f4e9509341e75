"""vLLM's own messages, and those of what lies beneath it: in a file that errors name, instead of on the user's screen.

Why file descriptors are turned while vLLM starts: its processes inherit them, write before any of our code runs in
them, and C++ asks no logger. What the user's other threads print in that time is in the file, too.
"""

import atexit
import logging
import os
import re
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
_TRACEBACK = "Traceback (most recent call last):"
_SPEAKER = re.compile(r"(\([\w .=]+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] )?")  # who writes a line, when and where
_ENGINE = re.compile(r"\((EngineCore|Worker)")
_RAISED = re.compile(r"[\w.]+(: |$)")  # the line of a traceback that has the error
_mark = 0
_turning = threading.RLock()  # two that start at once would give each other's descriptors back


@contextmanager
def redirect_output() -> Iterator[None]:
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


def mark_start() -> None:
    """Let `first_error` read what is written from here on: an engine starts."""
    global _mark
    _mark = 0 if _is_loud() else os.fstat(_log_of(os.getpid()).fileno()).st_size


def first_error(*, of_engine: bool = False) -> str:
    """Return the first error of the log since `mark_start`, in one line; "" where it holds none.

    Of a chain of errors Python prints the first one first. of_engine: of those that vLLM's own processes tell.
    """
    if _is_loud() or not _path().exists():
        return ""
    with open(_path(), "rb") as file:
        file.seek(_mark)
        lines = file.read().decode(errors="replace").splitlines()
    texts = [_SPEAKER.sub("", line) for line in lines]
    for i, text in enumerate(texts):
        is_ignored = i > 0 and texts[i - 1].startswith("Exception ignored")
        if text.startswith(_TRACEBACK) and not is_ignored and (_ENGINE.match(lines[i]) or not of_engine):
            after = (one for one in texts[i + 1 :] if _RAISED.match(one))
            return next(after, "").strip()
    return ""


def keep_log() -> str:
    """Return where vLLM's messages are, for an error; from now on the log is kept, outside of its temporary folder."""
    if _is_loud():
        return "its own messages above say more"
    path = Path(_log_of(os.getpid()).name)
    if path.exists():
        path.rename(_kept(path))  # what writes to it goes on
    return f"its log: {_kept(path)}"


def _path() -> Path:
    """Return where the log is now."""
    path = Path(_log_of(os.getpid()).name)
    return path if path.exists() else _kept(path)


def _kept(path: Path) -> Path:
    """Return where a log is that an error has named."""
    return path.parent.with_suffix(".log")


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
