"""The store of a sweep's folder: texts, scores, open work and failures, in one SQLite file that any kill leaves whole.

Why work is taken under a lease: several processes of one machine may fill the same folder, and what a dead one had
taken must become free again. A process whose end can be seen is not waited for.
"""

import hashlib
import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snpatch.errors import SnpatchError

NAME = "sweep.sqlite"
OLD = "completions.jsonl"  # of the versions before it
LEASE_S = 60.0
APART = 8  # into so many groups what was under way in a failed run is split, until the text that fails is found
VERSION = 2

SCHEMA = """
CREATE TABLE texts (
  key TEXT PRIMARY KEY,           -- names everything that made the text, see texts.key_of
  completion TEXT NOT NULL,
  token_ids BLOB NOT NULL,        -- int32
  finish_reason TEXT NOT NULL,
  overwrites INTEGER NOT NULL,
  written REAL NOT NULL           -- seconds since 1970
) WITHOUT ROWID;
CREATE TABLE scores (
  text TEXT NOT NULL,             -- names prompt and completion
  judge TEXT NOT NULL,            -- its digest
  score REAL NOT NULL,
  PRIMARY KEY (text, judge)
) WITHOUT ROWID;
CREATE TABLE work (              -- texts that were asked for: done where `texts` has the key
  id INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of asking, so that a claim changes few pages of the file
  key TEXT NOT NULL UNIQUE,
  owner TEXT,                     -- who writes it now
  expires REAL,
  attempts INTEGER NOT NULL,      -- how many runs failed while it was under way
  error TEXT,                     -- of the last of them
  failed INTEGER NOT NULL         -- 1: given up
);
CREATE INDEX work_owner ON work (owner) WHERE owner IS NOT NULL;
CREATE TABLE asked (               -- sweeps' texts, by what they are called
  place INTEGER PRIMARY KEY,
  sweep TEXT NOT NULL,
  key TEXT,                       -- NULL: its prompt cannot be run
  labels TEXT NOT NULL,           -- JSON: set, prompt_index, sample, prompt, recipient, donor, ranking, ...
  error TEXT
);
CREATE TABLE judges (
  name TEXT PRIMARY KEY,
  judge TEXT NOT NULL             -- the digest that its scores are kept under, since the last sweep with it
);
CREATE TABLE failures (
  place TEXT NOT NULL,            -- JSON: which prompt of which set, or which text before which judge
  error TEXT NOT NULL,
  at REAL NOT NULL
);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  owner TEXT NOT NULL,
  command TEXT NOT NULL,
  started REAL NOT NULL,
  ended REAL,
  outcome TEXT                    -- NULL: still under way, or killed
);
"""

ASKED = "CREATE TEMP TABLE mine (place INTEGER PRIMARY KEY, work INTEGER NOT NULL UNIQUE)"
IS_OPEN = "NOT w.failed AND NOT EXISTS (SELECT 1 FROM texts t WHERE t.key = w.key)"
OPEN = f"FROM mine m JOIN work w ON w.id = m.work WHERE {IS_OPEN}"
FREE = f"{OPEN} AND (w.owner IS NULL OR w.expires < ?)"


@dataclass(frozen=True)
class Text:
    """A completion as it is kept."""

    completion: str
    token_ids: list[int]
    finish_reason: str
    overwrites: int


@dataclass(frozen=True)
class Status:
    """How far a folder's work is. taken: open, and being written now. rate: texts a second in the last minutes, None
    where nothing was written; left_s: seconds that the open ones would take at it."""

    done: int
    open: int
    taken: int
    failed: int
    scores: int
    failures: tuple[dict, ...]
    rate: float | None
    left_s: float | None
    runs: tuple[dict, ...]


