"""Robustness of a sweep's folder: kills at random moments, other processes, failing engines, judges and prompts."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from commands import GOLDEN
from swept import CONFIG, GREEDY, LONG, Forks, judge, run, start

from snpatch import Sampling, SnpatchError
from snpatch.data import load_dataset
from snpatch.errors import EngineCrashedError, ReceiptError
from snpatch.sweeps import judging, queue
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import STORE_FILE, Store, StoredCompletion
from snpatch.sweeps.sweep import sweep

TEXT = StoredCompletion("a b", [1, 2], "eos", 3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Return a file of five prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = json.loads((GOLDEN / "prompts.json").read_text())["prompts"][:5]
    path.write_text("".join(json.dumps({"prompt": text["content"]}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def chats(prompts):
    return load_dataset(prompts).prompts


@pytest.fixture(scope="module")
def engine():
    return start()


@pytest.fixture(scope="module")
def ranking(engine, chats):
    return engine.contrast(chats, "sft", "dpo", sampling=GREEDY, exclude_layers=())


def test_claims_are_exclusive_and_released_at_close(tmp_path):
    with Store(tmp_path) as first, Store(tmp_path) as second:
        assert first.queue.enqueue(["a", "b", "c"]) == second.queue.enqueue(["c", "b", "a"]) == 3
        assert first.queue.claim(2) == ["a", "b"], "in the order of the requests"
        assert second.queue.claim(5) == ["c"]
        assert first.queue.claim(5) == []
        second.add("c", TEXT)
        assert (first.queue.num_missing(), second.queue.num_missing()) == (0, 2), "without its own claims"
        assert first.status().claimed == 2
        first.add("a", TEXT)
        assert first.completions(["a", "b", "c"]) == {"a": TEXT, "c": TEXT}
    with Store(tmp_path) as second:
        assert second.queue.enqueue(["a", "b"]) == 1
        assert second.queue.claim(5) == ["b"], "who ends gives back what it had taken"


def test_lease_is_renewed_by_a_live_process_and_expires_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "LEASE_SECONDS", 0.4)
    with Store(tmp_path) as first, Store(tmp_path) as second:
        for store in (first, second):
            store.queue.enqueue(["a"])
        assert first.queue.claim(1) == ["a"]
        time.sleep(0.8)
        assert second.queue.claim(1) == [], "it was renewed"
        first.queue.stop_heartbeat()
        time.sleep(0.5)
        assert second.queue.claim(1) == ["a"]
        first.add("a", TEXT)
        second.add("a", StoredCompletion("another", [], "eos", 0))
        assert second.completions(["a"]) == {"a": TEXT}, "the first one stays"


def test_lease_of_a_dead_process_is_released_at_once(tmp_path):
    code = f"""
from snpatch.sweeps.store import Store
store = Store({str(tmp_path)!r}).__enter__()
store.queue.enqueue(["a"])
print(store.queue.claim(1), flush=True)
import time; time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"['a']\n"
    with Store(tmp_path) as store:
        store.queue.enqueue(["a"])
        assert store.queue.claim(1) == []
        child.kill()
        child.wait()
        assert store.queue.claim(1) == ["a"]


def test_failing_completion_is_isolated_by_bisection(tmp_path):
    """Fail each run that has the bad completion, as if one prompt crashed the engine."""
    keys = [f"k{i}" for i in range(40)]
    with Store(tmp_path) as store:
        store.queue.enqueue(keys)
        runs = 0
        while store.queue.num_missing():
            runs += 1
            claimed_keys = store.queue.claim(64)
            if "k17" in claimed_keys:
                store.queue.mark_suspect("it died")
                continue
            for key in claimed_keys:
                store.add(key, TEXT)
        assert store.queue.errors(keys) == {"k17": "it died"}
        assert len(store.completions(keys)) == 39
        assert runs < 25
        assert store.queue.enqueue(keys) == 1, "failed completions are tried again by the next command"


def test_full_disk_raises_and_loses_nothing(engine, chats, ranking, tmp_path):
    with Store(tmp_path) as store:
        store._database.rows(f"PRAGMA max_page_count = {store._database.row('PRAGMA page_count')[0] + 3}")
        with pytest.raises(SnpatchError, match=f"cannot use .*{STORE_FILE}: database or disk is full"):
            for i in range(1000):
                store.add(f"k{i}", StoredCompletion("word " * 50, [1] * 50, "eos", 0))
    with Store(tmp_path) as store:
        completions = store.completions([f"k{i}" for i in range(1000)])
        assert len(completions) == i > 0


