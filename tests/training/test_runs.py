"""Trainings that are interrupted, killed, repeated, run by two processes, or started from the command line."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import toys
import typer
from commands import run
from processes import wait_for
from published import shp, talk
from safetensors.torch import load_file
from toys import MESSAGES, PAIRS, RATES, dpo_settings, load_vectors, settings

from snpatch.cli import train as command
from snpatch.data import DATASETS, load_dataset, prompt_set
from snpatch.errors import SnpatchError
from snpatch.training import record, trainer
from snpatch.training.paper_data import OBJECTIVES, get_objective, training_split
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.training.trainer import train_dpo, train_sft

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6  # three epochs of two


toy = pytest.fixture(scope="module")(toys.toy)


def start(toy, kind, out, **how):
    """Run six steps of one kind of training."""
    train, method, _, on = kind.split(" ") if " on " in kind else (*kind.split(" "), None, None)
    if train == "sft":
        return train_sft(toy.base, MESSAGES, out, settings(method, epochs=3), **how)
    options = {"epochs": 3, "weight_decay_target": 1} if on == "ia3" else {"epochs": 3}
    where = (toy.sft("full"), None) if on == "full" else (toy.base, toy.sft(on))
    return train_dpo(*where, PAIRS, out, dpo_settings(method, **options), **how)


KINDS = ["sft ia3", "sft full", "dpo ia3 on ia3", "dpo ia3 on lora", "dpo lora on lora", "dpo full on full"]


def start_and_interrupt(toy, kind, out, at, **how):
    """Run the same, interrupted by Ctrl-C at a step."""
    with pytest.raises(KeyboardInterrupt):
        start(toy, kind, out, on_step=_stop_at(at), **how)


def _stop_at(at):
    def on_step(step, steps, logs):
        if step == at:
            raise KeyboardInterrupt

    return on_step


def weights(out):
    return load_file(out / ("model.safetensors" if (out / "config.json").exists() else "adapter_model.safetensors"))


def assert_same_training(folder, expected_folder):
    """Assert equal weights, bit for bit, and equal tables."""
    tensors, expected_tensors = weights(folder), weights(expected_folder)
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)
    assert (folder / "training.csv").read_text() == (expected_folder / "training.csv").read_text()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))


# ---- Interrupted runs


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_resumes_and_gives_same_result(toy, tmp_path, kind):
    """The interrupt is within an epoch, so the row order must resume as well."""
    uninterrupted = start(toy, kind, tmp_path / "whole")
    start_and_interrupt(toy, kind, tmp_path / "parts", at=5, save_steps=3)
    assert checkpoints(tmp_path / "parts") == ["checkpoint-3"]
    assert not (tmp_path / "parts" / "training.json").exists()
    steps = []
    figures = start(toy, kind, tmp_path / "parts", on_step=lambda step, *_: steps.append(step))
    assert steps == [4, 5, 6]
    assert (uninterrupted["resumed_at"], figures["resumed_at"]) == (0, 3)
    assert_same_training(tmp_path / "parts", tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    names = ("steps", "first_loss", "last_loss", "rows", "unchanged_parameters")
    assert [figures[name] for name in names] == [uninterrupted[name] for name in names]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_incomplete_checkpoint_is_skipped(toy, tmp_path, damage):
    start(toy, "dpo ia3 on ia3", tmp_path / "whole")
    out = tmp_path / "parts"
    start_and_interrupt(toy, "dpo ia3 on ia3", out, at=3, save_steps=2)
    shutil.copytree(out / "checkpoints" / "checkpoint-2", tmp_path / "kept")
    start_and_interrupt(toy, "dpo ia3 on ia3", out, at=5, save_steps=2)
    assert checkpoints(out) == ["checkpoint-4"]
    state = out / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    else:
        os.truncate(state, state.stat().st_size // 2 if damage == "cut" else 0)
    if damage != "empty":
        shutil.copytree(tmp_path / "kept", out / "checkpoints" / "checkpoint-2")
    figures = start(toy, "dpo ia3 on ia3", out, save_steps=2)
    assert figures["resumed_at"] == (0 if damage == "empty" else 2)
    assert_same_training(out, tmp_path / "whole")


def test_training_killed_before_its_record_resumes_at_the_end(toy, tmp_path, monkeypatch):
    """The adapter is saved by then, with DPO's scales divided by SFT's."""
    start(toy, "dpo ia3 on ia3", tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.files, "write_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(toy, "dpo ia3 on ia3", tmp_path / "parts")
    assert (tmp_path / "parts" / "adapter_model.safetensors").exists()
    assert start(toy, "dpo ia3 on ia3", tmp_path / "parts")["resumed_at"] == STEPS
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


def test_killed_command_resumes_when_repeated(toy, tmp_path, capsys):
    rows = write(tmp_path / "pairs.jsonl", PAIRS)
    command = ["train", "dpo", toy.base, rows, "--sft", toy.sft(), "--save-steps", 2, *OPTIONS, "--epochs", 20]
    argv = [sys.executable, "-m", "snpatch.cli", *map(str, [*command, "-o", tmp_path / "killed"])]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = "checkpoints/checkpoint-*/trainer_state.json"
    try:
        wait_for(lambda: any((tmp_path / "killed").glob(state)) or process.poll() is not None, seconds=120)
        assert process.poll() is None, "the command ended before its first checkpoint"
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training.json").exists()
    code, out, err = run(capsys, *command, "-o", tmp_path / "killed", "--json")
    assert code == 0, err
    assert 2 <= json.loads(out)["resumed_at"] < 40
    assert run(capsys, *command, "-o", tmp_path / "whole")[0] == 0
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


# ---- Repeated runs


def test_finished_training_is_not_repeated(toy, tmp_path):
    figures = start(toy, "sft ia3", tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    steps = []
    assert start(toy, "sft ia3", tmp_path / "out", on_step=lambda *step: steps.append(step)) == figures
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


@pytest.mark.parametrize("is_complete", [True, False])
def test_folder_of_other_training_is_rejected_with_first_difference(toy, tmp_path, is_complete):
    out = tmp_path / "out"
    config = dpo_settings(epochs=1)
    if is_complete:
        train_dpo(toy.base, toy.sft(), PAIRS, out, config)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_dpo(toy.base, toy.sft(), PAIRS, out, config, on_step=_stop_at(1))
    before = files(out)
    changes = [
        ((toy.base, toy.sft(), PAIRS), dpo_settings(epochs=1, beta=0.2), r"beta = 0\.2, it contains one with 0\.1"),
        ((toy.base, toy.sft(), PAIRS), dpo_settings("lora", epochs=1), "method = lora, it contains one with ia3"),
        ((toy.base, toy.sft(), PAIRS[:4]), config, r"data = \{'rows': 4, .* it contains one with \{'rows': 8"),
        ((toy.base, toy.sft(), PAIRS[::-1]), config, r"data = \{'rows': 8, .* it contains one with \{'rows': 8"),
        ((toy.sft("full"), toy.sft(), PAIRS), config, r"model = [0-9a-f]{16}, it contains one with [0-9a-f]{16}\."),
        ((toy.base, toy.sft("lora"), PAIRS), config, r"sft = [0-9a-f]{16}, it contains one with [0-9a-f]{16}\."),
        ((toy.base, None, PAIRS), config, r"sft = None, it contains one with [0-9a-f]{16}\."),
    ]
    for arguments, options, message in changes:
        with pytest.raises(SnpatchError, match=f"expected a training with {message}"):
            train_dpo(*arguments, out, options)
    with pytest.raises(SnpatchError, match=r"expected a training with kind = sft, it contains one with dpo\."):
        train_sft(toy.base, MESSAGES, out, settings(epochs=1))
    assert files(out) == before
    assert train_dpo(toy.base, toy.sft(), PAIRS, out, config)["steps"] == 2


@pytest.mark.parametrize("method", ["ia3", "full"])
def test_folder_with_a_model_from_elsewhere_is_unchanged(toy, tmp_path, method):
    shutil.copytree(toy.sft(method), tmp_path / "out", ignore=shutil.ignore_patterns("training*"))
    with pytest.raises(SnpatchError, match="expected a new or empty folder, it contains a model from elsewhere"):
        start(toy, "sft ia3", tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(toy.sft(method)).keys()


# ---- Two processes

COMMANDS = """
import json, os, sys
from snpatch import cli
from snpatch.training import trainer  # imported once before the fork: it takes ten seconds

