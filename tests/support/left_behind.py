"""What an engine leaves in the temporary folder and in shared memory, and a process that leaves all of it."""

import os
import tempfile
import time
from multiprocessing import Queue, get_context, shared_memory
from pathlib import Path


def left(since: set[Path] = frozenset()) -> set[Path]:
    """All that engines of this process may leave, but for what was there before."""
    folders = Path(tempfile.gettempdir()), Path("/dev/shm")
    found = {path for folder in folders for path in folder.iterdir()}
    kinds = ("snpatch-", "vllm_dist_", "psm_", "sem.mp-")
    return {path for path in found if path.name.startswith(kinds) or path.is_socket()} - set(since)


def untidy(told: Queue) -> None:
    """Leave shared memory, a semaphore and a file of the temporary folder, and do not end."""
    block = shared_memory.SharedMemory(create=True, size=64)
    lock = get_context("spawn").Lock()
    Path(tempfile.gettempdir(), "rendezvous").write_text("here")
    told.put((os.getpid(), block.name, tempfile.gettempdir()))
    time.sleep(600)
    lock.acquire()
