"""Workers that end when the user's process does, however it ended: vLLM's own processes outlive a killed parent."""

import os
import signal
import threading
import time

PARENT = "SNPATCH_PARENT"  # the user's process, for the processes that it starts
EVERY_S = 1.0


def watch() -> None:
    """In a worker: look every second whether the user's process is still there, and leave when it is not.

    Ctrl-C is for the user's process, which then ends its engine: a worker that answers it, too, would make the
    engine fail in the middle of a step.
    """
    parent = int(os.environ.get(PARENT, 0))
    if parent and parent != os.getpid():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_watch, args=(parent, os.getppid()), daemon=True, name="snpatch-orphans").start()


def _watch(parent: int, engine: int) -> None:
    while _lives(parent) and os.getppid() == engine:
        time.sleep(EVERY_S)
    if engine != parent and os.getppid() == engine:
        os.kill(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected by its own parent does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
