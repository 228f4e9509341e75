"""Ctrl-C: one line on stderr that says what is stored and how to continue, and exit code 130."""

import json

import pytest
from commands import MODEL, PAIR, run, write_sweep_file

from snpatch.cli import options
from snpatch.cli.interrupts import describe_kept
from snpatch.sweeps.store import Store, StoredCompletion


def interrupt(*_, **__):
    raise KeyboardInterrupt


def last_line(err: str) -> str:
    return err.splitlines()[-1]


def test_interrupted_sweep_says_what_is_stored_and_resumes(capsys, prompts, ranking, tmp_path, monkeypatch):
    command = ["sweep", write_sweep_file(tmp_path, prompts, ranking), "--trust-config", "-o", tmp_path / "out"]
    add, keys = Store.add, []

    def add_three(self, key, completion):
        if len(keys) == 3:
            raise KeyboardInterrupt
        keys.append(key)
        add(self, key, completion)

    monkeypatch.setattr(Store, "add", add_three)
    code, out, err = run(capsys, *command)
    assert (code, out) == (130, "")
    with Store(tmp_path / "out", must_exist=True) as store:
        status = store.status()
    assert (status.done, status.runs[-1]["outcome"]) == (3, "interrupted")
    total = status.done + status.open
    assert total > 10
    stored = f"snpatch: interrupted: 3 of {total} completions are stored in {tmp_path / 'out'}."
    assert last_line(err) == f"{stored} Repeat the command to resume."
    monkeypatch.setattr(Store, "add", lambda self, key, value: (keys.append(key), add(self, key, value)))
    code, _, err = run(capsys, *command)
    assert code == 0, err
    assert sorted(set(keys)) == sorted(keys), "no completion is generated twice"
    assert len(keys) == total


@pytest.mark.parametrize("command", ["generate", "contrast"])
def test_interrupted_command_without_a_store_says_that_nothing_is_stored(
    capsys, prompts, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(options, "open_engine", interrupt)
    code, out, err = run(capsys, command, MODEL, prompts, *PAIR, "--recipient", "sft", "-o", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err == "snpatch: interrupted: nothing is stored. Repeat the command to start again.\n"


def test_interrupted_training_names_its_last_step(capsys, tmp_path, monkeypatch):
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    monkeypatch.setattr("snpatch.cli.train._read_data", interrupt)
    command = ["train", "sft", MODEL, "rows.jsonl", "-o", tmp_path / "out"]
    code, _, err = run(capsys, *command)
    stored = f"snpatch: interrupted: the training up to step 40 is stored in {tmp_path / 'out'}."
    assert (code, err) == (130, f"{stored} Repeat the command to resume.\n")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, *command)[::2] == (130, ""), "one process of several reports"


def test_interrupted_reproduction_counts_its_finished_steps(tmp_path):
    values = {"out": tmp_path}
    assert describe_kept("reproduce", values) == ": nothing is stored. Repeat the command to start again."
    steps = {"sft": {"started_with": {}, "outputs": {}}, "dpo": {"started_with": {}}}
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    stored = f": 1 finished steps and the completions of the interrupted one are stored in {tmp_path}."
    assert describe_kept("reproduce", values) == f"{stored} Repeat the command to resume."


@pytest.mark.parametrize(
    ("command", "stored"),
    [
        ("exp", "finished tables and 1 completions are stored"),
        ("demo", "1 completions are stored"),
        ("find-minimal", "1 completions are stored"),
        ("run", "1 of 2 completions are stored"),
    ],
)
def test_interrupted_experiment_counts_completions(tmp_path, command, stored):
    with Store(tmp_path) as store:
        store.queue.enqueue(["a", "b"])
        store.add("a", StoredCompletion("x", [1], "eos", 0))
    expected = f": {stored} in {tmp_path}. Repeat the command to resume."
    assert describe_kept(command, {"out": tmp_path, "shard": None}) == expected


def test_interrupted_command_that_writes_nothing_says_so_in_two_words(capsys, monkeypatch):
    monkeypatch.setattr("snpatch.utils.environment.describe_environment", interrupt)
    code, _, err = run(capsys, "env")
    assert (code, err) == (130, "snpatch: interrupted\n")