other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{sys.argv[1]}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
for line in json.loads(sys.argv[2]):
    sys.argv = ["snpatch", *line]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            print("exit", end.code)
if other:
    os.waitpid(other, 0)
"""


def test_two_processes_train_the_same_as_one(toy, tmp_path, capsys):
    """Processes start as accelerate starts them, on a CPU. Rows have unequal lengths, so the processes' shares are
    unequal.
    `resumed_dpo` resumes a training that one process began.
    """
    messages, pairs = write(tmp_path / "sft.jsonl", MESSAGES), write(tmp_path / "dpo.jsonl", PAIRS)

    def lines(home):
        sft = ["train", "sft", toy.base, messages, "-o", home / "sft", *OPTIONS, "--json"]
        dpo = ["train", "dpo", toy.base, pairs, "--sft", home / "sft", "-o", home / "dpo", *OPTIONS, "--json"]
        resumed_dpo = ["train", "dpo", toy.base, pairs, "--sft", toy.sft(), "-o", home / "late", *OPTIONS, "--json"]
        lora_dpo = ["train", "dpo", toy.base, pairs, "--sft", toy.sft("lora"), "--method", "lora", "-o", home / "lora"]
        full_dpo = ["train", "dpo", toy.sft("full"), pairs, "--method", "full", "-o", home / "full"]
        further = [[*command, *OPTIONS, "--learning-rate", 1e-3, "--json"] for command in (lora_dpo, full_dpo)]
        invalid = ["train", "sft", toy.base, messages, "-o", home / "odd", *OPTIONS, "--batch-size", 2]
        return [sft, dpo, resumed_dpo, *further, sft, invalid]

    with pytest.raises(KeyboardInterrupt):
        folder = tmp_path / "two" / "late"
        train_dpo(toy.base, toy.sft(), PAIRS, folder, dpo_settings(epochs=2), on_step=_stop_at(4), save_steps=3)
    outputs = _run_in_two_processes(lines(tmp_path / "two"), tmp_path)
    rank_0_lines, rank_1_lines = (out.splitlines() for out, _ in outputs)
    assert rank_1_lines == ["exit 2"], outputs[1]
    assert len(rank_0_lines) == 7, outputs[0]
    sft, dpo, resumed_dpo, lora_dpo, full_dpo, repeated_sft = map(json.loads, rank_0_lines[:6])
    assert rank_0_lines[6] == "exit 2"
    message = "batch_size: expected a multiple of micro_batch_size x processes = 2 x 2, got 2"
    assert all(message in err for _, err in outputs)
    assert {sft["processes"], dpo["processes"], resumed_dpo["processes"]} == {2}
    assert (sft["resumed_at"], dpo["resumed_at"], resumed_dpo["resumed_at"]) == (0, 0, 3)
    assert repeated_sft == sft
    for line, expected in zip(lines(tmp_path / "one"), (sft, dpo, resumed_dpo, lora_dpo, full_dpo), strict=False):
        code, out, err = run(capsys, *line)
        assert code == 0, err
        figures = json.loads(out)
        assert (figures["processes"], figures["steps"]) == (1, expected["steps"])
        for name in ("first_loss", "last_loss", *(["margin"] if "margin" in figures else [])):
            assert expected[name] == pytest.approx(figures[name], abs=1e-5)
    for name in ("sft", "dpo", "late"):
        vectors, expected_vectors = load_vectors(tmp_path / "two" / name), load_vectors(tmp_path / "one" / name)
        torch.testing.assert_close(vectors, expected_vectors, rtol=0, atol=1e-5)
        assert files(tmp_path / "two" / name) == files(tmp_path / "one" / name)
    for name in ("lora", "full"):
        torch.testing.assert_close(*(weights(tmp_path / by / name) for by in ("two", "one")), rtol=0, atol=1e-5)
    for name in ("sft", "dpo", "late"):
        assert len((tmp_path / "two" / name / "training.csv").read_text().splitlines()) == 1 + sft["steps"]


def _run_in_two_processes(lines, folder):
    """Run the same command lines in two processes; return (stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    argv = [sys.executable, "-c", COMMANDS, str(folder), json.dumps([[*map(str, line)] for line in lines])]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | group | {"ACCELERATE_USE_CPU": "true"}, start_new_session=True
    )
    try:
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(2)]