def test_store_rejects_another_file(tmp_path):
    (tmp_path / STORE_FILE).write_bytes(b"no database" * 100)
    with pytest.raises(SnpatchError, match="file is not a database"), Store(tmp_path):
        pass
    (tmp_path / STORE_FILE).unlink()
    with Store(tmp_path) as store:  # it was not left locked
        assert store.queue.enqueue(["a"]) == 1
    (tmp_path / STORE_FILE).unlink()
    with sqlite3.connect(tmp_path / STORE_FILE) as file:
        file.execute("PRAGMA user_version = 99")
    with pytest.raises(SnpatchError, match="of another snpatch"), Store(tmp_path):
        pass


def test_crashed_engine_is_restarted(engine, chats, ranking, tmp_path, monkeypatch):
    uninterrupted, restarts, original = run(engine, chats, ranking), [], type(engine.executor).stream

    def crash_twice(self, requests):
        for n, output in enumerate(original(self, requests)):
            if n == (6, 1, None)[len(restarts)]:
                raise EngineCrashedError("vLLM's engine has ended")
            yield output

    monkeypatch.setattr(type(engine.executor), "stream", crash_twice)
    monkeypatch.setattr(type(engine), "restart", lambda self: restarts.append(self))
    result = run(engine, chats, ranking, tmp_path)
    assert len(restarts) == 2
    assert (result.rows, result.records, result.failures) == (uninterrupted.rows, uninterrupted.records, [])
    restarts.clear()
    with pytest.raises(EngineCrashedError):
        run(engine, chats, ranking, tmp_path / "other", max_restarts=1)
    with Store(tmp_path / "other") as store:
        assert store.status().done >= 6, "finished completions are stored"


def test_failing_completion_leaves_the_others(engine, chats, ranking, tmp_path, monkeypatch, caplog):
    expected, original = run(engine, chats, ranking), type(engine.executor).stream
    failing_ids = engine.encode([chats[2]], "sft")[0]

    def failing(self, requests):
        def checked():
            for request in requests:
                if (
                    request.prompt_ids == failing_ids
                    and len(request.overwrites)
                    and request.overwrites[0].window.hi == 300
                ):
                    raise SnpatchError("this one cannot be run")
                yield request

        yield from original(self, checked())

    monkeypatch.setattr(type(engine.executor), "stream", failing)
    result = run(engine, chats, ranking, tmp_path)
    assert "this one cannot be run" in caplog.text
    assert result.failures == ["prompts, prompt 2: this one cannot be run"]
    failed_records = [r for r in result.records if r["completion"] is None]
    assert {(r["rank_hi"], r["prompt_index"], r["scores"]["cost"]) for r in failed_records} == {(300, 2, None)}
    assert {(row.prompts, row.failed) for row in result.rows} == {(4, 1)}, "all rows share their prompts"
    monkeypatch.setattr(type(engine.executor), "stream", original)
    assert run(engine, chats, ranking, tmp_path).rows == expected.rows, "the same command again does what failed"


def test_invalid_prompt_leaves_the_others(engine, chats, ranking, tmp_path):
    long_chat = [{"role": "user", "content": "bala " * 4000}]
    result = run(engine, [*chats, long_chat], ranking, tmp_path)
    assert len(result.failures) == 1
    assert "prompts, prompt 5: prompt 0: expected at most" in result.failures[0]
    assert {(row.prompts, row.failed) for row in result.rows} == {(5, 1)}
    assert [row.mean for row in result.rows] == [row.mean for row in run(engine, chats, ranking).rows]


def test_sweep_gives_up_after_repeated_failed_runs(engine, chats, ranking, tmp_path, monkeypatch):
    calls = []

    def failing(self, requests):
        calls.append(next(iter(requests), None))
        raise SnpatchError("no memory")
        yield

    monkeypatch.setattr(type(engine.executor), "stream", failing)
    with pytest.raises(SnpatchError, match="no memory"):
        run(engine, chats, ranking, tmp_path)
    assert len(calls) == 8
    monkeypatch.setattr(type(engine.executor), "stream", lambda self, requests: failing(self, []))
    with pytest.raises(SnpatchError, match="no memory"):
        run(engine, chats, ranking, tmp_path)
    assert len(calls) == 9, "nothing was under way"


