"""The processes that vLLM starts for one engine, and all that they leave in the temporary folder and in shared memory.

Why it is not left to them: a process that was killed removes nothing, and vLLM's own end kills what takes its time.
"""

import multiprocessing
import os
import tempfile
import threading
from multiprocessing import resource_tracker
from pathlib import Path

from snpatch.executors.vllm import processes
from snpatch.executors.vllm.temporary import TemporaryFolder

SHARED = Path("/dev/shm")
KINDS = ("psm_", "sem.mp-", "sem.loky-", "vllm_dist_", "-cpushm")  # Python's, joblib's, and vLLM's own on a CPU
LONGEST = 53  # characters of a temporary folder: a socket's path of 107 has room for no more
LOOK_S = 0.5
END_S = 5.0  # how long a killed process has to be gone


class ChildProcesses:
    """To be made before the engine starts. folder: the temporary folder of its processes."""

    def __init__(self) -> None:
        root = tempfile.gettempdir()
        self._temporary = TemporaryFolder(root if len(root) <= LONGEST else "/tmp")
        self.folder = self._temporary.path
        self._older = {child.pid for child in multiprocessing.active_children()}
        self._shared: set[str] = set()
        self._has_started = threading.Event()
        threading.Thread(target=self._look, daemon=True, name="snpatch-offspring").start()

    def environment(self) -> dict[str, str]:
        """Environment variables to start the engine in."""
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # What torch compiles is to outlive the engine; it would be in the temporary folder.
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
        sockets = os.environ.get("VLLM_RPC_BASE_PATH") or str(self.folder)
        return {
            "TMPDIR": str(self.folder),
            "TORCHINDUCTOR_CACHE_DIR": compiled,
            "VLLM_RPC_BASE_PATH": sockets,
            processes.REASON: str(self.folder / "reason"),
        }

    def reason(self) -> str:
        """Why a process says that it cannot start; "" if none does."""
        path = self.folder / "reason"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def started(self) -> None:
        """The engine is whole: it makes no shared memory any more."""
        self._note()
        self._has_started.set()

    def end(self) -> None:
        """End what still runs, and remove what all of them have left."""
        self._note()
        self._has_started.set()
        for process in self._processes():
            processes.kill(process)
        for child in self._children():
            child.join(END_S)
        for name in self._shared:
            _remove_shared(name)
        self._temporary.remove()

    def _look(self) -> None:
        """A start that fails has ended its processes before anybody can ask what they hold."""
        while not self._has_started.wait(LOOK_S):
            self._note()

    def _note(self) -> None:
        theirs = set().union(*map(_mapped_by, self._processes())) - _mapped_by(os.getpid())
        if theirs:
            files = [file for file in os.scandir(SHARED) if any(kind in file.name for kind in KINDS)]
            self._shared |= {file.name for file in files if file.inode() in theirs}

    def _children(self) -> list:
        return [child for child in multiprocessing.active_children() if child.pid not in self._older]

    def _processes(self) -> list[int]:
        return processes.descendants(child.pid for child in self._children())


def _mapped_by(process: int) -> set[int]:
    """Inodes of what a process has mapped of shared memory: a semaphore is mapped under another name than its own."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED}/" in line}


def _remove_shared(name: str) -> None:
    """Also from the list of Python's resource tracker, which would complain of it."""
    try:
        SHARED.joinpath(name).unlink()
    except FileNotFoundError:
        return
    semaphore = name.removeprefix("sem.")
    kind = "shared_memory" if semaphore == name else "semaphore"
    resource_tracker.register(f"/{semaphore}", kind)  # whether it knows of it or not
    resource_tracker.unregister(f"/{semaphore}", kind)
