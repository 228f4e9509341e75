"""Log file for the messages of vLLM and its libraries, instead of the user's terminal; error messages name it.

Why file descriptors are redirected while vLLM starts: its processes inherit them, write before any of snpatch's code
runs in them, and C++ code does not use Python's loggers. Output of the program's other threads in that time goes to the
file as well.
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

_OUTPUTS = (1, 2)  # file descriptors of stdout and stderr
_TRACEBACK = "Traceback (most recent call last):"
_LINE_PREFIX = re.compile(r"(\([\w .=]+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] )?")  # process, level, time and file
_ENGINE_PREFIX = re.compile(r"\((EngineCore|Worker)")
_ERROR_LINE = re.compile(r"[\w.]+(: |$)")  # last line of a traceback
_start_offset = 0  # bytes of the log before the last start of an engine
_redirect_lock = threading.RLock()  # two redirections at once would restore each other's descriptors


@contextmanager
def redirect_output() -> Iterator[None]:
    """Redirect this process's output and its children's to the log.

    vLLM's logger is redirected permanently. If the user asked for vLLM's messages, they go to stderr.
    """
    if _is_verbose():
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        yield
        return
    with _redirect_lock:
        log = _open_log(os.getpid())
        _flush()
        saved = [os.dup(output) for output in _OUTPUTS]
        try:
            for output in _OUTPUTS:
                os.dup2(log.fileno(), output)
            with redirect_stdout(log), redirect_stderr(log):  # in a notebook they are no descriptors
                yield
        finally:
            _flush()
            for output, descriptor in zip(_OUTPUTS, saved, strict=True):
                os.dup2(descriptor, output)
                os.close(descriptor)
            for handler in logging.getLogger("vllm").handlers:
                if type(handler) is logging.StreamHandler:  # vLLM's own
                    handler.setStream(log)


def mark_start() -> None:
    """Make `first_error` ignore what is in the log now, because an engine starts."""
    global _start_offset
    _start_offset = 0 if _is_verbose() else os.fstat(_open_log(os.getpid()).fileno()).st_size


def first_error(*, of_engine: bool = False) -> str:
    """Return the first error in the log since `mark_start` as one line; "" if there is none.

    Python prints the first error of a chain first. of_engine: consider only errors of vLLM's own processes.
    """
    if _is_verbose() or not _log_path().exists():
        return ""
    with open(_log_path(), "rb") as file:
        file.seek(_start_offset)
        lines = file.read().decode(errors="replace").splitlines()
    texts = [_LINE_PREFIX.sub("", line) for line in lines]
    for i, text in enumerate(texts):
        is_ignored = i > 0 and texts[i - 1].startswith("Exception ignored")
        if text.startswith(_TRACEBACK) and not is_ignored and (_ENGINE_PREFIX.match(lines[i]) or not of_engine):
            error_lines = (later for later in texts[i + 1 :] if _ERROR_LINE.match(later))
            return next(error_lines, "").strip()
    return ""


def keep_log() -> str:
    """Move the log out of its temporary folder to keep it.

    Return its new place, for an error message.
    """
    if _is_verbose():
        return "see vLLM's messages above"
    path = Path(_open_log(os.getpid()).name)
    if path.exists():
        path.rename(_kept_path(path))  # processes that write to it continue to do so
    return f"its log: {_kept_path(path)}"


def _log_path() -> Path:
    """Return the current path of the log."""
    path = Path(_open_log(os.getpid()).name)
    return path if path.exists() else _kept_path(path)


def _kept_path(path: Path) -> Path:
    """Return the path of a log after `keep_log`."""
    return path.parent.with_suffix(".log")


def environment() -> dict[str, str]:
    """Return the environment variables with which vLLM logs more than errors.

    If the user has set a level, that level stays.
    """
    return {} if _is_verbose() else {"VLLM_LOGGING_LEVEL": "INFO"}


def _is_verbose() -> bool:
    """Return whether the user asked for vLLM's messages; importing trl sets the level to ERROR."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR").upper()
    return level != "ERROR" or bool(os.environ.get("VLLM_LOGGING_CONFIG_PATH"))


@cache
def _open_log(process: int) -> TextIO:
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
