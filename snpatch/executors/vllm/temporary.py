"""Temporary folders that a killed process cannot leave behind for good: the next start removes them.

Why a lock and no process id: the kernel gives it back however its holder ends, and no later process can be taken for
the holder, in another container of the same machine neither.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from snpatch.files import open_regular

PREFIX = "snpatch-"
OWNER = "owner"  # the file that its process, and those that it forked, hold locked


class TemporaryFolder:
    """A temporary folder of this process. path: the folder."""

    def __init__(self, root: str | Path) -> None:
        """Remove what ended processes left in `root`, and make a folder there."""
        remove_abandoned(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        unlocked = self.path / f"{OWNER}.new"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unlocked.rename(self.path / OWNER)  # under this name it was always locked
        except OSError:  # a file system without locks: nobody can see that this process has ended
            unlocked.unlink()

    def remove(self) -> None:
        """Remove the folder with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(root: str | Path) -> None:
    """Remove the folders in `root` whose process has ended."""
    for path in Path(root).glob(f"{PREFIX}*/{OWNER}"):
        if _is_unlocked(path):
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_unlocked(path: Path) -> bool:
    try:
        with closing(open(path, opener=open_regular)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # locked, another user's, or removed meanwhile
        return False