# ---- Command line

OPTIONS = ["--learning-rate", RATES["ia3"], "--batch-size", 4, "--micro-batch-size", 2, "--epochs", 2,
           "--max-length", 32, "--no-gradient-checkpointing"]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hub_calls(monkeypatch):
    """Arguments of each load from the hub. A load fails, or returns the rows of the file `hub_calls.rows`."""

    class Calls(list):
        rows = None

    calls = Calls()

    def fake_load(source, **how):
        calls.append({"source": source, **{name: value for name, value in how.items() if value is not None}})
        if calls.rows is None:
            raise SnpatchError("no hub here")
        return load_dataset(calls.rows, format=source, skip_invalid=how["skip_invalid"])

    monkeypatch.setattr(prompt_set, "load_dataset", fake_load)
    return calls


def test_commands_train_the_same_as_functions(toy, tmp_path, capsys):
    messages, pairs = write(tmp_path / "sft.jsonl", MESSAGES), write(tmp_path / "dpo.jsonl", PAIRS)
    code, out, err = run(capsys, "train", "sft", toy.base, messages, "-o", tmp_path / "sft", *OPTIONS)
    assert code == 0, err
    assert out.splitlines()[0].startswith("sft: 4 steps, loss ")
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'sft'}: wrote ")
    assert "sft: 4/4 loss " in err
    code, out, err = run(capsys, "train", "sft", toy.base, messages, "-o", tmp_path / "sft", *OPTIONS)
    assert (code, out.splitlines()[-1]) == (0, f"{tmp_path / 'sft'}: training was already done")
    train_sft(toy.base, MESSAGES, tmp_path / "own-sft", settings(epochs=2, weight_decay=0.1))
    assert_same_training(tmp_path / "sft", tmp_path / "own-sft")
    command = ["train", "dpo", toy.base, pairs, "--sft", tmp_path / "sft", "-o", tmp_path / "dpo", *OPTIONS, "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    figures = json.loads(out)
    assert (figures["out"], figures["steps"], figures["rows"]) == (str(tmp_path / "dpo"), 4, 8)
    train_dpo(toy.base, tmp_path / "sft", PAIRS, tmp_path / "own-dpo", dpo_settings(epochs=2))
    assert_same_training(tmp_path / "dpo", tmp_path / "own-dpo")
    assert run(capsys, *command) == (0, out, "")


def test_lora_options_reach_the_adapter(toy, tmp_path, capsys):
    messages = write(tmp_path / "sft.jsonl", MESSAGES)
    command = ["train", "sft", toy.base, messages, *OPTIONS, "--method", "lora", "--lora-rank", 2]
    assert run(capsys, *command, "-o", tmp_path / "default")[0] == 0
    assert (
        run(capsys, *command, "-o", tmp_path / "own", "--lora-targets", "o_proj", "--lora-targets", "up_proj")[0] == 0
    )
    for name, targets in (("default", ["q_proj", "v_proj"]), ("own", ["o_proj", "up_proj"])):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["r"], sorted(config["target_modules"])) == (2, targets)


