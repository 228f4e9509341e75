"""Status: the progress of everything that a store's folder was ever asked for, with its rate and its failures."""

import time
from dataclasses import dataclass

from snpatch.sweeps import queue as work_queue
from snpatch.sweeps.database import Database
from snpatch.sweeps.queue import IS_OPEN

RUN_COLUMNS = ("owner", "command", "started", "ended", "outcome")


@dataclass(frozen=True)
class Status:
    """Progress of a folder.

    Attributes:
        done: Completions that are stored.
        open: Completions that are missing and have not failed.
        claimed: Open completions that a process generates now.
        failed: Completions that were given up.
        scores: Scores that are stored.
        failures: What failed: its labels and its `error`.
        rate: Completions per second over the last minutes; None if there are none.
        left_s: Seconds that the open completions take at this rate.
        runs: Commands that wrote to the folder, with start, end and outcome.
    """

    done: int
    open: int
    claimed: int
    failed: int
    scores: int
    failures: tuple[dict, ...]
    rate: float | None
    left_s: float | None
    runs: tuple[dict, ...]


def read_status(database: Database, window_s: float = 300.0) -> Status:
    """Read the progress of a store; the rate is over the `window_s` seconds before its last completion."""
    now = time.time()
    with database.transaction():
        ended = {owner for owner, (process, _) in database.owners().items() if process.has_ended()}
        (done,) = database.row("SELECT count(*) FROM texts")
        (num_open,) = database.row(f"SELECT count(*) FROM work w WHERE {IS_OPEN}")
        leased = database.rows(
            f"SELECT w.owner, count(*) FROM work w WHERE {IS_OPEN} AND w.owner IS NOT NULL "
            "AND w.expires BETWEEN ? AND ? GROUP BY w.owner", now, now + 2 * work_queue.LEASE_SECONDS, kinds=(str, int),
        )  # fmt: skip
        last, n, first = database.row(
            "SELECT max(written), count(*), min(written) FROM texts WHERE written > "
            "(SELECT max(written) FROM texts) - ?", window_s, kinds=(float | None, int, float | None),
        )  # fmt: skip
        (scores,) = database.row("SELECT count(*) FROM scores")
        noted = database.rows("SELECT place, error FROM failures", kinds=(str, str))
        failed = database.rows(
            "SELECT key, error FROM work w WHERE w.failed AND NOT EXISTS "
            "(SELECT 1 FROM texts t WHERE t.key = w.key)", kinds=(str, str),
        )  # fmt: skip
        runs = database.rows(
            f"SELECT {', '.join(RUN_COLUMNS)} FROM runs", kinds=(str, str, float, float | None, str | None)
        )
    failures = [{"error": error, **database.parse_json(place, "failures.place")} for place, error in noted]
    failures += [{"error": error, "key": key} for key, error in failed]
    rate = (n - 1) / (last - first) if n and last > first else None
    return Status(
        done=done,
        open=num_open,
        claimed=sum(count for owner, count in leased if owner not in ended),
        failed=len(failed),
        scores=scores,
        failures=tuple(failures),
        rate=rate,
        left_s=num_open / rate if rate else None,
        runs=tuple(dict(zip(RUN_COLUMNS, run, strict=True)) for run in runs),
    )
