"""Store: the completions, scores and labels of a folder, in one SQLite file that stays whole if a writer is killed.

Why scores have a key of prompt and completion and not of the request: patches that give the same completion share its
score.
"""

import json
import math
import socket
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from snpatch.errors import SnpatchError
from snpatch.sweeps import queue as work_queue
from snpatch.sweeps.database import Database, chunked
from snpatch.sweeps.queue import WorkQueue
from snpatch.sweeps.status import Status, read_status
from snpatch.utils.hashing import hash_bytes

STORE_FILE = "sweep.sqlite"
OLD_STORE_FILE = "completions.jsonl"  # of versions before the SQLite file
LABEL_TYPES = {  # of a sweep's completion
    "set": (str,), "prompt_index": (int,), "prompt": (str,), "sample": (int, NoneType), "recipient": (str,),
    "donor": (str, NoneType), "ranking": (str, NoneType), "control": (str, NoneType), "control_seed": (int, NoneType),
    "rank_lo": (int,), "rank_hi": (int,), "strength": (float, int, NoneType),
}  # fmt: skip


@dataclass(frozen=True)
class StoredCompletion:
    """A completion as it is stored."""

    completion: str
    token_ids: list[int]
    finish_reason: str
    overwrites: int


class Store:
    """Store of a folder. Use as a context, from one thread.

    Args:
        folder: Folder of the file; None keeps everything in memory.
        must_exist: Open an existing store to read it. Nothing is written, to the file or next to it.
        name: File name; a shard of a sweep has its own (see shard_name).
    """

    def __init__(self, folder: str | Path | None, must_exist: bool = False, name: str = STORE_FILE) -> None:
        self.path = None if folder is None else Path(folder) / name
        self.owner = f"{socket.gethostname()}:{uuid.uuid4().hex}"
        self._is_reader = must_exist
        self._open_database: Database | None = None
        self._open_queue: WorkQueue | None = None

    def __enter__(self) -> "Store":
        if self.path is not None:
            self._check_folder(self.path)
        database = self._open_database = Database(self.path, self._is_reader, 2 * work_queue.LEASE_SECONDS)
        if not self._is_reader:
            try:
                self._open_queue = WorkQueue(database, self.owner)
                self._open_queue.open()
            except BaseException:
                database.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._open_queue is not None:
                self._open_queue.stop_heartbeat()
                self._open_queue.close()
        finally:
            self._database.close()
            self._open_database = self._open_queue = None

    @property
    def queue(self) -> WorkQueue:
        """Completions that are still to be generated; only in a store that is open to write."""
        assert self._open_queue is not None
        return self._open_queue

    @property
    def _database(self) -> Database:
        """The open file; only within the context."""
        assert self._open_database is not None
        return self._open_database

    def completions(self, keys: Iterable[str]) -> dict[str, StoredCompletion]:
        """Return those of the completions that are stored, by key."""
        completions = {}
        for chunk in chunked(list(keys)):
            marks = ",".join("?" * len(chunk))
            for key, completion, token_ids, reason, overwrites in self._database.rows(
                f"SELECT key, completion, token_ids, finish_reason, overwrites FROM texts WHERE key IN ({marks})",
                *chunk, kinds=(str, str, bytes, str, int),
            ):  # fmt: skip
                completions[key] = StoredCompletion(completion, self._token_ids(token_ids), reason, overwrites)
        return completions

    def add(self, key: str, completion: StoredCompletion) -> None:
        """Store a completion; once stored, only a broken disk loses it."""
        token_ids = array("i", completion.token_ids).tobytes()
        self._database.rows(
            "INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)",
            key, completion.completion, token_ids, completion.finish_reason, completion.overwrites, time.time(),
        )  # fmt: skip
        if self._open_queue is not None:
            self._open_queue.finish(key)

    def scores(self, judge_key: str) -> dict[str, float]:
        """Return all stored scores of a judge, by completion_key."""
        rows = self._database.rows("SELECT text, score FROM scores WHERE judge = ?", judge_key, kinds=(str, float))
        scores = dict(rows)
        if not all(map(math.isfinite, scores.values())):
            raise self._database.damaged("a score is no finite number")
        return scores

    def add_scores(self, judge_key: str, scores: Mapping[str, float]) -> None:
        """Store scores of a judge, by completion_key."""
        with self._database.transaction():
            self._database.many(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)",
                ((key, judge_key, score) for key, score in scores.items()),
            )

    def set_labels(self, sweep: str, labels: Sequence[tuple[str | None, Mapping[str, object], str | None]]) -> None:
        """Store key, labels and error of a sweep's completions, in their order.

        The error is that of a prompt that cannot be run.
        """
        with self._database.transaction():
            self._database.rows("DELETE FROM asked WHERE sweep = ?", sweep)
            self._database.many(
                "INSERT INTO asked (sweep, key, labels, error) VALUES (?, ?, ?, ?)",
                ((sweep, key, json.dumps(dict(values)), error) for key, values, error in labels),
            )

    def set_judges(self, judge_keys: Mapping[str, str]) -> None:
        """Store the key of each judge's scores, by the judge's name.

        The key of a judge without a fingerprint holds its owner and a space; such scores of ended runs are deleted.
        """
        with self._database.transaction():
            self.queue.release_dead()
            self._database.many(
                "DELETE FROM scores WHERE judge = (SELECT judge FROM judges WHERE name = ? AND judge LIKE '% %' AND "
                "substr(judge, 1, instr(judge, ' ') - 1) NOT IN (SELECT owner FROM owners))",
                ((name,) for name in judge_keys),
            )
            self._database.many("INSERT OR REPLACE INTO judges VALUES (?, ?)", judge_keys.items())

    def records(self) -> list[dict]:
        """Return labels, completion and scores of each completion of all sweeps.

        state: "done"; "failed", then `error` says why; or "open".
        """
        with self._database.transaction():
            judges = self._database.rows("SELECT name, judge FROM judges", kinds=(str, str))
            scores = {name: self.scores(judge_key) for name, judge_key in judges}
            rows = self._database.rows(
                "SELECT a.labels, coalesce(a.error, CASE WHEN w.failed THEN w.error END), t.completion, t.token_ids, "
                "t.finish_reason, t.overwrites "
                "FROM asked a LEFT JOIN texts t USING (key) LEFT JOIN work w USING (key) ORDER BY a.place",
                kinds=(str, str | None, str | None, bytes | None, str | None, int | None),
            )
        records = {}
        for labels, error, completion, token_ids, reason, overwrites in rows:
            if labels in records:
                continue  # two sweeps have the point
            record = self._labels(labels)
            key = None if completion is None else completion_key(record["prompt"], completion)
            records[labels] = {
                **record,
                "state": completion_state(completion, error),
                "completion": completion,
                "tokens": 0 if token_ids is None else len(self._token_ids(token_ids)),
                "finish_reason": reason,
                "overwrites": overwrites or 0,
                "error": None if completion is not None else error,
                "scores": {name: None if key is None else own.get(key) for name, own in scores.items()},
            }
        return list(records.values())

    def merge(self, shard: Path) -> int:
        """Copy the completions and scores of a shard's file, and return its number of completions."""
        with Store(shard.parent, must_exist=True, name=shard.name) as other:
            completions = other._database.rows("SELECT * FROM texts", kinds=(str, str, bytes, str, int, float))
            scores = other._database.rows("SELECT * FROM scores", kinds=(str, str, float))
        with self._database.transaction():
            self._database.many("INSERT OR IGNORE INTO texts VALUES (?, ?, ?, ?, ?, ?)", completions)
            self._database.many("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", scores)
        return len(completions)

    def start_run(self, command: str) -> int:
        """Record the start of a run, and return its id. Failures of ended runs are forgotten."""
        with self._database.transaction():
            self.queue.release_dead()
            self._database.rows(
                "DELETE FROM failures WHERE NOT EXISTS (SELECT 1 FROM owners WHERE owner != ?)", self.owner
            )
            return self._database.insert(
                "INSERT INTO runs (owner, command, started) VALUES (?, ?, ?)", self.owner, command, time.time()
            )

    def finish_run(self, run_id: int, outcome: str) -> None:
        """Record the end of a run: "done", or what stopped it."""
        statement = "UPDATE runs SET ended = ?, outcome = ? WHERE id = ? AND owner = ?"
        self._database.rows(statement, time.time(), outcome, run_id, self.owner)

    def record_failure(self, labels: Mapping[str, object], error: str) -> None:
        """Record a failure other than a completion's.

        Examples: a prompt that cannot be read, a completion without a score.
        """
        self._database.rows("INSERT INTO failures VALUES (?, ?, ?)", json.dumps(labels), error, time.time())

    def status(self) -> Status:
        """Return the progress of everything that was ever requested."""
        return read_status(self._database)

    def _check_folder(self, path: Path) -> None:
        folder = path.parent
        if self._is_reader and not path.is_file():
            raise SnpatchError(f"{folder} holds no sweep ({STORE_FILE})")
        if (folder / OLD_STORE_FILE).is_file() and not path.is_file():
            raise SnpatchError(
                f"{folder / OLD_STORE_FILE} is from an older snpatch, whose completions have other keys. Move it away, "
                "or choose another folder."
            )
        if not self._is_reader:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SnpatchError(f"cannot use {folder}: {error.strerror or error}") from error

    def _labels(self, text: str) -> dict:
        labels = self._database.parse_json(text, "asked.labels")
        if labels.keys() != LABEL_TYPES.keys() or not all(_is_label(labels[n], LABEL_TYPES[n]) for n in LABEL_TYPES):
            raise self._database.damaged(f"{text!r:.80} are not the labels of a completion")
        return labels

    def _token_ids(self, blob: bytes) -> list[int]:
        if len(blob) % 4:
            raise self._database.damaged(f"token_ids are int32, and one has {len(blob)} bytes")
        return array("i", blob).tolist()


