"""Process: the identity of a process that writes to a store, and the proof that it has ended.

Why host name and process number are not enough: two containers may share both. Boot of the machine, namespace of
process numbers and start of the process together prove that it has ended.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PROC = Path("/proc")
ENDED_STATES = "ZX"  # in /proc/PID/stat: zombie, dead
STOPPED_STATES = "Tt"  # stopped by a signal, or by a debugger


@dataclass(frozen=True)
class Process:
    """A process of some machine.

    Attributes:
        host: Host name, for messages only.
        pid: Process number in its namespace.
        namespace: Boot id of the machine and namespace of process numbers; None if the system does not tell.
        started: Clock ticks from boot to the start of the process; None if the system does not tell.
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
        """Return True if the process has provably ended.

        It is of our namespace, and its number is free or reused.
        """
        if self.namespace is None or self.started is None or self.namespace != _read_namespace():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        stat = _read_stat(self.pid)
        return stat is not None and (stat[0] in ENDED_STATES or stat[1] != self.started)

    def is_stopped(self) -> bool:
        """Return True if the process is of our namespace and a signal or a debugger has stopped it."""
        stat = _read_stat(self.pid) if self.namespace is not None and self.namespace == _read_namespace() else None
        return stat is not None and stat[0] in STOPPED_STATES and stat[1] == self.started


def _read_namespace() -> str | None:
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return None


def _read_stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time of a process, or None if it is not visible."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