def test_wrong_receipt_ends_the_sweep(engine, chats, ranking, monkeypatch):
    def raise_receipt_error(self, requests):
        raise ReceiptError("the device did something else")
        yield

    monkeypatch.setattr(type(engine.executor), "stream", raise_receipt_error)
    with pytest.raises(ReceiptError):
        run(engine, chats, ranking)


def record_keys(monkeypatch) -> list[str]:
    """Return a list that collects the keys of completions stored from now on."""
    keys, original = [], Store.add
    monkeypatch.setattr(Store, "add", lambda self, key, completion: keys.append(key) or original(self, key, completion))
    return keys


class Words:
    """Judge with a fingerprint that records its calls."""

    def __init__(self, fingerprint="words", failing=()):
        self.fingerprint, self.failing, self.judged_pairs = fingerprint, failing, []

    def __call__(self, prompts, completions):
        self.judged_pairs += zip(prompts, completions, strict=True)
        if any(text in self.failing for text in completions):
            raise ZeroDivisionError("no such text")
        return judge(prompts, completions)


def test_added_judge_scores_stored_completions_without_generating(engine, chats, ranking, tmp_path, monkeypatch):
    stored_keys = record_keys(monkeypatch)
    first, second = Words("a"), Words("b")
    run(engine, chats, ranking, tmp_path, judges={"one": first})
    n = len(first.judged_pairs)
    assert n == len(set(first.judged_pairs)) > 5
    stored_keys.clear()
    result = run(engine, chats, ranking, tmp_path, judges={"one": first, "two": second})
    assert not stored_keys
    assert (len(first.judged_pairs), sorted(second.judged_pairs)) == (n, sorted(first.judged_pairs))
    assert result.judges == ["one", "two"]
    config = replace(CONFIG, windows=(0, 70, 300, 500))
    run(engine, chats, ranking, tmp_path, judges={"one": first}, config=config)
    assert 0 < len(stored_keys) <= 2 * len(chats), "a larger grid generates only new completions"


def test_judge_that_raises_leaves_the_other_scores(engine, chats, ranking, tmp_path):
    iter_prose = {r["completion"] for r in run(engine, chats, ranking).records if r["ranking"] and r["rank_hi"] == 70}
    failing_text = sorted(iter_prose)[0]
    result = run(
        engine, chats, ranking, tmp_path, judges={"one": Words(failing=[failing_text]), "other": Words("good")}
    )
    missing = [r for r in result.records if r["scores"]["one"] is None]
    assert missing
    assert {r["completion"] for r in missing} == {failing_text}
    assert all(r["scores"]["other"] is not None for r in result.records)
    assert all("one has no score of its completion" in line for line in result.failures)
    with Store(tmp_path) as store:
        assert {f["error"] for f in store.status().failures} == {"judge 'one': ZeroDivisionError: no such text"}
    with pytest.raises(SnpatchError, match="judge 'each': ZeroDivisionError: no such text"):
        run(
            engine, chats, ranking, tmp_path, judges={"each": Words("never", [r["completion"] for r in result.records])}
        )


def test_completions_are_judged_while_others_are_generated(engine, chats, ranking, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "JUDGE_BATCH_SIZE", 4)
    threads, num_judged, original = set(), [], type(engine.executor).stream

    class Threaded(Words):
        def __call__(self, prompts, completions):
            threads.add(threading.current_thread().name.split("_")[0])
            return super().__call__(prompts, completions)

    def slow(self, requests):
        for output in original(self, requests):
            time.sleep(0.01)
            num_judged.append(len(words.judged_pairs))
            yield output

    words = Threaded()
    monkeypatch.setattr(type(engine.executor), "stream", slow)
    result = run(engine, chats, ranking, tmp_path, judges={"one": words})
    assert num_judged[-1] > 8, "before the last text was written"
    assert threads == {"snpatch-judges", "MainThread"}
    assert len(words.judged_pairs) == len(set(words.judged_pairs)), "and none is asked for twice"
    assert result.rows == run(engine, chats, ranking, judges={"one": Words()}).rows


def test_equal_requests_are_generated_once(engine, chats, ranking, tmp_path, monkeypatch):
    """Run k = 0 of all rankings, and the same neurons under another name or in another order."""
    stored_keys = record_keys(monkeypatch)
    shuffled = type(ranking).from_order(ranking.top(70).flip(0), ranking.shape)
    config = SweepConfig(("sft",), "dpo", (0, 70), controls=0, extra_controls=(), sampling=GREEDY)
    rankings = {"safety": ranking, "same": ranking, "shuffled": shuffled}
    result = sweep(engine, chats, rankings, {"cost": judge}, config, store=tmp_path)
    assert len(stored_keys) == 4 * len(chats), "two models, k = 0 and k = 70"
    by = {(row.ranking, row.rank_hi): row for row in result.rows}
    assert by["safety", 70].mean == by["same", 70].mean == by["shuffled", 70].mean
    assert by["safety", 0].mean == by["shuffled", 0].mean