class Store:
    """Use as a context, from one thread. folder None: kept in memory. must_exist: an error where there is none yet.

    name: of the file, where it is a worker's part of a sweep.
    """

    def __init__(self, folder: str | Path | None, must_exist: bool = False, name: str = NAME) -> None:
        self.path = None if folder is None else Path(folder) / name
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._must_exist = must_exist
        self._connection: sqlite3.Connection | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> "Store":
        if self.path is not None:
            if self._must_exist and not self.path.is_file():
                raise SnpatchError(f"{self.path.parent} holds no sweep ({NAME})")
            if (self.path.parent / OLD).is_file() and not self.path.is_file():
                raise SnpatchError(
                    f"{self.path.parent / OLD} is of an older snpatch, whose texts have other keys: move it away, or "
                    "choose another folder"
                )
        with self._errors():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._connect()
            self._migrate()
            self._execute(ASKED)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        try:
            with self._transaction():
                self._execute("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", self.owner)
                self._execute("DELETE FROM work WHERE key IN (SELECT key FROM texts)")
        finally:
            self._connection.close()
            self._connection = None

    # ---- texts --------------------------------------------------------------------------------------------------

    def texts(self, keys: Iterable[str]) -> dict[str, Text]:
        """Those of the texts that are there."""
        found = {}
        for part in _parts(list(keys), 500):
            marks = ",".join("?" * len(part))
            for key, completion, ids, reason, overwrites in self._execute(
                f"SELECT key, completion, token_ids, finish_reason, overwrites FROM texts WHERE key IN ({marks})", *part
            ):
                found[key] = Text(completion, array("i", ids).tolist(), reason, overwrites)
        return found

    def keep(self, key: str, text: Text) -> None:
        """A text is finished; from here on nothing but a broken disk loses it."""
        ids = array("i", text.token_ids).tobytes()
        self._execute(
            "INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)",
            key, text.completion, ids, text.finish_reason, text.overwrites, time.time(),
        )  # fmt: skip

    # ---- work ---------------------------------------------------------------------------------------------------

    def ask(self, keys: Sequence[str]) -> int:
        """These texts are wanted, in this order; how many of them are missing. What failed before is open again."""
        with self._transaction():
            self._execute("DELETE FROM mine")
            rows = [(key,) for key in keys]
            self._many(
                "INSERT OR IGNORE INTO work (key, attempts, failed) "
                "SELECT ?1, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM texts WHERE key = ?1)", rows,
            )  # fmt: skip
            self._many(
                "INSERT OR IGNORE INTO mine (work) "
                "SELECT id FROM work w WHERE key = ? AND NOT EXISTS (SELECT 1 FROM texts t WHERE t.key = w.key)", rows,
            )  # fmt: skip
            self._execute("UPDATE work SET failed = 0, attempts = 0 WHERE failed AND id IN (SELECT work FROM mine)")
            (missing,) = self._row("SELECT count(*) FROM mine")
        return missing

    def claim(self, most: int) -> list[str]:
        """So many of the texts asked for that nobody writes, under a lease of this process. Those that were under way
        in a run that failed come last, and in a group of their own: see `suspect`."""
        with self._transaction():
            now = time.time()
            free = self._free(now, most, 0)
            if not free:
                self._free_dead()
                free = self._free(now, most, 0)
            if not free:
                suspects = self._execute(
                    f"SELECT w.attempts, count(*) {FREE} AND w.attempts > 0 GROUP BY w.attempts "
                    "ORDER BY w.attempts DESC LIMIT 1", now,
                ).fetchone()  # fmt: skip
                if suspects is not None:
                    free = self._free(now, -(-suspects[1] // APART), suspects[0])
            lease = self.owner, now + LEASE_S
            self._many("UPDATE work SET owner = ?, expires = ? WHERE id = ?", ((*lease, work) for work, _ in free))
            self._many("DELETE FROM mine WHERE work = ?", ((work,) for work, _ in free))
        keys = [key for _, key in free]
        if keys and self._beat is None and self.path is not None:
            self._beat = threading.Thread(target=self._renew, name="snpatch-lease", daemon=True)
            self._beat.start()
        return keys

    def is_suspect(self, key: str) -> bool:
        """Whether a run failed while it was under way."""
        return bool(self._row("SELECT attempts FROM work WHERE key = ?", key)[0])

    def missing(self) -> int:
        """How many of the texts asked for are open, here (but for those that are taken) or elsewhere."""
        return self._row(f"SELECT count(*) {OPEN}")[0]

    def suspect(self, error: str, keys: Sequence[str] | None = None) -> int:
        """A run failed: what was under way in it is to be tried again in smaller groups; what was alone has failed.

        keys: what was under way; None: all that this process has taken. Returns how many that were.
        """
        with self._transaction():
            if keys is None:
                taken = self._execute(f"SELECT w.key FROM work w WHERE w.owner = ? AND {IS_OPEN}", self.owner)
                keys = [key for (key,) in taken]
            self._many(
                "UPDATE work SET owner = NULL, expires = NULL, attempts = attempts + 1, error = ?, failed = ? "
                "WHERE key = ?",
                ((error, len(keys) == 1, key) for key in keys),
            )
            self._many("INSERT OR IGNORE INTO mine (work) SELECT id FROM work WHERE key = ?", ((key,) for key in keys))
        return len(keys)

    def errors(self, keys: Iterable[str]) -> dict[str, str]:
        """Why each of these failed that did."""
        found = {}
        for part in _parts(list(keys), 500):
            marks = ",".join("?" * len(part))
            found |= dict(
                self._execute(f"SELECT key, error FROM work WHERE failed AND key IN ({marks})", *part).fetchall()
            )
        return found

    # ---- a sweep ------------------------------------------------------------------------------------------------

    def name(self, sweep: str, labels: Sequence[tuple[str | None, Mapping[str, object], str | None]]) -> None:
        """What a sweep's texts are called: key, labels and why there is none, in the order of its points."""
        with self._transaction():
            self._execute("DELETE FROM asked WHERE sweep = ?", sweep)
            self._many(
                "INSERT INTO asked (sweep, key, labels, error) VALUES (?, ?, ?, ?)",
                ((sweep, key, json.dumps(dict(own)), error) for key, own, error in labels),
            )

    def name_judges(self, digests: Mapping[str, str]) -> None:
        """Under which digests the scores of a sweep's judges are kept, by the judge's name.

        Those of an earlier run of a judge without a digest, which holds a space, are not needed any more.
        """
        with self._transaction():
            self._many(
                "DELETE FROM scores WHERE judge = (SELECT judge FROM judges WHERE name = ? AND judge LIKE '% %')",
                ((name,) for name in digests),
            )
            self._many("INSERT OR REPLACE INTO judges VALUES (?, ?)", digests.items())

    def records(self) -> Iterator[dict]:
        """The texts of all sweeps as they are now, by what they are called, with the scores that they have."""
        judges = dict(self._execute("SELECT name, judge FROM judges").fetchall())
        scores = {name: self.scores(judge) for name, judge in judges.items()}
        rows = self._execute(
            "SELECT a.labels, coalesce(a.error, CASE WHEN w.failed THEN w.error END), t.completion, t.token_ids, "
            "t.finish_reason, t.overwrites "
            "FROM asked a LEFT JOIN texts t USING (key) LEFT JOIN work w USING (key) ORDER BY a.place"
        )
        told = set()
        for labels, error, completion, ids, reason, overwrites in rows.fetchall():
            if labels in told:
                continue  # two sweeps have the point
            told.add(labels)
            record = json.loads(labels)
            text = None if completion is None else text_of(record["prompt"], completion)
            yield {
                **record,
                "completion": completion,
                "tokens": 0 if ids is None else len(ids) // 4,
                "finish_reason": reason,
                "overwrites": overwrites or 0,
                "error": None if completion is not None else error,
                "scores": {name: kept.get(text) for name, kept in scores.items()},
            }

    def take_in(self, part: Path) -> int:
        """The texts and scores of a worker's file, see part_name; how many texts there were."""
        with self._errors():
            other = sqlite3.connect(part)
            try:
                (version,) = other.execute("PRAGMA user_version").fetchone()
                if version != VERSION:
                    raise SnpatchError(f"{part} is of another snpatch (version {version} of its tables)")
                rows = {table: other.execute(f"SELECT * FROM {table}").fetchall() for table in ("texts", "scores")}
            finally:
                other.close()
        with self._transaction():
            self._many("INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)", rows["texts"])
            self._many("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows["scores"])
        return len(rows["texts"])

    # ---- scores and failures --------------------------------------------------------------------------------------

    def scores(self, judge: str) -> dict[str, float]:
        """text -> score, of all that a judge of this digest scored."""
        return dict(self._execute("SELECT text, score FROM scores WHERE judge = ?", judge).fetchall())

    def keep_scores(self, judge: str, scores: Mapping[str, float]) -> None:
        """Scores by text."""
        with self._transaction():
            self._many(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", ((text, judge, s) for text, s in scores.items())
            )

    def fail(self, place: Mapping[str, object], error: str) -> None:
        """Note what went wrong besides texts: a prompt that cannot be read, a text that a judge cannot score."""
        self._execute("INSERT INTO failures VALUES (?, ?, ?)", json.dumps(place), error, time.time())

    # ---- runs ---------------------------------------------------------------------------------------------------

    def begin(self, command: str) -> int:
        """A run begins, which forgets the failures of those before it; its number."""
        with self._transaction():
            self._execute("DELETE FROM failures")
            return self._execute(
                "INSERT INTO runs (owner, command, started) VALUES (?, ?, ?)", self.owner, command, time.time()
            ).lastrowid

    def end(self, run: int, outcome: str) -> None:
        """A run ends: "done", or what stopped it."""
        self._execute("UPDATE runs SET ended = ?, outcome = ? WHERE id = ?", time.time(), outcome, run)

    def status(self, window_s: float = 300.0) -> Status:
        """How far everything is that was ever asked for. window_s: over which the rate is taken."""
        now = time.time()
        with self._transaction():
            self._free_dead()
            (done,) = self._row("SELECT count(*) FROM texts")
            left, taken = self._row(
                f"SELECT count(*), count(w.owner) FILTER (WHERE w.expires > ?) FROM work w WHERE {IS_OPEN}", now
            )
            last, n, first = self._row(
                "SELECT max(written), count(*), min(written) FROM texts WHERE written > "
                "(SELECT max(written) FROM texts) - ?", window_s,
            )  # fmt: skip
            (scores,) = self._row("SELECT count(*) FROM scores")
            failures = [
                {"error": error, **json.loads(place)}
                for place, error in self._execute("SELECT place, error FROM failures")
            ]
            failures += [
                {"error": error, "key": key} for key, error in self._execute("SELECT key, error FROM work WHERE failed")
            ]
            names = ("owner", "command", "started", "ended", "outcome")
            runs = [dict(zip(names, row, strict=True)) for row in self._execute(f"SELECT {', '.join(names)} FROM runs")]
        rate = (n - 1) / (last - first) if n and last > first else None
        return Status(
            done, left, taken, sum("key" in one for one in failures), scores, tuple(failures),
            rate, left / rate if rate else None, tuple(runs),
        )  # fmt: skip

    # ---- the file -----------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        target = ":memory:" if self.path is None else self.path
        connection = sqlite3.connect(target, timeout=60, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the last texts, at most
        return connection

    def _migrate(self) -> None:
        with self._transaction():
            (version,) = self._row("PRAGMA user_version")
            if version == 0:
                for statement in SCHEMA.split(";\n"):
                    self._execute(statement)
                self._execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise SnpatchError(f"{self.path} is of another snpatch (version {version} of its tables)")

    def _free(self, now: float, most: int, attempts: int) -> list[tuple[int, str]]:
        """So many of the texts asked for (id, key) that nobody writes and so many runs failed with."""
        return self._execute(
            f"SELECT w.id, w.key {FREE} AND w.attempts = ? ORDER BY m.place LIMIT ?", now, attempts, most
        ).fetchall()

    def _free_dead(self) -> None:
        """Leases of processes of this machine that are no more."""
        here = socket.gethostname()
        for (owner,) in self._execute("SELECT DISTINCT owner FROM work WHERE owner IS NOT NULL").fetchall():
            host, pid, _ = owner.rsplit(":", 2)
            if host == here and owner != self.owner and not _is_alive(int(pid)):
                self._execute("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", owner)

    def _renew(self) -> None:
        """Keep the leases while this process lives, whatever it waits for."""
        connection = self._connect()
        while not self._stop.wait(LEASE_S / 4):
            connection.execute("UPDATE work SET expires = ? WHERE owner = ?", (time.time() + LEASE_S, self.owner))
        connection.close()

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        with self._errors():
            return self._connection.execute(statement, values)

    def _many(self, statement: str, rows: Iterable[tuple]) -> None:
        with self._errors():
            self._connection.executemany(statement, rows)

    def _row(self, statement: str, *values: object) -> tuple:
        return self._execute(statement, *values).fetchone()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise SnpatchError(f"cannot use {self.path}: {error}") from error


def part_name(worker: int, workers: int) -> str:
    """The file of one of several workers, counted from 1."""
    return f"sweep-{worker}-of-{workers}.sqlite"


def parts_in(folder: str | Path) -> list[Path]:
    """The files of all workers in a folder."""
    return sorted(Path(folder).glob("sweep-*-of-*.sqlite"))


def text_of(prompt: str, completion: str) -> str:
    """Names a completion as an answer to its prompt, by content."""
    return hashlib.sha256(f"{prompt}\0{completion}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _parts(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
