"""Temporary folders that the next start removes if their process was killed.

Why a file lock and not a process id: the kernel releases a lock however its holder ends, and a later process, or one
of another container, can have the same id.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from snpatch.utils.files import open_regular

PREFIX = "snpatch-"
LOCK_FILE = "owner"  # locked by the folder's process and by those that it forked


class TemporaryFolder:
    """Temporary folder of this process, at `path`."""

    def __init__(self, root: str | Path) -> None:
        remove_abandoned(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        unlocked = self.path / f"{LOCK_FILE}.new"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unlocked.rename(self.path / LOCK_FILE)  # a file of this name is never seen unlocked
        except OSError:  # a file system without locks: later starts cannot tell that this process has ended
            unlocked.unlink()

    def remove(self) -> None:
        """Remove the folder and its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(root: str | Path) -> None:
    """Remove the folders in `root` whose process has ended."""
    for path in Path(root).glob(f"{PREFIX}*/{LOCK_FILE}"):
        if _is_unlocked(path):
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_unlocked(path: Path) -> bool:
    try:
        with closing(open(path, opener=open_regular)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # locked, another user's, or removed meanwhile
        return False
