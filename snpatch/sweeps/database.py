"""Database: the SQLite file of a store, opened to write or only to read; its content is checked, its locks waited for.

Why a reader may work on a copy: SQLite writes next to a file with a write-ahead log even to read it, and results must
be readable from archives and read-only folders. A file without a log has no writer and is read in place; one with a
log and no shared index lost its writer and is copied; any other file has a live writer and is shared with it.
"""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import TypeVar

from snpatch.errors import SnpatchError, first_line, one_line
from snpatch.sweeps.owners import Process

VERSION = 5

TABLES = """
CREATE TABLE texts (
  key TEXT PRIMARY KEY,           -- content hash of the request, see generation.plan_completions
  completion TEXT NOT NULL,
  token_ids BLOB NOT NULL,        -- int32
  finish_reason TEXT NOT NULL,
  overwrites INTEGER NOT NULL,
  written REAL NOT NULL           -- seconds since 1970
) WITHOUT ROWID;
CREATE TABLE scores (
  text TEXT NOT NULL,             -- see store.completion_key
  judge TEXT NOT NULL,            -- see judging.judge_keys
  score REAL NOT NULL,
  PRIMARY KEY (text, judge)
) WITHOUT ROWID;
CREATE TABLE work (              -- requested completions; finished if `texts` has the key
  id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of requests, so that a claim changes few pages of the file
  key TEXT NOT NULL UNIQUE,
  owner TEXT,                     -- the process that generates it now
  expires REAL,
  attempts INTEGER NOT NULL,      -- runs that failed while they generated it
  error TEXT,                     -- of the last of these runs
  failed INTEGER NOT NULL         -- 1: given up
);
CREATE INDEX work_owner ON work (owner) WHERE owner IS NOT NULL;
CREATE TABLE asked (               -- labels of the completions of each sweep
  place INTEGER PRIMARY KEY,
  sweep TEXT NOT NULL,
  key TEXT,                       -- NULL: its prompt cannot be run
  labels TEXT NOT NULL,           -- JSON: set, prompt_index, sample, prompt, recipient, donor, ranking, ...
  error TEXT
);
CREATE TABLE judges (
  name TEXT PRIMARY KEY,
  judge TEXT NOT NULL             -- key of its scores in the last sweep with it, see judging.judge_keys
);
CREATE TABLE failures (
  place TEXT NOT NULL,            -- JSON labels: a prompt of a set, or a completion and a judge
  error TEXT NOT NULL,
  at REAL NOT NULL
);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  owner TEXT NOT NULL,
  command TEXT NOT NULL,
  started REAL NOT NULL,
  ended REAL,
  outcome TEXT                    -- NULL: running, or killed
);
CREATE TABLE owners (              -- processes that have the store open to write, see owners.Process
  owner TEXT PRIMARY KEY,         -- a random id
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  namespace TEXT,
  started INTEGER,
  beat REAL NOT NULL              -- its last heartbeat, seconds since 1970
) WITHOUT ROWID;
"""
SELECT_OWNERS = "SELECT owner, host, pid, namespace, started, beat FROM owners"
LOCK_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
ENVIRONMENT_CODES = (  # faults of the disk, the folder or the machine; all other codes concern the file's content
    *LOCK_CODES, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
)  # fmt: skip
LOCK_TIMEOUT_S = 1.0  # SQLite waits at most this long for a lock, so that Python can handle Ctrl-C
MAX_VARIABLES = 500  # of one statement

Kinds = tuple[type | UnionType, ...]
Result = TypeVar("Result")


