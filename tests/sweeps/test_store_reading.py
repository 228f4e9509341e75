"""Stores opened to read: nothing is written, damage is a one-line error, missing completions are reported."""

import csv
import json
import os
import random
import shutil
import sqlite3

import pytest
from commands import run

from snpatch import SnpatchError
from snpatch.report.folder_page import load_page
from snpatch.sweeps import database
from snpatch.sweeps.database import TABLES, VERSION
from snpatch.sweeps.store import STORE_FILE, Store, StoredCompletion, completion_key, shard_name

TEXT = StoredCompletion("text", [1, 2], "stop", 3)
PROMPT = "how?"
STATES = {"k0": "done", "k1": "done", "k2": "failed", "k3": "open", "k4": "failed"}


def build_labels(index: int) -> dict:
    return {
        "set": "s", "prompt_index": index, "prompt": PROMPT, "sample": 0, "recipient": "base", "donor": None,
        "ranking": None, "control": None, "control_seed": None, "rank_lo": 0, "rank_hi": 0, "strength": 1.0,
    }  # fmt: skip


def fill(store: Store) -> None:
    """Write five completions: done, done and empty, failed, open, and one whose prompt cannot be run."""
    keys = list(STATES)
    run_id = store.start_run("snpatch sweep")
    store.queue.enqueue(keys[:4])
    store.set_labels(
        "s", [(key, build_labels(i), None) for i, key in enumerate(keys[:4])] + [(None, build_labels(4), "too long")]
    )
    store.set_judges({"cost": "digest"})
    store.queue.claim(4)
    store.add("k0", TEXT)
    store.add("k1", StoredCompletion("", [2], "eos", 0))
    store.queue.mark_suspect("overflowed", ["k2"])
    store.add_scores("digest", {completion_key(PROMPT, "text"): 1.5})
    store.record_failure({"judge": "cost", "prompt": PROMPT}, "no score")
    store.finish_run(run_id, "interrupted")


@pytest.fixture
def folder(tmp_path):
    """Return the folder of an unfinished sweep."""
    with Store(tmp_path / "sweep") as store:
        fill(store)
    return tmp_path / "sweep"


@pytest.fixture
def live(tmp_path):
    """Return the folder of a running sweep: all rows are still in the log."""
    with Store(tmp_path / "live") as store:
        fill(store)
        yield tmp_path / "live"


def copy_store(source, target, *suffixes: str):
    """Copy a store's files, as an archive or a killed process leaves them."""
    target.mkdir()
    for suffix in ("", *suffixes):
        shutil.copyfile(source / f"{STORE_FILE}{suffix}", target / f"{STORE_FILE}{suffix}")
    return target


def stamps(folder) -> dict:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def change(folder, script: str) -> None:
    connection = sqlite3.connect(folder / STORE_FILE)
    connection.executescript(script)
    connection.close()


def read_store(folder) -> list[dict]:
    """Call all methods of a reader, and return the records."""
    with Store(folder, must_exist=True) as store:
        store.status()
        store.completions(["k0"])
        return store.records()


def test_records_of_unfinished_sweep_have_a_state(folder):
    records = read_store(folder)
    assert [record["state"] for record in records] == list(STATES.values())
    assert [record["completion"] for record in records] == ["text", "", None, None, None]
    assert [record["error"] for record in records] == [None, None, "overflowed", None, "too long"]
    assert [record["scores"] for record in records] == [{"cost": 1.5}, *[{"cost": None}] * 4]


@pytest.mark.parametrize("state", ["ended", "archived", "killed", "live"])
def test_reader_sees_all_rows_and_writes_nothing(folder, live, tmp_path, state):
    place = {
        "ended": lambda: folder,
        "archived": lambda: copy_store(live, tmp_path / "archived", "-wal"),
        "killed": lambda: copy_store(live, tmp_path / "killed", "-wal", "-shm"),
        "live": lambda: live,
    }[state]()
    before = stamps(place)
    assert len(read_store(place)) == 5
    after = stamps(place)
    assert after.keys() == before.keys()
    for name in {STORE_FILE, f"{STORE_FILE}-wal"} & before.keys():
        assert after[name] == before[name]


