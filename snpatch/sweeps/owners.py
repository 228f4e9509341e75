"""Processes that write to a store: their identity, and the proof that one of them has ended.

Why not host name and process number alone: two containers may share both. A random id names a process. Only the start
of its machine, its namespace of process numbers and its own start prove that it has ended.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PROC = Path("/proc")
ENDED = "ZX"  # states of a process that has ended and was not waited for, or is just ending
STOPPED = "Tt"


@dataclass(frozen=True)
class Process:
    """A process of some machine. host and pid are for people.

    namespace: the start of its machine and its namespace of process numbers. started: clock ticks from the start of the
    machine to its own. Both are None where the system does not say.
    """

    host: str
    pid: int
    namespace: str | None
    started: int | None

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        stat = _read_stat(os.getpid())
        return cls(socket.gethostname(), os.getpid(), _read_namespace(), None if stat is None else stat[1])

    def has_ended(self) -> bool:
        """Return True if the process has provably ended: its namespace is ours, and its number is free or reused."""
        if self.namespace is None or self.started is None or self.namespace != _read_namespace():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        stat = _read_stat(self.pid)
        return stat is not None and (stat[0] in ENDED or stat[1] != self.started)

    def is_stopped(self) -> bool:
        """Return True if the process is of our namespace, and a signal or a debugger has stopped it."""
        stat = _read_stat(self.pid) if self.namespace is not None and self.namespace == _read_namespace() else None
        return stat is not None and stat[0] in STOPPED and stat[1] == self.started


def _read_namespace() -> str | None:
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return None


def _read_stat(pid: int) -> tuple[str, int] | None:
    """Return state and start of a process, or None where it cannot be seen."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