@pytest.mark.parametrize(("name", "kind"), [("sft", TrainSettings), ("dpo", DpoSettings)])
def test_every_setting_is_an_option_with_its_default(name, kind):
    options = {option.name: option for option in typer.main.get_command(command.app).commands[name].params}
    for setting in fields(kind):
        assert f"--{setting.name.replace('_', '-')}" in options[setting.name].opts
        if setting.name != "lora_targets":
            assert options[setting.name].default == setting.default


def test_limit_and_filter_select_rows(toy, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", [pair | {"kind": "ab"[i % 2]} for i, pair in enumerate(PAIRS)])
    command = ["train", "dpo", toy.base, pairs, "--sft", toy.sft(), *OPTIONS, "--json"]
    for name, choice, rows in (
        ("limit", ["--limit", 3], PAIRS[:3]),
        ("filter", ["--filter", "kind=b,c"], PAIRS[1::2]),
        ("both", ["--filter", "kind=b", "--limit", 2], PAIRS[1::2][:2]),
    ):
        code, out, err = run(capsys, *command, *choice, "-o", tmp_path / name)
        assert code == 0, err
        assert json.loads(out)["rows"] == len(rows)
        train_dpo(toy.base, toy.sft(), rows, tmp_path / f"own-{name}", dpo_settings(epochs=2))
        assert_same_training(tmp_path / name, tmp_path / f"own-{name}")


def test_file_in_published_format_is_read(toy, tmp_path, capsys):
    rows = [
        {"chosen": talk(*turns, chosen), "rejected": talk(*turns, rejected)}
        for *turns, chosen, rejected in (("ask one", "no", "yes"), ("ask two", "it is", "ask one", "never", "here"))
    ]
    command = ["train", "dpo", toy.base, write(tmp_path / "hh.jsonl", rows), "--sft", toy.sft(), *OPTIONS, "--json"]
    code, out, err = run(capsys, *command, "--format", "hh-harmless", "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["rows"] == 2
    equal_pairs = [
        {"prompt": toys.to_chat("ask one"), "chosen": toys.to_answer("no"), "rejected": toys.to_answer("yes")},
        {
            "prompt": toys.to_chat("ask two", "it is", "ask one"),
            "chosen": toys.to_answer("never"),
            "rejected": toys.to_answer("here"),
        },
    ]
    train_dpo(toy.base, toy.sft(), equal_pairs, tmp_path / "own", dpo_settings(epochs=2))
    assert_same_training(tmp_path / "out", tmp_path / "own")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sft"], {"source": "sharegpt", "split": "train"}),
        (["sft", "lima"], {"source": "lima", "split": "train"}),
        (["dpo"], {"source": "hh-harmless", "split": "train"}),
        (["dpo", "hh-helpful"], {"source": "hh-helpful", "split": "train"}),
        (["dpo", "beavertails"], {"source": "beavertails", "split": "330k_train"}),
        (["dpo", "reward-bench"], {"source": "reward-bench", "split": "filtered"}),
        (["dpo", "shp", "--split", "test"], {"source": "shp", "split": "test"}),
        (["dpo", "--objective", "helpful"], {"source": "hh-helpful", "split": "train"}),
        (["dpo", "--objective", "stack-exchange"], {"source": "stack-exchange", "split": "train"}),
        (["dpo", "hh-helpful", "--revision", "v1"], {"source": "hh-helpful", "split": "train", "revision": "v1"}),
        (["dpo", "--objective", "shp", "--skip-invalid"], {"source": "shp", "split": "train", "skip_invalid": True}),
        (["sft", "--skip-invalid"], {"source": "sharegpt", "split": "train", "skip_invalid": True}),
    ],
    ids=" ".join,
)
def test_named_data_set_uses_its_training_split(toy, tmp_path, capsys, hub_calls, arguments, expected):
    kind, *options = arguments
    code, _, err = run(capsys, "train", kind, toy.base, *options, "-o", tmp_path / "out")
    assert (code, err) == (2, "snpatch: error: no hub here\n")
    assert hub_calls == [{"skip_invalid": False, **expected}]