def test_commands_on_read_only_folder_succeed(capsys, folder, tmp_path):
    folder.chmod(0o555)
    (folder / STORE_FILE).chmod(0o444)
    before = stamps(folder)
    for command in (
        ["sweep", "status", folder],
        ["sweep", "export", folder, tmp_path / "texts.csv"],
        ["report", folder, "-o", tmp_path / "report.html"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 0, err
    assert stamps(folder) == before
    folder.chmod(0o755)


def test_log_without_shared_index_is_read(live, tmp_path, monkeypatch):
    """Simulate a read-only file system: SQLite cannot open the shared index, but the log's rows must be read."""
    place = copy_store(live, tmp_path / "killed", "-wal", "-shm")
    connect = sqlite3.connect

    def connect_read_only(target, *args, **kwargs):
        if "mode=ro" in str(target) and "immutable" not in str(target):
            error = sqlite3.OperationalError("attempt to write a readonly database")
            error.sqlite_errorcode = sqlite3.SQLITE_READONLY
            raise error
        return connect(target, *args, **kwargs)

    monkeypatch.setattr(database.sqlite3, "connect", connect_read_only)
    assert len(read_store(place)) == 5


def test_file_changed_while_reading_raises(folder):
    with pytest.raises(SnpatchError, match="a sweep wrote to it while it was read"), Store(folder, True) as reader:
        reader.status()
        with Store(folder) as writer:
            writer.add("k3", TEXT)


def test_write_of_a_reader_raises(folder):
    with Store(folder, must_exist=True) as reader, pytest.raises(SnpatchError, match="readonly database"):
        reader.add("k3", TEXT)


def get_error(step, *arguments) -> str | None:
    """Return the error line of a step, or None. Any other error than a SnpatchError fails the test."""
    try:
        step(*arguments)
    except SnpatchError as error:
        line = str(error)
    else:
        return None
    assert "\n" not in line
    return line


def test_random_bytes_in_a_store_raise_one_line(folder, tmp_path):
    """Damage a store at random; bench_attack does it 1,500 times with the same kinds of damage."""
    valid_bytes, damaged_folder = (folder / STORE_FILE).read_bytes(), tmp_path / "damaged"
    draw, num_errors = random.Random(2), 0
    damaged_folder.mkdir()
    for _ in range(150):
        content = bytearray(valid_bytes)
        for _ in range(draw.choice([1, 3, 30, 300])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if draw.random() < 0.1:
            content = content[: draw.randrange(len(content))]
        for use_store in (read_store, write_store):
            for path in damaged_folder.iterdir():
                path.unlink()
            (damaged_folder / STORE_FILE).write_bytes(content)
            num_errors += get_error(use_store, damaged_folder) is not None
    assert num_errors > 150


def write_store(folder) -> None:
    """Open a store to write, and call what a sweep calls."""
    with Store(folder) as store:
        fill(store)
        store.completions(STATES)
        store.records()


ENDLESS = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 300000000) SELECT x AS key, 'a' AS "
    "completion, x'00000000' AS token_ids, 'stop' AS finish_reason, 0 AS overwrites, x AS written FROM c"
)
PROCESS = "INSERT INTO owners VALUES ('o', 'h', {}, {}, 5, 1.0)"


def insert_labels_statement(**changes: object) -> str:
    """Return the statement that adds a completion with other labels."""
    return f"INSERT INTO asked (sweep, labels) VALUES ('s', '{json.dumps({**build_labels(0), **changes})}')"


DAMAGED = {
    "failures no JSON": "INSERT INTO failures VALUES ('{', 'e', 1)",
    "failures a list": "INSERT INTO failures VALUES ('[1]', 'e', 1)",
    "failures nested": f"INSERT INTO failures VALUES ('{'[' * 100_000}', 'e', 1)",
    "labels no JSON": "INSERT INTO asked (sweep, key, labels) VALUES ('s', 'k0', 'nope')",
    "labels without a prompt": "INSERT INTO asked (sweep, key, labels) VALUES ('s', 'k0', '{}')",
    "labels with another key": insert_labels_statement(x=1),
    "a prompt that is a list": insert_labels_statement(prompt=[]),
    "a window that is true": insert_labels_statement(rank_hi=True),
    "a window past int64": insert_labels_statement(rank_hi=10**30),
    "an infinite strength": insert_labels_statement(strength=float("inf")),
    "token_ids of 3 bytes": "UPDATE texts SET token_ids = x'010203'",
    "token_ids a text": "UPDATE texts SET token_ids = 'abc'",
    "completion a blob": "UPDATE texts SET completion = x'ff00'",
    "completion not UTF-8": "UPDATE texts SET completion = CAST(x'ff00' AS TEXT)",
    "overwrites a text": "UPDATE texts SET overwrites = 'many'",
    "written a text": "UPDATE texts SET written = 'now'",
    "a score that is a text": "INSERT INTO scores VALUES ('t', 'digest', 'high')",
    "an infinite score": "INSERT INTO scores VALUES ('t', 'digest', 9e999)",
    "a run without a time": "INSERT INTO runs (owner, command, started) VALUES ('o', 'c', 'now')",
    "a process number of 20 digits": PROCESS.format("99999999999999999999", "NULL"),
    "a process number below 0": PROCESS.format("-1", "NULL"),
    "a namespace that is a blob": PROCESS.format("1", "x'00'"),
    "texts an endless view": f"ALTER TABLE texts RENAME TO t2; CREATE VIEW texts AS {ENDLESS}",
    "texts gone": "DROP TABLE texts",
    "texts without a column": "ALTER TABLE texts DROP COLUMN written",
    "texts with a computed column": "ALTER TABLE texts ADD COLUMN more AS (key || key)",
    "a virtual table": "DROP TABLE failures; CREATE VIRTUAL TABLE failures USING fts5(place, error, at)",
    "a trigger": "CREATE TRIGGER t AFTER DELETE ON failures BEGIN DELETE FROM texts; END",
}  # fmt: skip
FINE = {
    "owner without colons": "INSERT INTO work (key, owner, expires, attempts, failed) VALUES ('z', 'me', 9e99, 0, 0)",
    "owner with a number": "INSERT INTO work (key, owner, expires, attempts, failed) VALUES ('z', 'h:x:y', 9e99, 0, 0)",
    "a table of somebody's own": "CREATE TABLE notes (x); CREATE VIEW mine AS SELECT * FROM notes",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_crafted_store_is_reported_as_damaged(folder, name):
    change(folder, DAMAGED[name])
    with pytest.raises(SnpatchError, match=rf"{STORE_FILE}: damaged: .*another folder") as caught:
        read_store(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DAMAGED)
def test_crafted_store_does_not_break_a_sweep(folder, name):
    """Allow what a sweep does not read; anything else raises one line."""
    change(folder, DAMAGED[name])
    get_error(write_store, folder)


@pytest.mark.parametrize("name", FINE)
def test_harmless_additions_to_a_store_are_ignored(folder, name):
    change(folder, FINE[name])
    assert len(read_store(folder)) == 5
    write_store(folder)


@pytest.mark.parametrize("name", ["failures nested", "labels no JSON", "texts an endless view"])
def test_commands_on_crafted_store_print_one_line(capsys, folder, tmp_path, name):
    change(folder, DAMAGED[name])
    codes = []
    for command in (["sweep", "status", folder], ["sweep", "export", folder, tmp_path / "t.csv"], ["report", folder]):
        code, _, err = run(capsys, *command)
        codes.append(code)
        assert code == 0 or (err.startswith("snpatch: error: ") and err.count("\n") == 1 and "damaged" in err)
    assert 2 in codes


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, -1])
def test_store_of_another_version_raises(folder, version):
    change(folder, f"PRAGMA user_version = {version}")
    before = (folder / STORE_FILE).read_bytes()
    with pytest.raises(SnpatchError, match=r"expected (version \d of )?a sweep's store") as caught:
        read_store(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SnpatchError, match="damaged" if version == 0 else "of another snpatch"), Store(folder):
        pass
    assert (folder / STORE_FILE).read_bytes() == before or version == 0


