"""Processes that vLLM starts for one engine, and their files in the temporary folder and in shared memory.

Why snpatch removes them: a killed process removes nothing, and vLLM kills processes that end too slowly.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

from snpatch.executors.vllm import processes
from snpatch.executors.vllm.temporary import TemporaryFolder

SHARED_MEMORY = Path("/dev/shm")
TRACKED_NAMES = ("psm_", "sem.mp-", "sem.loky-")  # of Python and joblib, with an entry in Python's resource tracker
SHARED_NAMES = (*TRACKED_NAMES, "vllm_dist_", "-cpushm")  # and of vLLM on a CPU
MAX_FOLDER_CHARS = 53  # of the temporary folder: the path of a socket has at most 107
POLL_SECONDS = 0.5
KILL_SECONDS = 5.0  # how long to wait for killed processes to end
KILL_POLL_SECONDS = 0.01


class ChildProcesses:
    """Child processes and shared memory that appear after it is created. folder: their temporary folder."""

    def __init__(self) -> None:
        root = tempfile.gettempdir()
        self._temporary = TemporaryFolder(root if len(root) <= MAX_FOLDER_CHARS else "/tmp")
        self.folder = self._temporary.path
        self._older = {child.pid for child in multiprocessing.active_children()}
        self._start_times: dict[int, int] = {}  # of each process that was seen
        self._shared: set[str] = set()
        self._has_started = threading.Event()
        threading.Thread(target=self._poll, daemon=True, name="snpatch-child-processes").start()

    def environment(self) -> dict[str, str]:
        """Return the environment variables for the engine's processes."""
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Compiled code has to outlive the engine, and would be in the temporary folder by default.
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
        sockets = os.environ.get("VLLM_RPC_BASE_PATH") or str(self.folder)
        return {
            "TMPDIR": str(self.folder),
            "TORCHINDUCTOR_CACHE_DIR": compiled,
            "VLLM_RPC_BASE_PATH": sockets,
            processes.ERROR_FILE_VARIABLE: str(self._error_file),
        }

    @property
    def _error_file(self) -> Path:
        return self.folder / "reason"

    def read_error(self) -> str:
        """Return the error with which a process could not start; "" if there is none."""
        return self._error_file.read_text(encoding="utf-8") if self._error_file.is_file() else ""

    def finish_start(self) -> None:
        """Stop watching for shared memory: a started engine creates no more."""
        self._record_shared_memory()
        self._has_started.set()

    def end(self) -> None:
        """Kill the processes that still run, and remove what they leave."""
        self._record_shared_memory()
        self._has_started.set()
        for process in self._processes():
            processes.kill(process)
        for child in self._children():
            child.join(KILL_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS  # a process whose parent has ended cannot be joined
        while self._processes() and time.monotonic() < deadline:
            time.sleep(KILL_POLL_SECONDS)
        for name in self._shared:
            _remove_shared(name)
        self._temporary.remove()

    def _poll(self) -> None:
        """Record shared memory during the start.

        The processes of a failed start have ended afterwards.
        """
        while not self._has_started.wait(POLL_SECONDS):
            self._record_shared_memory()

    def _record_shared_memory(self) -> None:
        inodes = set().union(*map(_mapped_inodes, self._processes())) - _mapped_inodes(os.getpid())
        if inodes:
            files = [file for file in os.scandir(SHARED_MEMORY) if any(name in file.name for name in SHARED_NAMES)]
            self._shared |= {file.name for file in files if file.inode() in inodes}

    def _children(self) -> list:
        return [child for child in multiprocessing.active_children() if child.pid not in self._older]

    def _processes(self) -> list[int]:
        """Return the processes that run now, with those whose parent was killed.

        The latter are no descendants any more.
        """
        for process in processes.descendants(child.pid for child in self._children()):
            if started := processes.start_time(process):
                self._start_times[process] = started
        return [process for process, started in self._start_times.items() if processes.start_time(process) == started]


def _mapped_inodes(process: int) -> set[int]:
    """Return the inodes of a process's shared memory.

    A semaphore is mapped under another name than its own.
    """
    try:
        lines = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}


def _remove_shared(name: str) -> None:
    """Remove a file of shared memory and its entry in Python's resource tracker.

    The tracker would warn about it.
    """
    try:
        SHARED_MEMORY.joinpath(name).unlink()
    except FileNotFoundError:
        return
    if not name.startswith(TRACKED_NAMES):
        return
    semaphore = name.removeprefix("sem.")
    kind = "shared_memory" if semaphore == name else "semaphore"
    resource_tracker.register(f"/{semaphore}", kind)  # unregistering an unknown name would be an error
    resource_tracker.unregister(f"/{semaphore}", kind)
