"""vLLM's processes end when the user's process does, however it ended, and leave Ctrl-C to it.

By itself vLLM outlives a killed parent, and on Ctrl-C, which a terminal or a notebook sends to all processes, its
engine ends before the user's process can abort what it runs and go on.
"""

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snpatch.errors import SnpatchError

PARENT = "SNPATCH_PARENT"  # the user's process, for the processes that it starts
REASON = "SNPATCH_REASON"  # the file in which they tell it why they cannot start
EVERY_S = 1.0


def exit_with_parent() -> None:
    """In a worker: look every second whether the user's process is still there, and leave when it is not."""
    if parent := _parent():
        threading.Thread(target=_watch, args=(parent, os.getppid()), daemon=True, name="snpatch-orphans").start()


def ignore_ctrl_c() -> None:
    """In any process of vLLM: do not answer Ctrl-C. plugin.py calls this where it was spawned, fork does itself.

    Why both: a forked process gets vLLM's handler later, which the mask outlasts; a spawned one may have threads
    already, without the mask.
    """
    if _parent():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=ignore_ctrl_c)


@contextmanager
def report_errors() -> Iterator[None]:
    """In a worker: a SnpatchError out of this block reaches the user's process. vLLM only tells that one failed."""
    try:
        yield
    except SnpatchError as error:
        if path := os.environ.get(REASON):
            Path(path).write_text(str(error), encoding="utf-8")
        raise


def descendants(roots: Iterable[int]) -> list[int]:
    """These processes, and all that they and theirs have started."""
    children = defaultdict(list)
    for process in filter(str.isdecimal, os.listdir("/proc")):
        if fields := _stat(int(process)):
            children[int(fields[1])].append(int(process))
    found = list(roots)
    for process in found:  # which grows
        found += children[process]
    return found


def kill(process: int) -> None:
    """Kill it, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


class _Interrupted(BaseException):
    """Ctrl-C, by another name than the one that vLLM's start passes over (it then waits for its engine)."""


@contextmanager
def interrupt_on_ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt out of this block, unless the user has a handler of their own."""
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


def _parent() -> int:
    """The user's process, in a process that its engine started; 0 in any other."""
    parent = int(os.environ.get(PARENT, 0))
    return 0 if parent == os.getpid() else parent


def _watch(parent: int, engine: int) -> None:
    while _lives(parent) and os.getppid() == engine:
        time.sleep(EVERY_S)
    if engine != parent and os.getppid() == engine:
        os.kill(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected by its own parent does not."""
    fields = _stat(process)
    return bool(fields) and fields[0] not in "ZX"


def _stat(process: int) -> list[str]:
    """State, parent and further numbers of a process; empty if there is none."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