def test_empty_file_is_rejected_by_a_reader_and_initialized_by_a_writer(tmp_path):
    (tmp_path / STORE_FILE).write_bytes(b"")
    with pytest.raises(SnpatchError, match="expected a sweep's store, got a file without its tables"):
        read_store(tmp_path)
    with Store(tmp_path) as store:
        assert store.queue.enqueue(["a"]) == 1


def test_damaged_shard_raises_with_its_name(folder, tmp_path):
    part = folder / shard_name(1, 2)
    with Store(folder, name=part.name) as shard:
        shard.add("mine", TEXT)
    with Store(folder) as store:
        assert store.merge(part) == 1
        assert store.completions(["mine"]) == {"mine": TEXT}
        connection = sqlite3.connect(part)
        connection.executescript("UPDATE texts SET completion = x'ff', key = 'other'")
        connection.close()
        with pytest.raises(SnpatchError, match=rf"{part.name}: damaged"):
            store.merge(part)
        assert store.completions(["other"]) == {}


def test_schema_has_no_expression_that_sqlite_distrusts():
    with sqlite3.connect(":memory:") as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.executescript(TABLES)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_export_prints_progress_and_writes_states(capsys, folder, tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    code, out, err = run(capsys, "sweep", "export", folder, path)
    assert code == 0, err
    assert "Unfinished: 2 of 5 completions are written, 1 are open and 2 failed." in out
    if suffix == ".csv":
        rows = list(csv.DictReader(path.open()))
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    assert [row["state"] for row in rows] == list(STATES.values())
    assert [row["error"] or None for row in rows] == [None, None, "overflowed", None, "too long"]


def test_export_of_finished_sweep_prints_it(capsys, tmp_path):
    with Store(tmp_path) as store:
        store.queue.enqueue(["k0"])
        store.set_labels("s", [("k0", build_labels(0), None)])
        store.add("k0", TEXT)
    assert "All 1 completions are written." in run(capsys, "sweep", "export", tmp_path, tmp_path / "texts.csv")[1]


def test_export_of_prompt_with_lone_surrogate_succeeds(capsys, tmp_path):
    with Store(tmp_path) as store:
        store.set_labels("s", [(None, {**build_labels(0), "prompt": "a\ud800"}, "too long")])
    for suffix in ("csv", "parquet"):
        code, _, err = run(capsys, "sweep", "export", tmp_path, tmp_path / f"texts.{suffix}")
        assert code == 0, err
    assert "a\\ud800" in (tmp_path / "texts.csv").read_text()


def test_status_shows_control_characters_as_escapes(capsys, folder):
    with Store(folder) as store:
        store.record_failure({"prompt": "\x1b[2J"}, "two\nlines \x1b[31m")
    out = run(capsys, "sweep", "status", folder)[1]
    assert "\x1b" not in out
    assert r"two\nlines \u001b[31m" in out


def test_page_of_unfinished_sweep_has_progress(folder):
    page = load_page(folder)
    assert page.unfinished == "Unfinished: 2 of 5 completions are written, 1 are open and 2 failed."
    assert [text["state"] for text in page.completions] == list(STATES.values())


TABLE = {"provenance": {}, "headline": ["one"], "rows": [{"a": 1}]}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        json.dumps({**TABLE, "provenance": []}),
        json.dumps({**TABLE, "provenance": {"command": 3}}),
        json.dumps({**TABLE, "headline": "one"}),
        json.dumps({**TABLE, "headline": [None]}),
        json.dumps({**TABLE, "rows": {"a": 1}}),
        json.dumps({**TABLE, "rows": [3]}),
        json.dumps({**TABLE, "rows": [{"a": 1}, {"b": 1}]}),
    ],
    ids=["expected JSON", "nested", "provenance", "command", "headline", "sentence", "rows", "row", "keys"],
)
def test_report_of_folder_with_broken_table_prints_one_line(capsys, folder, content):
    (folder / "curve.json").write_text(content)
    code, _, err = run(capsys, "report", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("snpatch: error: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_store_without_read_permission_prints_one_line(folder):
    (folder / STORE_FILE).chmod(0)
    with pytest.raises(SnpatchError, match="cannot use"):
        read_store(folder)
