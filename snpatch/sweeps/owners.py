"""Process: the identity of a process that writes to a store, and the proof that it has ended.

Why host name and process number are not enough: two containers may share both. Boot of the machine, namespace of
process numbers and start of the process together prove that it has ended.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from snpatch.utils.process_stat import read_process_stat


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
        stat = read_process_stat(os.getpid())
        return cls(socket.gethostname(), os.getpid(), _read_namespace(), None if stat is None else stat.started)

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
        stat = read_process_stat(self.pid)
        return stat is not None and (stat.has_ended or stat.started != self.started)

    def is_stopped(self) -> bool:
        """Return True if the process is of our namespace and a signal or a debugger has stopped it."""
        if self.namespace is None or self.namespace != _read_namespace():
            return False
        stat = read_process_stat(self.pid)
        return stat is not None and stat.is_stopped and stat.started == self.started


def _read_namespace() -> str | None:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