def completion_state(completion: str | None, error: str | None) -> str:
    """Return "done" (also if the completion is empty), "failed" or "open"."""
    if completion is not None:
        return "done"
    return "open" if error is None else "failed"


def describe_unfinished(records: Sequence[Mapping]) -> str | None:
    """Return how many completions are written, as a sentence; None if all are."""
    states = Counter(record["state"] for record in records)
    if states["done"] == len(records):
        return None
    return (
        f"Unfinished: {states['done']} of {len(records)} completions are written, {states['open']} are open and "
        f"{states['failed']} failed."
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Return i and n of "i/n"."""
    number, slash, total = text.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise SnpatchError(f"--shard wants i/n with i in 1..n, got {text!r}")
    return int(number), int(total)


def shard_name(shard: int, num_shards: int) -> str:
    """Return the file name of a shard, counted from 1."""
    return f"sweep-{shard}-of-{num_shards}.sqlite"


def find_shards(folder: str | Path) -> list[Path]:
    """Return the files of all shards in a folder."""
    return sorted(Path(folder).glob("sweep-*-of-*.sqlite"))


def completion_key(prompt: str, completion: str) -> str:
    """Return the content hash of a prompt and its completion."""
    return hash_bytes(f"{prompt}\0{completion}".encode("utf-8", "surrogatepass"), digits=32)


def _is_label(value: object, kinds: tuple[type, ...]) -> bool:
    is_in_range = -(2**63) <= value < 2**63 if isinstance(value, int | float) else True
    return type(value) in kinds and is_in_range
