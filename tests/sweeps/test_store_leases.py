"""Leases of a store: claims, heartbeats after errors and locks, and processes that lost their lease."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from snpatch import SnpatchError
from snpatch.sweeps import owners, queue
from snpatch.sweeps.owners import Process
from snpatch.sweeps.queue import WorkQueue
from snpatch.sweeps.store import STORE_FILE, Store, StoredCompletion
from snpatch.utils.process_stat import ProcessStat, read_process_stat

TEXT = StoredCompletion("a b", [1, 2], "eos", 3)
HOLDING = """
import sys, time
from snpatch.sweeps.store import Store
store = Store(sys.argv[1]).__enter__()
store._database.rows("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(600)
"""


def wait_until(holds) -> None:
    """Wait at most a minute until a condition is true."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows(folder, statement: str) -> list[tuple]:
    """Return rows as another program reads them."""
    connection = sqlite3.connect(folder / STORE_FILE)
    records = connection.execute(statement).fetchall()
    connection.close()
    return records


@pytest.fixture
def child(tmp_path):
    """Return a process that holds the lock of the folder's store."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("message", ["database is locked", "database or disk is full", "disk I/O error"])
def test_heartbeat_continues_after_an_error_and_logs_it_once(tmp_path, monkeypatch, caplog, message):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.4)
    calls, original = [], WorkQueue._renew

    def failing(self):
        calls.append(self)
        if len(calls) <= 3:
            raise sqlite3.OperationalError(message)
        original(self)

    monkeypatch.setattr(WorkQueue, "_renew", failing)
    with Store(tmp_path) as store:
        store.queue.enqueue(["a"])
        store.queue.claim(1)
        wait_until(lambda: len(calls) > 4)
        assert store.queue._heartbeat.is_alive()
        assert rows(tmp_path, "SELECT expires FROM work")[0][0] > time.time(), "the lease is renewed again"
    error = caplog.text
    assert error.count(f"cannot renew its leases: {message}") == 1
    assert error.count("its leases are renewed again") == 1


def test_heartbeat_continues_after_a_lock_of_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.4)
    with Store(tmp_path) as store:
        store.queue.enqueue(["a"])
        store.queue.claim(1)
        holder = sqlite3.connect(tmp_path / STORE_FILE, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        time.sleep(1.5)
        holder.execute("ROLLBACK")
        holder.close()
        wait_until(lambda: rows(tmp_path, "SELECT expires FROM work")[0][0] > time.time())
        assert store.queue._heartbeat.is_alive()


def lose_heartbeat(store: Store) -> None:
    """Stop the heartbeat, as if the process were stopped."""
    store.queue.stop_heartbeat()
    store.queue._heartbeat_connection = None


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.queue.mark_suspect("its engine died", ["x"]),
        lambda store: store.queue.mark_suspect("its engine died"),
        lambda store: store.add("x", TEXT),
        lambda store: store.queue.enqueue(["x"]),
        lambda store: store.queue._renew(),
        lambda store: store.__exit__(None, None, None),
    ],
    ids=["suspect one", "suspect all", "keep", "ask", "renew", "leave"],
)
def test_process_past_its_lease_changes_nothing_of_the_new_owner(tmp_path, monkeypatch, write):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.5)
    with Store(tmp_path) as owner:
        expired = Store(tmp_path).__enter__()
        for store in (expired, owner):
            store.queue.enqueue(["x"])
        assert expired.queue.claim(1) == ["x"]
        lose_heartbeat(expired)
        time.sleep(0.6)
        assert owner.queue.claim(1) == ["x"]
        statement = "SELECT owner, attempts, error, failed FROM work"
        before = rows(tmp_path, statement)
        write(expired)
        assert rows(tmp_path, statement) == before
        owner.add("x", StoredCompletion("another", [], "eos", 0))
        status = owner.status()
        assert (status.done, status.failed, status.open) == (1, 0, 0)


def test_completion_that_failed_here_and_was_stored_elsewhere_is_done(tmp_path):
    with Store(tmp_path) as first, Store(tmp_path) as second:
        first.queue.enqueue(["x"])
        first.queue.claim(1)
        first.queue.mark_suspect("overflowed in bfloat16 at layer 12", ["x"])
        assert first.queue.errors(["x"]) == {"x": "overflowed in bfloat16 at layer 12"}
        assert (first.queue.num_missing(), first.status().failed, first.status().open) == (0, 1, 0)
        second.add("x", TEXT)
        assert (first.status().done, first.status().failed) == (1, 0)
        assert not first.status().failures


def test_failing_completion_leaves_the_others_of_its_run(tmp_path):
    with Store(tmp_path) as store:
        store.queue.enqueue(["a", "b", "c"])
        assert store.queue.claim(3) == ["a", "b", "c"]
        store.queue.mark_suspect("overflowed", ["b"])
        store.add("a", TEXT)
        assert store.queue.mark_suspect("the engine died") == 1, "c alone was under way"
        assert store.queue.errors(["a", "b", "c"]) == {"b": "overflowed", "c": "the engine died"}


def test_row_removed_by_another_process_is_no_suspect(tmp_path):
    with Store(tmp_path) as store:
        assert not store.queue.is_suspect("gone")


MINE = Process.current()


@pytest.mark.skipif(MINE.namespace is None, reason="needs /proc, which proves that a process has ended")
@pytest.mark.parametrize(
    ("change", "has_ended"),
    [
        ({}, False),
        ({"host": "another"}, False),
        ({"started": (MINE.started or 0) - 1}, True),
        ({"pid": 2**22 + 1}, True),
        ({"pid": 2**22 + 1, "namespace": "other pid:[1]"}, False),
        ({"pid": 2**22 + 1, "namespace": None}, False),
        ({"pid": 2**22 + 1, "started": None}, False),
    ],
    ids=["itself", "host renamed", "number reused", "ended", "another container", "unknown", "unknown start"],
)
def test_process_has_ended_only_with_proof(change, has_ended):
    assert replace(MINE, **change).has_ended() is has_ended


@pytest.mark.skipif(MINE.namespace is None, reason="needs /proc, which proves that a process has ended")
def test_zombie_process_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    stat = read_process_stat(child.pid)
    process = replace(MINE, pid=child.pid, started=stat.started)
    assert not process.has_ended()
    child.kill()
    wait_until(process.has_ended)
    child.wait()


def test_containers_with_equal_host_name_keep_their_leases(tmp_path, monkeypatch):
    """Share host name and process numbers: only the heartbeat shows that the other process is alive."""
    monkeypatch.setattr(owners, "_read_namespace", lambda: "boot pid:[1]")
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    stats = {2**22 + 1: ProcessStat("S", 1, 5)}
    monkeypatch.setattr(owners, "read_process_stat", stats.get)
    first = Store(tmp_path).__enter__()
    first.queue.enqueue(["a"])
    assert first.queue.claim(1) == ["a"]
    monkeypatch.setattr(owners, "_read_namespace", lambda: "boot pid:[2]")
    with Store(tmp_path) as second:
        second.queue.enqueue(["a"])
        assert second.queue.claim(1) == [], "its number is free here, and it lives elsewhere"
        assert second.status().claimed == 1
        monkeypatch.setattr(owners, "_read_namespace", lambda: "boot pid:[1]")
        assert second.queue.claim(1) == ["a"], "in its own namespace its number is free: it has ended"
    first.__exit__(None, None, None)


def test_lease_with_an_impossible_time_is_free(tmp_path):
    with Store(tmp_path) as store:
        store.queue.enqueue(["a"])
        store._database.rows("UPDATE work SET owner = 'me', expires = 9e99")
        assert store.status().claimed == 0
        assert store.queue.claim(1) == ["a"]


def test_lock_of_a_stopped_process_raises_with_its_name(tmp_path, monkeypatch, child):
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.3)
    with pytest.raises(SnpatchError, match=f"locked for 0.6 s by .* process {child.pid}, which is stopped"):
        Store(tmp_path).__enter__()


def test_lock_of_a_sweep_raises_with_its_name(tmp_path, monkeypatch, child):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.3)
    with pytest.raises(SnpatchError, match=rf"by .* process {child.pid} \(last heartbeat \d+ s ago\)") as caught:
        Store(tmp_path).__enter__()
    assert "\n" not in str(caught.value)


def test_time_of_a_lock_does_not_count_against_leases(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 2.0)
    with Store(tmp_path) as first, Store(tmp_path) as second:
        for store in (first, second):
            store.queue.enqueue(["a"])
        assert first.queue.claim(1) == ["a"]
        holder = sqlite3.connect(tmp_path / STORE_FILE, isolation_level=None, check_same_thread=False)
        holder.execute("BEGIN IMMEDIATE")
        release = threading.Timer(2.5, holder.execute, ["ROLLBACK"])
        release.start()
        assert second.queue.claim(1) == [], "the lease ran out while nobody could renew it"
        release.join()
        holder.close()
        first.add("a", TEXT)


def test_scores_and_failures_of_a_live_run_survive_the_start_of_another(tmp_path):
    with Store(tmp_path) as restarted:
        with Store(tmp_path) as live:
            live.set_judges({"words": f"{live.owner} words"})
            live.add_scores(f"{live.owner} words", {"text": 1.0})
            live.record_failure({"judge": "words"}, "no score")
            restarted.start_run("snpatch sweep")
            restarted.set_judges({"words": f"{restarted.owner} words"})
            assert live.scores(f"{live.owner} words") == {"text": 1.0}
            assert len(live.status().failures) == 1
        restarted.start_run("snpatch sweep")
        assert not restarted.status().failures
    with Store(tmp_path) as third:
        fingerprint = f"{restarted.owner} words"
        third.add_scores(fingerprint, {"text": 1.0})
        third.set_judges({"words": f"{third.owner} words"})
        assert third.scores(fingerprint) == {}, "scores of an ended run without a fingerprint are deleted"
