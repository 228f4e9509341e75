"""WorkQueue: completions that a store still lacks, claimed under leases so that several processes can fill one folder.

Why leases: what a dead process had claimed must become free again. A heartbeat renews the leases of a live process, and
those of a process that has provably ended are released at once.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence

from snpatch.sweeps.database import Database, chunked
from snpatch.sweeps.owners import Process
from snpatch.utils.optional import require

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
SUSPECT_GROUPS = 8  # groups into which the requests of a failed run are split until the one that fails is found
CREATE_REQUESTED = "CREATE TEMP TABLE requested (position INTEGER PRIMARY KEY, work INTEGER NOT NULL UNIQUE)"
SET_OWNER = "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?, ?)"
IS_OPEN = "NOT w.failed AND NOT EXISTS (SELECT 1 FROM texts t WHERE t.key = w.key)"
OPEN_REQUESTS = f"FROM requested r JOIN work w ON w.id = r.work WHERE {IS_OPEN}"
FREE_REQUESTS = f"{OPEN_REQUESTS} AND (w.owner IS NULL OR w.expires IS NULL OR w.expires NOT BETWEEN ? AND ?)"


class WorkQueue:
    """Open work of a store, as one process (`owner`) sees it. Use from one thread."""

    def __init__(self, database: Database, owner: str) -> None:
        self.owner = owner
        self._database = database
        self._claimed: set[str] = set()
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._heartbeat_connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Register this process as an owner and start its heartbeat."""
        self._database.rows(CREATE_REQUESTED)
        with self._database.transaction():
            self.release_dead()
            self._database.rows(SET_OWNER, *self._owner_row())
        if self._database.path is not None:
            self._heartbeat = threading.Thread(target=self._keep_alive, name="snpatch-lease", daemon=True)
            self._heartbeat.start()

    def stop_heartbeat(self) -> None:
        """Stop renewing leases."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()

    def close(self) -> None:
        """Release the claims of this process and forget finished work."""
        with self._database.transaction():
            self._database.rows("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", self.owner)
            self._database.rows("DELETE FROM owners WHERE owner = ?", self.owner)
            self._database.rows("DELETE FROM work WHERE owner IS NULL AND key IN (SELECT key FROM texts)")

    def enqueue(self, keys: Sequence[str]) -> int:
        """Request completions in this order, and return how many are missing. Failed ones are tried again."""
        with self._database.transaction():
            self._database.rows("DELETE FROM requested")
            rows = [(key,) for key in keys]
            self._database.many(
                "INSERT OR IGNORE INTO work (key, attempts, failed) "
                "SELECT ?1, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM texts WHERE key = ?1)", rows,
            )  # fmt: skip
            self._database.many(
                "INSERT OR IGNORE INTO requested (work) "
                "SELECT id FROM work w WHERE key = ? AND NOT EXISTS (SELECT 1 FROM texts t WHERE t.key = w.key)", rows,
            )  # fmt: skip
            self._database.rows(
                "UPDATE work SET failed = 0, attempts = 0 WHERE failed AND id IN (SELECT work FROM requested)"
            )
            (missing,) = self._database.row("SELECT count(*) FROM requested")
        return missing

    def claim(self, limit: int) -> list[str]:
        """Claim at most `limit` requested completions that no process writes, and return their keys.

        Suspects (see mark_suspect) come last, each time one group of them alone.
        """
        with self._database.transaction() as waited_s:
            # While the file was locked nobody could renew a lease: that time does not count against one.
            valid = time.time() - waited_s, time.time() + 2 * LEASE_SECONDS
            free = self._free(valid, limit, 0)
            if not free:
                self.release_dead()
                free = self._free(valid, limit, 0)
            if not free:
                suspects = self._database.rows(
                    f"SELECT w.attempts, count(*) {FREE_REQUESTS} AND w.attempts > 0 GROUP BY w.attempts "
                    "ORDER BY w.attempts DESC LIMIT 1", *valid, kinds=(int, int),
                )  # fmt: skip
                for attempts, count in suspects:
                    free = self._free(valid, -(-count // SUSPECT_GROUPS), attempts)
            lease = self.owner, time.time() + LEASE_SECONDS
            self._database.many(
                "UPDATE work SET owner = ?, expires = ? WHERE id = ?", ((*lease, work) for work, _ in free)
            )
            self._database.many("DELETE FROM requested WHERE work = ?", ((work,) for work, _ in free))
        keys = [key for _, key in free]
        self._claimed.update(keys)
        return keys

    def finish(self, key: str) -> None:
        """Forget a claim whose completion is stored."""
        self._claimed.discard(key)

    def is_suspect(self, key: str) -> bool:
        """Return True if a run failed while it generated this completion."""
        return bool(self._database.rows("SELECT 1 FROM work WHERE key = ? AND attempts > 0", key))

    def num_missing(self) -> int:
        """Return how many requested completions are open and not claimed by this process."""
        return self._database.row(f"SELECT count(*) {OPEN_REQUESTS}")[0]

    def mark_suspect(self, error: str, keys: Sequence[str] | None = None) -> int:
        """Record that a run failed, and return how many completions it was generating.

        They are tried again in smaller groups; a completion that was alone has failed. A completion that another
        process has claimed meanwhile (because this process was stopped past its lease) is left to that process.

        Args:
            error: Why the run failed.
            keys: What it was generating; None for all claims of this process.
        """
        keys = list(self._claimed if keys is None else keys)
        with self._database.transaction():
            self._database.many(
                "UPDATE work SET owner = NULL, expires = NULL, attempts = attempts + 1, error = ?, failed = ? "
                "WHERE key = ? AND owner = ?",
                ((error, len(keys) == 1, key, self.owner) for key in keys),
            )
            self._database.many(
                "INSERT OR IGNORE INTO requested (work) SELECT id FROM work WHERE key = ?", ((key,) for key in keys)
            )
        self._claimed.difference_update(keys)
        return len(keys)

    def errors(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the error of each of these completions that failed."""
        errors = {}
        for chunk in chunked(list(keys)):
            marks = ",".join("?" * len(chunk))
            statement = f"SELECT key, error FROM work WHERE failed AND key IN ({marks})"
            errors |= dict(self._database.rows(statement, *chunk, kinds=(str, str)))
        return errors

    def release_dead(self) -> None:
        """Release the leases of processes that have provably ended.

        Owners without a heartbeat for two leases are forgotten. Call it within a transaction.
        """
        owners = self._database.owners().items()
        ended = [(owner,) for owner, (process, _) in owners if owner != self.owner and process.has_ended()]
        self._database.many("UPDATE work SET owner = NULL, expires = NULL WHERE owner = ?", ended)
        self._database.many("DELETE FROM owners WHERE owner = ?", ended)
        self._database.rows(
            "DELETE FROM owners WHERE owner != ? AND NOT abs(beat - ?) <= ?",
            self.owner, time.time(), 2 * LEASE_SECONDS,
        )  # fmt: skip

    def _free(self, valid: tuple[float, float], limit: int, attempts: int) -> list[tuple[int, str]]:
        """Return (id, key) of requests that no process writes and that failed `attempts` times.

        valid: first and last time at which a lease that counts may end.
        """
        return self._database.rows(
            f"SELECT w.id, w.key {FREE_REQUESTS} AND w.attempts = ? ORDER BY r.position LIMIT ?",
            *valid, attempts, limit, kinds=(int, str),
        )  # fmt: skip

    def _owner_row(self) -> tuple:
        process = Process.current()
        return self.owner, process.host, process.pid, process.namespace, process.started, time.time()

    def _keep_alive(self) -> None:
        """Renew the leases until the heartbeat is stopped. Print an error once, and keep trying."""
        period_s, has_failed = LEASE_SECONDS / 4, False
        while not self._stop.wait(min(period_s, 1.0) if has_failed else period_s):
            try:
                self._renew()
            except sqlite3.Error as error:
                if not has_failed:
                    logger.warning("snpatch: %s: cannot renew its leases: %s", self._database.path, error)
                has_failed = True
            else:
                if has_failed:
                    logger.warning("snpatch: %s: its leases are renewed again", self._database.path)
                has_failed = False
        if self._heartbeat_connection is not None:
            self._heartbeat_connection.close()

    def _renew(self) -> None:
        if self._heartbeat_connection is None:
            self._heartbeat_connection = sqlite3.connect(
                require(self._database.path), timeout=1.0, isolation_level=None
            )
        execute = self._heartbeat_connection.execute
        execute("UPDATE work SET expires = ? WHERE owner = ?", (time.time() + LEASE_SECONDS, self.owner))
        execute(SET_OWNER, self._owner_row())