def test_subset_options_override_the_objectives_sample(toy, tmp_path, capsys, hub_calls):
    rows = [shp("ask one", "no", "yes", 1), shp("ask two", "yes", "never", 0), shp("ask", "no", "yes", 1)]
    hub_calls.rows = write(tmp_path / "shp.jsonl", rows)
    command = ["train", "dpo", toy.base, "--sft", toy.sft(), "--objective", "shp", *OPTIONS, "--json"]
    for choice in ([], ["--sample-seed", 3]):
        code, _, err = run(capsys, *command, *choice, "-o", tmp_path / "all")
        assert code == 2
        assert "shp: sample: expected 1..3 examples, got 36000" in err
    pairs = load_dataset(hub_calls.rows, format="shp")
    for name, choice, rows in (
        ("limit", ["--limit", 2], pairs.first(2)),
        ("sample", ["--sample", 2], pairs.sample(2, 0)),
        ("other", ["--sample", 2, "--sample-seed", 3], pairs.sample(2, 3)),
    ):
        code, out, err = run(capsys, *command, *choice, "-o", tmp_path / name)
        assert code == 0, err
        assert json.loads(out)["rows"] == 2
        data = json.loads((tmp_path / name / "training.json").read_text())["provenance"]["inputs"]["data"]
        digest = hashlib.sha256(b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows.pairs()))
        assert data == {"rows": 2, "sha256": digest.hexdigest()}


