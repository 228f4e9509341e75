"""Signals and parent watch of vLLM's processes, and the file in which they report why they cannot start.

By default vLLM's processes outlive a killed parent. On Ctrl-C, which a terminal or a notebook sends to all processes,
its engine ends before the client process can abort its requests and continue.
"""

import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.utils.process_stat import read_process_stat

PARENT_VARIABLE = "SNPATCH_PARENT"  # id of the client process, for the processes that it starts
ERROR_FILE_VARIABLE = "SNPATCH_REASON"  # path of the file for the error that prevents a start
PARENT_CHECK_SECONDS = 1.0


def exit_with_parent() -> None:
    """Start a thread that kills this worker and its engine process when the client process has ended."""
    if parent := _client_process():
        threading.Thread(target=_watch_parent, args=(parent, os.getppid()), daemon=True, name="snpatch-orphans").start()


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C in a process of vLLM.

    plugin.py calls this in spawned processes, os.fork in forked ones. Why mask and handler: a forked process gets
    vLLM's handler later, which the mask outlasts; a spawned one may already have threads without the mask.
    """
    if _client_process():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_temporary_folder_again() -> None:
    """Let a forked process of vLLM use TMPDIR, its engine's folder, instead of its parent's folder."""
    if _client_process():
        tempfile.tempdir = None


os.register_at_fork(after_in_child=ignore_ctrl_c)
os.register_at_fork(after_in_child=_read_temporary_folder_again)


@contextmanager
def report_errors() -> Iterator[None]:
    """Write a SnpatchError of this block to the client's file.

    vLLM reports only that a worker failed.
    """
    try:
        yield
    except SnpatchError as error:
        if path := os.environ.get(ERROR_FILE_VARIABLE):
            Path(path).write_text(str(error), encoding="utf-8")
        raise


def descendants(roots: Iterable[int]) -> list[int]:
    """Return the ids of these processes and of all their descendants."""
    children = defaultdict(list)
    for process in filter(str.isdecimal, os.listdir("/proc")):
        if stat := read_process_stat(int(process)):
            children[stat.parent].append(int(process))
    processes = list(roots)
    for process in processes:  # grows in the loop
        processes += children[process]
    return processes


def start_time(process: int) -> int | None:
    """Return when a process started, in clock ticks since the machine's start; None if it has ended."""
    stat = read_process_stat(process)
    return stat.started if stat and not stat.has_ended else None


def kill(process: int) -> None:
    """Kill a process if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


class _Interrupted(BaseException):
    """Ctrl-C under a name that vLLM's start does not catch: it catches KeyboardInterrupt and waits for its engine."""


@contextmanager
def interrupt_on_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt from this block on Ctrl-C, unless the program has its own handler."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number, frame) -> None:
    raise _Interrupted


def _client_process() -> int:
    """Return the id of the client process; 0 in the client process itself and in unrelated processes."""
    parent = int(os.environ.get(PARENT_VARIABLE, 0))
    return 0 if parent == os.getpid() else parent


def _watch_parent(parent: int, engine: int) -> None:
    while start_time(parent) and os.getppid() == engine:
        time.sleep(PARENT_CHECK_SECONDS)
    if engine != parent and os.getppid() == engine:
        os.kill(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
