"""State, parent and start time of a process of this machine, from /proc."""

from pathlib import Path
from typing import NamedTuple

ENDED_STATES = "ZX"  # zombie, dead
STOPPED_STATES = "Tt"  # stopped by a signal, or by a debugger


class ProcessStat(NamedTuple):
    """State of a process.

    Attributes:
        state: One letter, as in proc(5).
        parent: Process number of its parent.
        started: Clock ticks from the machine's start to the process's. A later process with the same number has
            another one.
    """

    state: str
    parent: int
    started: int

    @property
    def has_ended(self) -> bool:
        """True if the process runs no more: a zombie has ended."""
        return self.state in ENDED_STATES

    @property
    def is_stopped(self) -> bool:
        """True if a signal or a debugger has stopped the process."""
        return self.state in STOPPED_STATES


def read_process_stat(pid: int) -> ProcessStat | None:
    """Read the state of a process; None if it does not exist or is not visible."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessStat(fields[0], int(fields[1]), int(fields[19]))
