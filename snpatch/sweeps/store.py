"""The store of a sweep's folder: texts, scores, open work and failures, in one SQLite file that any kill leaves whole.

Why work is taken under a lease: several processes may fill the same folder, and what a dead one had taken must become
free again. A lease is kept by a heartbeat; a process that has provably ended is not waited for.
"""

import hashlib
import json
import math
import socket
import sqlite3
import sys
import threading
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from snpatch.errors import SnpatchError
from snpatch.sweeps.database import Database, Kinds
from snpatch.sweeps.owners import Process

NAME = "sweep.sqlite"
OLD = "completions.jsonl"  # of the versions before it
LEASE_S = 60.0
APART = 8  # into so many groups what was under way in a failed run is split, until the text that fails is found
LABELS = {  # of a sweep's text: what each may be
    "set": (str,), "prompt_index": (int,), "prompt": (str,), "sample": (int, NoneType), "recipient": (str,),
    "donor": (str, NoneType), "ranking": (str, NoneType), "control_seed": (int, NoneType), "lo": (int,), "hi": (int,),
    "strength": (float, int, NoneType),
}  # fmt: skip
ASKED = "CREATE TEMP TABLE mine (place INTEGER PRIMARY KEY, work INTEGER NOT NULL UNIQUE)"
BEAT = "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?, ?)"
IS_OPEN = "NOT w.failed AND NOT EXISTS (SELECT 1 FROM texts t WHERE t.key = w.key)"
OPEN = f"FROM mine m JOIN work w ON w.id = m.work WHERE {IS_OPEN}"
FREE = f"{OPEN} AND (w.owner IS NULL OR w.expires IS NULL OR w.expires NOT BETWEEN ? AND ?)"


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
    """The store of a folder. Use as a context, from one thread. folder None: kept in memory.

    must_exist: an existing store is opened to be read alone; nothing is written, to it or beside it. name: of the file,
    where it is a worker's part of a sweep.
    """

    def __init__(self, folder: str | Path | None, must_exist: bool = False, name: str = NAME) -> None:
        self.path = None if folder is None else Path(folder) / name
        self.owner = f"{socket.gethostname()}:{uuid.uuid4().hex}"
        self._is_reader = must_exist
        self._database: Database | None = None
        self._taken: set[str] = set()
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        self._beat_connection: sqlite3.Connection | None = None

    def __enter__(self) -> "Store":
        if self.path is not None:
            if self._is_reader and not self.path.is_file():
                raise SnpatchError(f"{self.path.parent} holds no sweep ({NAME})")
            if (self.path.parent / OLD).is_file() and not self.path.is_file():
                raise SnpatchError(
                    f"{self.path.parent / OLD} is of an older snpatch, whose texts have other keys: move it away, or "
                    "choose another folder"
                )
            if not self._is_reader:
                _make_folder(self.path.parent)
        self._database = Database(self.path, self._is_reader, patience_s=2 * LEASE_S)
        if not self._is_reader:
            try:
                self._begin_to_write()
            except BaseException:
                self._database.close()
                raise
        return self

    def _begin_to_write(self) -> None:
        self._execute(ASKED)
        with self._database.transaction():
            self._free_dead()
            self._execute(BEAT, *self._heartbeat())
        if self.path is not None:
            self._beat = threading.Thread(target=self._keep_alive, name="snpatch-lease", daemon=True)
            self._beat.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        try:
            if not self._is_reader:
                with self._database.transaction():
                    self._execute("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", self.owner)
                    self._execute("DELETE FROM owners WHERE owner = ?", self.owner)
                    self._execute("DELETE FROM work WHERE owner IS NULL AND key IN (SELECT key FROM texts)")
        finally:
            self._database.close()
            self._database = None

    # ---- texts --------------------------------------------------------------------------------------------------

    def texts(self, keys: Iterable[str]) -> dict[str, Text]:
        """Those of the texts that are there."""
        found = {}
        for part in _parts(list(keys), 500):
            marks = ",".join("?" * len(part))
            for key, completion, ids, reason, overwrites in self._rows(
                f"SELECT key, completion, token_ids, finish_reason, overwrites FROM texts WHERE key IN ({marks})",
                *part, kinds=(str, str, bytes, str, int),
            ):  # fmt: skip
                found[key] = Text(completion, self._ids(ids), reason, overwrites)
        return found

    def keep(self, key: str, text: Text) -> None:
        """A text is finished; from here on nothing but a broken disk loses it."""
        ids = array("i", text.token_ids).tobytes()
        self._execute(
            "INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)",
            key, text.completion, ids, text.finish_reason, text.overwrites, time.time(),
        )  # fmt: skip
        self._taken.discard(key)

    # ---- work ---------------------------------------------------------------------------------------------------

    def ask(self, keys: Sequence[str]) -> int:
        """These texts are wanted, in this order; how many of them are missing. What failed before is open again."""
        with self._database.transaction():
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
        with self._database.transaction() as waited_s:
            # While the file was locked nobody could renew a lease: that time does not count against one.
            valid = time.time() - waited_s, time.time() + 2 * LEASE_S
            free = self._free(valid, most, 0)
            if not free:
                self._free_dead()
                free = self._free(valid, most, 0)
            if not free:
                suspects = self._rows(
                    f"SELECT w.attempts, count(*) {FREE} AND w.attempts > 0 GROUP BY w.attempts "
                    "ORDER BY w.attempts DESC LIMIT 1", *valid, kinds=(int, int),
                )  # fmt: skip
                for attempts, count in suspects:
                    free = self._free(valid, -(-count // APART), attempts)
            lease = self.owner, time.time() + LEASE_S
            self._many("UPDATE work SET owner = ?, expires = ? WHERE id = ?", ((*lease, work) for work, _ in free))
            self._many("DELETE FROM mine WHERE work = ?", ((work,) for work, _ in free))
        keys = [key for _, key in free]
        self._taken.update(keys)
        return keys

    def is_suspect(self, key: str) -> bool:
        """Whether a run failed while it was under way."""
        return bool(self._rows("SELECT 1 FROM work WHERE key = ? AND attempts > 0", key))

    def missing(self) -> int:
        """How many of the texts asked for are open, here (but for those that are taken) or elsewhere."""
        return self._row(f"SELECT count(*) {OPEN}")[0]

    def suspect(self, error: str, keys: Sequence[str] | None = None) -> int:
        """A run failed: what was under way in it is to be tried again in smaller groups; what was alone has failed.

        keys: what was under way; None: all that this process has taken. Returns how many that were. A text that another
        process has taken meanwhile, as this one was stopped past its lease, is left to it.
        """
        keys = list(self._taken if keys is None else keys)
        with self._database.transaction():
            self._many(
                "UPDATE work SET owner = NULL, expires = NULL, attempts = attempts + 1, error = ?, failed = ? "
                "WHERE key = ? AND owner = ?",
                ((error, len(keys) == 1, key, self.owner) for key in keys),
            )
            self._many("INSERT OR IGNORE INTO mine (work) SELECT id FROM work WHERE key = ?", ((key,) for key in keys))
        self._taken.difference_update(keys)
        return len(keys)

    def errors(self, keys: Iterable[str]) -> dict[str, str]:
        """Why each of these failed that did."""
        found = {}
        for part in _parts(list(keys), 500):
            marks = ",".join("?" * len(part))
            statement = f"SELECT key, error FROM work WHERE failed AND key IN ({marks})"
            found |= dict(self._rows(statement, *part, kinds=(str, str)))
        return found

    # ---- a sweep ------------------------------------------------------------------------------------------------

    def name(self, sweep: str, labels: Sequence[tuple[str | None, Mapping[str, object], str | None]]) -> None:
        """What a sweep's texts are called: key, labels and why there is none, in the order of its points."""
        with self._database.transaction():
            self._execute("DELETE FROM asked WHERE sweep = ?", sweep)
            self._many(
                "INSERT INTO asked (sweep, key, labels, error) VALUES (?, ?, ?, ?)",
                ((sweep, key, json.dumps(dict(own)), error) for key, own, error in labels),
            )

    def name_judges(self, digests: Mapping[str, str]) -> None:
        """Under which digests the scores of a sweep's judges are kept, by the judge's name.

        Those of an ended run of a judge without a digest, which holds its owner and a space, are not needed any more.
        """
        with self._database.transaction():
            self._free_dead()
            self._many(
                "DELETE FROM scores WHERE judge = (SELECT judge FROM judges WHERE name = ? AND judge LIKE '% %' AND "
                "substr(judge, 1, instr(judge, ' ') - 1) NOT IN (SELECT owner FROM owners))",
                ((name,) for name in digests),
            )
            self._many("INSERT OR REPLACE INTO judges VALUES (?, ?)", digests.items())

    def records(self) -> list[dict]:
        """The texts of all sweeps as they are now, by what they are called, with the scores that they have.

        state: "done"; "failed", then error says why; or "open": nobody has written it yet.
        """
        with self._database.transaction():
            judges = self._rows("SELECT name, judge FROM judges", kinds=(str, str))
            scores = {name: self.scores(judge) for name, judge in judges}
            rows = self._rows(
                "SELECT a.labels, coalesce(a.error, CASE WHEN w.failed THEN w.error END), t.completion, t.token_ids, "
                "t.finish_reason, t.overwrites "
                "FROM asked a LEFT JOIN texts t USING (key) LEFT JOIN work w USING (key) ORDER BY a.place",
                kinds=(str, str | None, str | None, bytes | None, str | None, int | None),
            )
        records = {}
        for labels, error, completion, ids, reason, overwrites in rows:
            if labels in records:
                continue  # two sweeps have the point
            record = self._labels(labels)
            text = None if completion is None else text_of(record["prompt"], completion)
            records[labels] = {
                **record,
                "state": state_of(completion, error),
                "completion": completion,
                "tokens": 0 if ids is None else len(self._ids(ids)),
                "finish_reason": reason,
                "overwrites": overwrites or 0,
                "error": None if completion is not None else error,
                "scores": {name: kept.get(text) for name, kept in scores.items()},
            }
        return list(records.values())

    def take_in(self, part: Path) -> int:
        """The texts and scores of a worker's file, see part_name; how many texts there were."""
        with Store(part.parent, must_exist=True, name=part.name) as other:
            texts = other._rows("SELECT * FROM texts", kinds=(str, str, bytes, str, int, float))
            scores = other._rows("SELECT * FROM scores", kinds=(str, str, float))
        with self._database.transaction():
            self._many("INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)", texts)
            self._many("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", scores)
        return len(texts)

    # ---- scores and failures --------------------------------------------------------------------------------------

    def scores(self, judge: str) -> dict[str, float]:
        """text -> score, of all that a judge of this digest scored."""
        found = dict(self._rows("SELECT text, score FROM scores WHERE judge = ?", judge, kinds=(str, float)))
        if not all(map(math.isfinite, found.values())):
            raise self._database.damaged("a score is no finite number")
        return found

    def keep_scores(self, judge: str, scores: Mapping[str, float]) -> None:
        """Scores by text."""
        with self._database.transaction():
            self._many(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", ((text, judge, s) for text, s in scores.items())
            )

    def fail(self, place: Mapping[str, object], error: str) -> None:
        """Note what went wrong besides texts: a prompt that cannot be read, a text that a judge cannot score."""
        self._execute("INSERT INTO failures VALUES (?, ?, ?)", json.dumps(place), error, time.time())

    # ---- runs ---------------------------------------------------------------------------------------------------

    def begin(self, command: str) -> int:
        """A run begins, which forgets the failures of those before it that have ended; its number."""
        with self._database.transaction():
            self._free_dead()
            self._execute("DELETE FROM failures WHERE NOT EXISTS (SELECT 1 FROM owners WHERE owner != ?)", self.owner)
            return self._database.insert(
                "INSERT INTO runs (owner, command, started) VALUES (?, ?, ?)", self.owner, command, time.time()
            )

    def end(self, run: int, outcome: str) -> None:
        """A run ends: "done", or what stopped it."""
        self._execute(
            "UPDATE runs SET ended = ?, outcome = ? WHERE id = ? AND owner = ?", time.time(), outcome, run, self.owner
        )

    def status(self, window_s: float = 300.0) -> Status:
        """How far everything is that was ever asked for. window_s: over which the rate is taken."""
        now = time.time()
        with self._database.transaction():
            ended = {owner for owner, (process, _) in self._database.owners().items() if process.has_ended()}
            (done,) = self._row("SELECT count(*) FROM texts")
            (left,) = self._row(f"SELECT count(*) FROM work w WHERE {IS_OPEN}")
            leased = self._rows(
                f"SELECT w.owner, count(*) FROM work w WHERE {IS_OPEN} AND w.owner IS NOT NULL "
                "AND w.expires BETWEEN ? AND ? GROUP BY w.owner", now, now + 2 * LEASE_S, kinds=(str, int),
            )  # fmt: skip
            last, n, first = self._row(
                "SELECT max(written), count(*), min(written) FROM texts WHERE written > "
                "(SELECT max(written) FROM texts) - ?", window_s, kinds=(float | None, int, float | None),
            )  # fmt: skip
            (scores,) = self._row("SELECT count(*) FROM scores")
            failures = self._rows("SELECT place, error FROM failures", kinds=(str, str))
            failed = self._rows(
                "SELECT key, error FROM work w WHERE w.failed AND NOT EXISTS "
                "(SELECT 1 FROM texts t WHERE t.key = w.key)", kinds=(str, str),
            )  # fmt: skip
            runs = self._rows(
                "SELECT owner, command, started, ended, outcome FROM runs",
                kinds=(str, str, float, float | None, str | None),
            )
        rate = (n - 1) / (last - first) if n and last > first else None
        told = [{"error": error, **self._json(place, "failures.place")} for place, error in failures]
        told += [{"error": error, "key": key} for key, error in failed]
        names = ("owner", "command", "started", "ended", "outcome")
        return Status(
            done, left, sum(count for owner, count in leased if owner not in ended), len(failed), scores, tuple(told),
            rate, left / rate if rate else None, tuple(dict(zip(names, run, strict=True)) for run in runs),
        )  # fmt: skip

    # ---- leases -------------------------------------------------------------------------------------------------

    def _free(self, valid: tuple[float, float], most: int, attempts: int) -> list[tuple[int, str]]:
        """So many of the texts asked for (id, key) that nobody writes and so many runs failed with.

        valid: times between which a lease ends that counts.
        """
        return self._rows(
            f"SELECT w.id, w.key {FREE} AND w.attempts = ? ORDER BY m.place LIMIT ?", *valid, attempts, most,
            kinds=(int, str),
        )  # fmt: skip

    def _free_dead(self) -> None:
        """Free the leases of processes that have provably ended, and forget those without a heartbeat for a lease."""
        owners = self._database.owners().items()
        ended = [(owner,) for owner, (process, _) in owners if owner != self.owner and process.has_ended()]
        self._many("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", ended)
        self._many("DELETE FROM owners WHERE owner = ?", ended)
        now = time.time()
        self._execute("DELETE FROM owners WHERE owner != ? AND NOT abs(beat - ?) <= ?", self.owner, now, 2 * LEASE_S)

    def _heartbeat(self) -> tuple:
        """The row of this process in `owners`."""
        me = Process.current()
        return self.owner, me.host, me.pid, me.namespace, me.started, time.time()

    def _keep_alive(self) -> None:
        """Renew the leases while this process lives, whatever it waits for. An error is said once, and tried again."""
        period_s, failed = LEASE_S / 4, False
        while not self._stop.wait(min(period_s, 1.0) if failed else period_s):
            try:
                self._renew()
            except sqlite3.Error as error:
                if not failed:
                    print(f"snpatch: {self.path}: its leases cannot be renewed now: {error}", file=sys.stderr)
                failed = True
            else:
                if failed:
                    print(f"snpatch: {self.path}: its leases are renewed again", file=sys.stderr)
                failed = False
        if self._beat_connection is not None:
            self._beat_connection.close()

    def _renew(self) -> None:
        if self._beat_connection is None:
            self._beat_connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
        execute = self._beat_connection.execute
        execute("UPDATE work SET expires = ? WHERE owner = ?", (time.time() + LEASE_S, self.owner))
        execute(BEAT, self._heartbeat())

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _labels(self, text: str) -> dict:
        labels = self._json(text, "asked.labels")
        if labels.keys() != LABELS.keys() or not all(_is_label(labels[name], LABELS[name]) for name in LABELS):
            raise self._database.damaged(f"{text!r:.80} are not the labels of a text")
        return labels

    def _json(self, text: str, column: str) -> dict:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._database.damaged(f"{column} is no JSON object: {text!r:.60}")
        return found

    def _ids(self, blob: bytes) -> list[int]:
        if len(blob) % 4:
            raise self._database.damaged(f"token_ids are int32, and one has {len(blob)} bytes")
        return array("i", blob).tolist()

    def _execute(self, statement: str, *values: object) -> None:
        self._database.rows(statement, *values)

    def _many(self, statement: str, rows: Iterable[tuple]) -> None:
        self._database.many(statement, rows)

    def _rows(self, statement: str, *values: object, kinds: Kinds | None = None) -> list[tuple]:
        return self._database.rows(statement, *values, kinds=kinds)

    def _row(self, statement: str, *values: object, kinds: Kinds | None = None) -> tuple:
        return self._database.row(statement, *values, kinds=kinds)


def state_of(completion: str | None, error: str | None) -> str:
    """Return how far a text is: "done", also where it is empty; "failed"; or "open"."""
    if completion is not None:
        return "done"
    return "open" if error is None else "failed"


def describe_unfinished(records: Sequence[Mapping]) -> str | None:
    """Return how many of the texts are written, as a sentence; None where all are."""
    states = Counter(record["state"] for record in records)
    if states["done"] == len(records):
        return None
    return (
        f"Unfinished: {states['done']} of {len(records)} texts are written, {states['open']} are open and "
        f"{states['failed']} failed."
    )


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


def _is_label(value: object, kinds: tuple[type, ...]) -> bool:
    is_in_range = -(2**63) <= value < 2**63 if isinstance(value, int | float) else True
    return type(value) in kinds and is_in_range


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnpatchError(f"cannot use {folder}: {error.strerror or error}") from error