def test_each_donor_strength_and_sample_is_a_point(engine, chats, ranking, tmp_path):
    config = SweepConfig(
        ("sft", "base"), ("dpo", "sft"), (70,), strengths=(1, 0.5), controls=1, extra_controls=(), samples=3,
        resamples=50, sampling=Sampling(temperature=1.0, max_tokens=6, seed=5),
    )  # fmt: skip
    result = run(engine, chats, ranking, tmp_path, config=config)
    patched = [(r.recipient, r.donor, r.strength, r.control_seed) for r in result.rows if r.ranking]
    pairs = [("sft", "dpo"), ("base", "dpo"), ("base", "sft")]
    assert sorted(patched, key=str) == sorted(
        ((*p, s, c) for p in pairs for s in (1.0, 0.5) for c in (None, 0)), key=str
    )
    assert len(result.records) == (3 + 12) * len(chats) * 3
    samples = [r for r in result.records if (r["recipient"], r["ranking"], r["prompt_index"]) == ("base", None, 0)]
    assert len({tuple(r["token_ids"]) for r in samples}) > 1, "each sample has a seed of its own"
    assert run(engine, chats, ranking, config=config).records == result.records, "and always the same"
    row = next(r for r in result.rows if (r.recipient, r.donor, r.ranking) == ("base", "sft", "safety"))
    means = {r.recipient: r.mean for r in result.rows if r.ranking is None}
    assert row.gap == pytest.approx(means["sft"] - means["base"])
    assert row.gap_low < 0 < row.gap_high
    assert (row.effect, row.net_effect, len(result.controls(row))) == (None, None, 1), "the gap is not established"
    labels = [label for label, part in result.slices() if part.config.recipients]
    assert labels == [f"donor {d}, strength {s}" for d in ("dpo", "sft") for s in ("1", "0.5")]


@pytest.fixture
def forks(prompts, ranking, tmp_path_factory):
    """Return processes that run the sweep into a folder on request."""
    path, processes = tmp_path_factory.mktemp("ranking") / "ranking.safetensors", []
    ranking.save(path)

    def start():
        processes.append(Forks(prompts, path))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_promise_8_sweep_resumes_after_twenty_random_kills(engine, chats, ranking, tmp_path, forks):
    uninterrupted, process, draw, num_stored = run(engine, chats, ranking, config=LONG), forks(), random.Random(0), 0
    keys = {
        (r["recipient"], r["rank_lo"], r["rank_hi"], r["control_seed"], r["prompt_index"])
        for r in uninterrupted.records
    }
    for _ in range(20):
        pid, until = process.start(tmp_path), min(num_stored + draw.randint(0, 2), len(keys) // 2)
        while _count_texts(tmp_path) < until:
            time.sleep(draw.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        assert process.wait() == ""
        assert _count_texts(tmp_path) >= num_stored, "nothing that was written is lost"
        num_stored = _count_texts(tmp_path)
    assert 20 < num_stored < len(keys)
    result = run(engine, chats, ranking, tmp_path, LONG)
    assert (result.rows, result.records) == (uninterrupted.rows, uninterrupted.records)


def _count_texts(folder) -> int:
    if not (folder / STORE_FILE).is_file():
        return 0
    with sqlite3.connect(folder / STORE_FILE, timeout=60) as file:
        if not file.execute("SELECT 1 FROM sqlite_master WHERE name = 'texts'").fetchall():
            return 0  # it was only just made
        return file.execute("SELECT count(*) FROM texts").fetchone()[0]


def test_two_processes_share_a_folder(engine, chats, ranking, tmp_path, forks):
    expected, processes = run(engine, chats, ranking, config=LONG), [forks(), forks()]
    for process in processes:
        process.start(tmp_path)
    assert [process.wait() for process in processes] == [str(len(expected.records))] * 2, (
        "both have the complete result"
    )
    with sqlite3.connect(tmp_path / STORE_FILE) as file:
        assert file.execute("SELECT count(*) FROM work").fetchone() == (0,)
    assert run(engine, chats, ranking, tmp_path, LONG).rows == expected.rows
