"""A log of records in a folder, one JSON object a line, that survives being killed at any point."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from snpatch.errors import SnpatchError

NAME = "completions.jsonl"


class Store:
    """Use as a context. `records`: key -> record of what earlier runs wrote. folder None: keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.records: dict[str, dict] = {}
        self._path = None if folder is None else Path(folder) / NAME
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Store":
        if self._path is None:
            return self
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+b", buffering=0)
        except OSError as error:
            raise SnpatchError(f"cannot write {self._path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(self._read())
        except BlockingIOError:
            self._close()
            raise SnpatchError(f"{self._path.parent} is in use by another sweep") from None
        except OSError as error:
            self._close()
            raise SnpatchError(f"cannot write {self._path}: {error.strerror or error}") from error
        except SnpatchError:
            self._close()
            raise
        return self

    def append(self, key: str, record: dict) -> None:
        """Keep a record; unbuffered, so that killing the process loses none that were appended."""
        self.records[key] = record
        if self._file is None:
            return
        line = json.dumps({"key": key, **record}).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise SnpatchError(f"cannot write {self._path}: {error.strerror or error}") from error

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._close()

    def _read(self) -> int:
        """Take in what earlier runs wrote; the bytes of whole records."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file.readlines(), start=1):
            if not line.endswith(b"\n"):
                break  # a record that was being written when the run was killed
            try:
                record = json.loads(line)
                self.records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError) as error:
                raise SnpatchError(f"{self._path}, line {number}: not a record of a sweep: {error}") from error
            whole += len(line)
        return whole

    def _close(self) -> None:
        self._file.close()
        self._file = None