class Database:
    """An open store file. Each of its errors is a SnpatchError of one line.

    Args:
        path: The file; None keeps everything in memory.
        is_reader: Write nothing, to the file or next to it.
        patience_s: Seconds to wait for a locked file.
    """

    def __init__(self, path: Path | None, is_reader: bool = False, patience_s: float = 0.0) -> None:
        self.path, self._is_reader, self._patience_s = path, is_reader, patience_s
        self._opened = ExitStack()  # the connection, and the folder of a copy
        self._stamp: tuple | None = None
        try:
            with self._errors():
                if is_reader:
                    assert path is not None
                    self._open_to_read(path)
                else:
                    self._open_to_write()
        except BaseException:
            self._opened.close()
            raise

    def close(self) -> None:
        """Close the file. Raise if it changed while a reader could not see changes."""
        self._opened.close()
        self._check_unchanged()

    def rows(self, statement: str, *values: object, kinds: Kinds | None = None) -> list[tuple]:
        """Return all rows of a statement. Raise if a value is not of its column's type in `kinds`."""
        with self._errors():
            rows = self._wait_for(lambda: self._connection.execute(statement, values).fetchall())
        return rows if kinds is None else self._checked(rows, kinds)

    def row(self, statement: str, *values: object, kinds: Kinds | None = None) -> tuple:
        """Return the only row of a statement."""
        return self.rows(statement, *values, kinds=kinds)[0]

    def insert(self, statement: str, *values: object) -> int:
        """Insert one row and return its number."""
        with self._errors():
            number = self._wait_for(lambda: self._connection.execute(statement, values).lastrowid)
        assert number is not None  # after an INSERT
        return number

    def many(self, statement: str, rows: Iterable[tuple]) -> None:
        """Run a statement for each row, within a transaction."""
        with self._errors():
            self._connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[float]:
        """Run the block as one transaction, and yield the seconds waited for the lock.

        A reader sees one state.
        """
        start = time.monotonic()
        self.rows("BEGIN" if self._is_reader else "BEGIN IMMEDIATE")
        try:
            yield time.monotonic() - start
            self.rows("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.rows("ROLLBACK")
            raise

    def owners(self) -> dict[str, tuple[Process, float]]:
        """Return the processes that have the file open to write, each with its last heartbeat."""
        return self._processes(self.rows(SELECT_OWNERS))

    def damaged(self, reason: object) -> SnpatchError:
        """Return the error for content that no store has."""
        return SnpatchError(f"{self.path}: damaged: {one_line(str(reason))}. Restore a copy, or choose another folder.")

    def parse_json(self, text: str, column: str) -> dict:
        """Return the JSON object in a column."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.damaged(f"{column} is no JSON object: {text!r:.60}")
        return value

    def _open_to_write(self) -> None:
        self._connect(":memory:" if self.path is None else self.path)
        self._check_version()
        self.rows("PRAGMA journal_mode = WAL")
        self.rows("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the last texts, at most
        with self.transaction():
            if self._version() == 0:
                self._run_script(TABLES)
                self.rows(f"PRAGMA user_version = {VERSION}")
        self._check_content()

    def _open_to_read(self, path: Path) -> None:
        log, index = (path.with_name(f"{path.name}-{suffix}") for suffix in ("wal", "shm"))
        if not _get_file_size(log):
            self._stamp = _stamp(path)
            self._connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1")
        elif not index.exists() or not self._is_shared(path):
            copy = Path(self._opened.enter_context(TemporaryDirectory(prefix="snpatch-"))) / path.name
            shutil.copyfile(path, copy)
            shutil.copyfile(log, copy.with_name(f"{copy.name}-wal"))
            self._connect(copy)
        self.rows("PRAGMA query_only = ON")
        self._check_version()
        if self._version() == 0:
            raise SnpatchError(f"{path}: expected a sweep's store, got a file without its tables.")
        self._check_content()

    def _is_shared(self, path: Path) -> bool:
        """Open the file together with its writer; return False if the folder does not allow that."""
        try:
            self._connect(f"{path.resolve().as_uri()}?mode=ro")
            self._wait_for(lambda: self._connection.execute("SELECT count(*) FROM sqlite_master").fetchall())
        except sqlite3.OperationalError as error:
            if _get_error_code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
            self._opened.close()
            return False
        return True

    def _connect(self, target: str | Path) -> None:
        is_uri = str(target).startswith("file:")
        timeout = min(LOCK_TIMEOUT_S, self._patience_s)
        self._connection = sqlite3.connect(target, timeout=timeout, isolation_level=None, uri=is_uri)
        self._opened.callback(self._connection.close)
        self._connection.execute("PRAGMA trusted_schema = OFF")

    def _check_version(self) -> None:
        version = self._version()
        if version not in (0, VERSION):
            raise SnpatchError(
                f"{self.path}: expected version {VERSION} of a sweep's store, got {version}, which is of another "
                "snpatch. Use that version, or choose another folder."
            )

    def _version(self) -> int:
        return self.row("PRAGMA user_version")[0]

    def _check_content(self) -> None:
        """Raise unless the file is intact and has the tables of a store.

        It must contain nothing that runs on its own (a trigger).
        """
        kinds = dict(self.rows("SELECT name, type FROM sqlite_master", kinds=(str, str)))
        if "trigger" in kinds.values():
            raise self.damaged("it has a trigger, and no store has one")
        for name, columns in _expected_columns().items():
            if kinds.get(name) != "table" or self.rows(f"PRAGMA table_xinfo({name})") != columns:
                raise self.damaged(f"{name} is not the table that a store has")
        if (verdicts := self.rows("PRAGMA quick_check(1)")) != [("ok",)]:
            raise self.damaged(verdicts)

    def _run_script(self, script: str) -> None:
        for statement in script.split(";\n"):
            self.rows(statement)

    def _checked(self, rows: list[tuple], kinds: Kinds) -> list[tuple]:
        for row in rows:
            for value, kind in zip(row, kinds, strict=True):
                if not isinstance(value, kind):
                    raise self.damaged(f"{value!r:.60} where {getattr(kind, '__name__', kind)} is expected")
        return rows

    def _processes(self, rows: list[tuple]) -> dict[str, tuple[Process, float]]:
        processes = {}
        for owner, *fields, beat in self._checked(rows, (str, str, int, str | None, int | None, float)):
            process = Process(*fields)
            if not 0 < process.pid < 2**31:
                raise self.damaged(f"{process.pid} where the number of a process is expected")
            processes[owner] = process, beat
        return processes

    def _wait_for(self, step: Callable[[], Result]) -> Result:
        """Run a step; repeat it while another process holds the lock."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return step()
            except sqlite3.OperationalError as error:
                if _get_error_code(error) not in LOCK_CODES or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)  # SQLite has waited already, unless it expects a deadlock

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a bug of this package
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:
            if _get_error_code(error) in LOCK_CODES:
                raise SnpatchError(
                    f"cannot use {self.path}: it was locked for {self._patience_s:g} s by {self._holders()}. Let that "
                    "process continue or end it, and run the command again."
                ) from error
            if _get_error_code(error) in ENVIRONMENT_CODES or self.path is None:
                raise SnpatchError(f"cannot use {self.path}: {first_line(error)}") from error
            self._check_unchanged()
            raise self.damaged(first_line(error)) from error
        except OSError as error:
            raise SnpatchError(f"cannot use {self.path}: {error}") from error

    def _holders(self) -> str:
        """Describe the processes that may hold the lock.

        These are stopped ones, or else all others that write to the file.
        """
        try:
            rows = self._connection.execute(SELECT_OWNERS).fetchall()
        except sqlite3.Error:  # the file is locked for readers, too
            rows = []
        me = Process.current()
        alive = [(p, beat) for p, beat in self._processes(rows).values() if p != me and not p.has_ended()]
        stopped = [f"{p.host} process {p.pid}, which is stopped" for p, _ in alive if p.is_stopped()]
        now = time.time()
        others = [f"{p.host} process {p.pid} (last heartbeat {now - beat:.0f} s ago)" for p, beat in alive]
        return one_line(" or ".join(stopped or others)) or "a process that is not a sweep"

    def _check_unchanged(self) -> None:
        if self.path is not None and self._stamp is not None and self._stamp != _stamp(self.path):
            raise SnpatchError(f"{self.path}: a sweep wrote to it while it was read. Run the command again.")


def chunked(keys: list[str]) -> Iterator[list[str]]:
    """Yield the keys in lists that fit into one statement."""
    for start in range(0, len(keys), MAX_VARIABLES):
        yield keys[start : start + MAX_VARIABLES]


@cache
def _expected_columns() -> dict[str, list[tuple]]:
    """Return the columns of each table of a store, as SQLite describes them."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(TABLES)
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}
    connection.close()
    return {name: columns[name] for name in names if not name.startswith("sqlite_")}


def _get_error_code(error: Exception) -> int | None:
    """Return SQLite's primary error code, or None for other errors."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _stamp(path: Path) -> tuple:
    """Return what differs after a file was changed or replaced."""
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _get_file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