def test_skip_invalid_drops_rows_and_counts_them(toy, tmp_path, capsys):
    path = write(tmp_path / "sft.jsonl", [*MESSAGES, {"messages": "hello"}])
    command = ["train", "sft", toy.base, path, *OPTIONS, "--json", "-o", tmp_path / "out"]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "sft.jsonl, line 9: " in err
    code, out, err = run(capsys, *command, "--skip-invalid")
    assert code == 0, err
    assert err.startswith(f"{path}: skipped 1 invalid rows\n")
    assert json.loads(out)["rows"] == 8


def test_pairs_without_an_answer_are_counted_everywhere(toy, tmp_path, capsys):
    half = [*PAIRS, {"prompt": "ask one", "chosen": "yes"}]
    path, reason = write(tmp_path / "half.jsonl", half), "no rejected answer"
    command = ["train", "dpo", toy.base, path, "--sft", toy.sft(), *OPTIONS, "--max-dropped"]
    code, out, err = run(capsys, *command, 0.12, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"{path}: 1 of 9 rows have a prompt and no pair: {reason}\n" in err
    assert f"dropped 1 of 9 rows: {reason}" in out
    provenance = json.loads((tmp_path / "out" / "training.json").read_text())["provenance"]
    assert (provenance["figures"]["rows"], provenance["figures"]["dropped"]) == (9, {reason: 1})
    assert provenance["inputs"]["data"]["dropped"] == {reason: 1}
    assert (provenance["source"]["rows"], provenance["source"]["no_pair"]) == (9, {reason: 1})
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "own", dpo_settings(epochs=2))
    assert_same_training(tmp_path / "out", tmp_path / "own")
    code, _, err = run(capsys, *command, 0.1, "-o", tmp_path / "less")
    assert code == 2
    assert f"dropped 1 of 9 rows: {reason}: more than max_dropped = 0.1 of the rows" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo", "DATA", "--objective", "safety"], "--objective: expected no DATA with --objective, got both"),
        (["dpo", "--objective", "kindness"], "objective: expected one of safety, helpful, harmless-helpful, shp"),
        (["dpo", "DATA", "--sft", "nowhere"], "nowhere: neither adapter_model.safetensors nor adapter_model.bin"),
        (["dpo", "nowhere.jsonl"], "nowhere.jsonl: expected a file or a dataset"),
        (["sft", "DATA"], "DATA.jsonl has no responses to train on"),
        (["sft", "DATA", "--filter", "kind"], "--filter: expected column=value,value, got 'kind'"),
        (
            ["sft", "--filter", "kind=a"],
            "--format, --split, --column, --revision, --filter: expected DATA with these options",
        ),
        (
            ["sft", "--split", "test"],
            "--format, --split, --column, --revision, --filter: expected DATA with these options",
        ),
        (
            ["sft", "--format", "lima"],
            "--format, --split, --column, --revision, --filter: expected DATA with these options",
        ),
        (["dpo", "--limit", "2", "--sample", "2"], "set hh-harmless: give first or sample, not both"),
        (["sft", "lima", "--format", "lima"], "lima: expected a file with format and column, got a dataset name"),
        (["dpo", "DATA", "--method", "all"], "method: expected one of ia3, lora, full, got 'all'"),
        (["dpo", "DATA", "--micro-batch-size", "7"], "micro_batch_size: expected a divisor of batch_size = 120, got 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_command_is_one_line_and_exit_code_2(toy, tmp_path, capsys, arguments, message):
    write(tmp_path / "DATA.jsonl", PAIRS)
    kind, *options = (str(tmp_path / "DATA.jsonl") if word == "DATA" else word for word in arguments)
    code, out, err = run(capsys, "train", kind, toy.base, *options, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out" / "training.json").exists()


def test_report_to_reaches_the_trainer(toy, tmp_path, capsys, monkeypatch):
    values, build_config = [], trainer._build_config

    def spy(*arguments, **options):
        values.append(build_config(*arguments, **options).report_to)
        raise SnpatchError("seen")

    monkeypatch.setattr(trainer, "_build_config", spy)
    command = ["train", "sft", toy.base, write(tmp_path / "sft.jsonl", MESSAGES), "-o", tmp_path / "out"]
    assert run(capsys, *command, "--report-to", "tensorboard", "--report-to", "mlflow")[0] == 2
    assert run(capsys, *command)[0] == 2
    assert values == [["tensorboard", "mlflow"], []]


# ---- Objectives and locks


def test_objectives_match_paper():
    assert {name: (data.source, data.split) for name, data in OBJECTIVES.items()} == {
        "safety": ("hh-harmless", "train"),
        "helpful": ("hh-helpful", "train"),
        "harmless-helpful": ("hh", "train"),
        "shp": ("shp", "train"),
        "reasoning": ("reward-bench", "filtered"),
        "stack-exchange": ("stack-exchange", "train"),
        "reward-bench-safety": ("reward-bench", "filtered"),
    }
    assert get_objective("shp").sample == 18 * 2000
    assert get_objective("reasoning").filter == (
        "subset", "hep-python", "hep-go", "hep-cpp", "hep-js", "hep-rust", "hep-java", "math-prm",
    )  # fmt: skip
    assert get_objective("reward-bench-safety").filter == (
        "subset", "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
        "donotanswer",
    )  # fmt: skip
    for data in OBJECTIVES.values():
        assert data.split == training_split(data.source) == DATASETS[data.source].hub.train
    assert training_split("rows.jsonl") is None


def test_second_training_in_the_same_folder_fails(toy, tmp_path):
    """The first training's checkpoints stay."""

    def start_second(step, *_) -> None:
        if step == 2:
            with pytest.raises(SnpatchError, match="another process is training in this folder"):
                train_sft(toy.base, MESSAGES, tmp_path / "out", settings())

    figures = train_sft(toy.base, MESSAGES, tmp_path / "out", settings(), on_step=start_second, save_steps=1)
    assert figures["resumed_at"] == 0
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_folder_lock_is_released_when_its_process_ends(toy, tmp_path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    with open(tmp_path / "out" / "checkpoints" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    train_sft(toy.base, MESSAGES, tmp_path / "out", settings())
