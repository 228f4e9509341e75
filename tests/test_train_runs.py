"""Trainings that are interrupted, killed, repeated, shared by two processes, and started from the command line."""

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
from toys import MESSAGES, PAIRS, RATES, dpo_settings, settings, vectors

from snpatch.cli import train as command
from snpatch.data import DATASETS, load_dataset
from snpatch.errors import SnpatchError
from snpatch.training import trainer
from snpatch.training.objectives import OBJECTIVES, objective, training_split
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.training.trainer import train_dpo, train_sft
from snpatch.worlds import config

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6  # three epochs of two


toy = pytest.fixture(scope="module")(toys.toy)


def start(toy, kind, out, **how):
    """Six steps of one kind of training."""
    train, method, _, on = kind.split(" ") if " on " in kind else (*kind.split(" "), None, None)
    if train == "sft":
        return train_sft(toy.base, MESSAGES, out, settings(method, epochs=3), **how)
    options = {"epochs": 3, "weight_decay_target": 1} if on == "ia3" else {"epochs": 3}
    where = (toy.sft("full"), None) if on == "full" else (toy.base, toy.sft(on))
    return train_dpo(*where, PAIRS, out, dpo_settings(method, **options), **how)


KINDS = ["sft ia3", "sft full", "dpo ia3 on ia3", "dpo ia3 on lora", "dpo lora on lora", "dpo full on full"]


def interrupted(toy, kind, out, at, **how):
    """The same, ended by Ctrl-C at a step."""
    with pytest.raises(KeyboardInterrupt):
        start(toy, kind, out, watch=_stop_at(at), **how)


def _stop_at(at):
    def watch(step, steps, logs):
        if step == at:
            raise KeyboardInterrupt

    return watch


def weights(out):
    return load_file(out / ("model.safetensors" if (out / "config.json").exists() else "adapter_model.safetensors"))


def assert_alike(got, want):
    """The same weights bit for bit, the same table."""
    ours, theirs = weights(got), weights(want)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (got / "training.csv").read_text() == (want / "training.csv").read_text()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))


# ---- interrupted


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_and_ends_as_if_it_had_not_been(toy, tmp_path, kind):
    """From the middle of an epoch, so that the rows' order goes on, too."""
    whole = start(toy, kind, tmp_path / "whole")
    interrupted(toy, kind, tmp_path / "parts", at=5, save_steps=3)
    assert checkpoints(tmp_path / "parts") == ["checkpoint-3"]
    assert not (tmp_path / "parts" / "training.json").exists()
    told = []
    figures = start(toy, kind, tmp_path / "parts", watch=lambda step, *_: told.append(step))
    assert told == [4, 5, 6]
    assert (whole["resumed_at"], figures["resumed_at"]) == (0, 3)
    assert_alike(tmp_path / "parts", tmp_path / "whole")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    same = ("steps", "first_loss", "last_loss", "rows", "unchanged_parameters")
    assert [figures[name] for name in same] == [whole[name] for name in same]


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(toy, tmp_path, damage):
    start(toy, "dpo ia3 on ia3", tmp_path / "whole")
    out = tmp_path / "parts"
    interrupted(toy, "dpo ia3 on ia3", out, at=3, save_steps=2)
    shutil.copytree(out / "checkpoints" / "checkpoint-2", tmp_path / "kept")
    interrupted(toy, "dpo ia3 on ia3", out, at=5, save_steps=2)
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
    assert_alike(out, tmp_path / "whole")


def test_a_training_that_ends_before_its_record_is_written_is_finished(toy, tmp_path, monkeypatch):
    """The adapter lies there by then, DPO's divided by SFT's."""
    start(toy, "dpo ia3 on ia3", tmp_path / "whole")

    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.files, "write", ends)
        with pytest.raises(KeyboardInterrupt):
            start(toy, "dpo ia3 on ia3", tmp_path / "parts")
    assert (tmp_path / "parts" / "adapter_model.safetensors").exists()
    assert start(toy, "dpo ia3 on ia3", tmp_path / "parts")["resumed_at"] == STEPS
    assert_alike(tmp_path / "parts", tmp_path / "whole")


def test_a_killed_command_goes_on_when_it_is_given_again(toy, tmp_path, capsys):
    rows = write(tmp_path / "pairs.jsonl", PAIRS)
    given = ["train", "dpo", toy.base, rows, "--sft", toy.sft(), "--save-steps", 2, *OPTIONS, "--epochs", 20]
    argv = [sys.executable, "-m", "snpatch.cli", *map(str, [*given, "-o", tmp_path / "killed"])]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = "checkpoints/checkpoint-*/trainer_state.json"
    try:
        wait_for(lambda: any((tmp_path / "killed").glob(state)) or process.poll() is not None, seconds=120)
        assert process.poll() is None, "it ended before its first checkpoint"
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training.json").exists()
    code, out, err = run(capsys, *given, "-o", tmp_path / "killed", "--json")
    assert code == 0, err
    assert 2 <= json.loads(out)["resumed_at"] < 40
    assert run(capsys, *given, "-o", tmp_path / "whole")[0] == 0
    assert_alike(tmp_path / "killed", tmp_path / "whole")


# ---- repeated


def test_a_training_that_is_done_is_not_done_again(toy, tmp_path):
    figures = start(toy, "sft ia3", tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    told = []
    assert start(toy, "sft ia3", tmp_path / "out", watch=lambda *what: told.append(what)) == figures
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


@pytest.mark.parametrize("done", [True, False])
def test_a_folder_of_another_training_is_refused_by_what_differs(toy, tmp_path, done):
    out = tmp_path / "out"
    given = dpo_settings(epochs=1)
    if done:
        train_dpo(toy.base, toy.sft(), PAIRS, out, given)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_dpo(toy.base, toy.sft(), PAIRS, out, given, watch=_stop_at(1))
    before = files(out)
    others = [
        ((toy.base, toy.sft(), PAIRS), dpo_settings(epochs=1, beta=0.2), r"beta is to be 0\.2, it has 0\.1"),
        ((toy.base, toy.sft(), PAIRS), dpo_settings("lora", epochs=1), "method is to be lora, it has ia3"),
        ((toy.base, toy.sft(), PAIRS[:4]), given, r"data is to be \{'rows': 4, .* it has \{'rows': 8"),
        ((toy.base, toy.sft(), PAIRS[::-1]), given, r"data is to be \{'rows': 8, .* it has \{'rows': 8"),
        ((toy.sft("full"), toy.sft(), PAIRS), given, "model is to be [0-9a-f]{16}, it has [0-9a-f]{16};"),
        ((toy.base, toy.sft("lora"), PAIRS), given, "sft is to be [0-9a-f]{16}, it has [0-9a-f]{16};"),
        ((toy.base, None, PAIRS), given, "sft is to be None, it has [0-9a-f]{16};"),
    ]
    for arguments, options, message in others:
        with pytest.raises(SnpatchError, match=f"holds another training: {message}"):
            train_dpo(*arguments, out, options)
    with pytest.raises(SnpatchError, match="holds another training: kind is to be sft, it has dpo; choose another"):
        train_sft(toy.base, MESSAGES, out, settings(epochs=1))
    assert files(out) == before
    assert train_dpo(toy.base, toy.sft(), PAIRS, out, given)["steps"] == 2


@pytest.mark.parametrize("method", ["ia3", "full"])
def test_a_model_that_was_not_trained_here_is_left_alone(toy, tmp_path, method):
    shutil.copytree(toy.sft(method), tmp_path / "out", ignore=shutil.ignore_patterns("training*"))
    with pytest.raises(SnpatchError, match="holds a model that was not trained here; choose another folder"):
        start(toy, "sft ia3", tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(toy.sft(method)).keys()


# ---- two processes

COMMANDS = """
import json, os, sys
from snpatch import cli
from snpatch.training import trainer  # takes ten seconds, and is read once for both

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


def test_two_processes_train_what_one_trains(toy, tmp_path, capsys):
    """As accelerate starts them, on a CPU; the rows are of unequal lengths, and so are the processes' shares. They go
    on, too, with what one process began."""
    messages, pairs = write(tmp_path / "sft.jsonl", MESSAGES), write(tmp_path / "dpo.jsonl", PAIRS)

    def lines(home):
        sft = ["train", "sft", toy.base, messages, "-o", home / "sft", *OPTIONS, "--json"]
        dpo = ["train", "dpo", toy.base, pairs, "--sft", home / "sft", "-o", home / "dpo", *OPTIONS, "--json"]
        late = ["train", "dpo", toy.base, pairs, "--sft", toy.sft(), "-o", home / "late", *OPTIONS, "--json"]
        lora = ["train", "dpo", toy.base, pairs, "--sft", toy.sft("lora"), "--method", "lora", "-o", home / "lora"]
        full = ["train", "dpo", toy.sft("full"), pairs, "--method", "full", "-o", home / "full"]
        further = [[*one, *OPTIONS, "--learning-rate", 1e-3, "--json"] for one in (lora, full)]
        odd = ["train", "sft", toy.base, messages, "-o", home / "odd", *OPTIONS, "--batch-size", 2]
        return [sft, dpo, late, *further, sft, odd]

    with pytest.raises(KeyboardInterrupt):
        late = tmp_path / "two" / "late"
        train_dpo(toy.base, toy.sft(), PAIRS, late, dpo_settings(epochs=2), watch=_stop_at(4), save_steps=3)
    told = _in_two(lines(tmp_path / "two"), tmp_path)
    main, other = (out.splitlines() for out, _ in told)
    assert other == ["exit 2"], told[1]
    assert len(main) == 7, told[0]
    sft, dpo, late, lora, full, again = map(json.loads, main[:6])
    assert main[6] == "exit 2"
    assert all("batch_size must be divided by micro_batch_size x processes, got 2 and 2 x 2" in err for _, err in told)
    assert {sft["processes"], dpo["processes"], late["processes"]} == {2}
    assert (sft["resumed_at"], dpo["resumed_at"], late["resumed_at"]) == (0, 0, 3)
    assert again == sft
    for line, two in zip(lines(tmp_path / "one"), (sft, dpo, late, lora, full), strict=False):
        code, out, err = run(capsys, *line)
        assert code == 0, err
        one = json.loads(out)
        assert (one["processes"], one["steps"]) == (1, two["steps"])
        for name in ("first_loss", "last_loss", *(["margin"] if "margin" in one else [])):
            assert two[name] == pytest.approx(one[name], abs=1e-5)
    for name in ("sft", "dpo", "late"):
        got, want = vectors(tmp_path / "two" / name), vectors(tmp_path / "one" / name)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert files(tmp_path / "two" / name) == files(tmp_path / "one" / name)
    for name in ("lora", "full"):
        torch.testing.assert_close(*(weights(tmp_path / by / name) for by in ("two", "one")), rtol=0, atol=1e-5)
    for name in ("sft", "dpo", "late"):
        assert len((tmp_path / "two" / name / "training.csv").read_text().splitlines()) == 1 + sft["steps"]


def _in_two(lines, folder):
    """What two processes that run the same command lines tell: (stdout, stderr) of each."""
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


# ---- the command line

OPTIONS = ["--learning-rate", RATES["ia3"], "--batch-size", 4, "--micro-batch-size", 2, "--epochs", 2,
           "--max-length", 32, "--no-gradient-checkpointing"]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(monkeypatch):
    """Stands for the hub: what was to be loaded. It fails, or gives the rows of `asked.rows`, a file."""

    class Asked(list):
        rows = None

    calls = Asked()

    def loaded(source, **how):
        calls.append({"source": source, **{name: value for name, value in how.items() if value is not None}})
        if calls.rows is None:
            raise SnpatchError("no hub here")
        return load_dataset(calls.rows, format=source, skip_bad=how["skip_bad"])

    monkeypatch.setattr(config, "load", loaded)
    return calls


def test_the_commands_train_what_the_functions_train(toy, tmp_path, capsys):
    messages, pairs = write(tmp_path / "sft.jsonl", MESSAGES), write(tmp_path / "dpo.jsonl", PAIRS)
    code, out, err = run(capsys, "train", "sft", toy.base, messages, "-o", tmp_path / "sft", *OPTIONS)
    assert code == 0, err
    assert out.splitlines()[0].startswith("sft: 4 steps, loss ")
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'sft'}: wrote ")
    assert "sft: 4/4 loss " in err
    code, out, err = run(capsys, "train", "sft", toy.base, messages, "-o", tmp_path / "sft", *OPTIONS)
    assert (code, out.splitlines()[-1]) == (0, f"{tmp_path / 'sft'}: was done before")
    train_sft(toy.base, MESSAGES, tmp_path / "own-sft", settings(epochs=2, weight_decay=0.1))
    assert_alike(tmp_path / "sft", tmp_path / "own-sft")
    given = ["train", "dpo", toy.base, pairs, "--sft", tmp_path / "sft", "-o", tmp_path / "dpo", *OPTIONS, "--json"]
    code, out, err = run(capsys, *given)
    assert code == 0, err
    figures = json.loads(out)
    assert (figures["out"], figures["steps"], figures["rows"]) == (str(tmp_path / "dpo"), 4, 8)
    train_dpo(toy.base, tmp_path / "sft", PAIRS, tmp_path / "own-dpo", dpo_settings(epochs=2))
    assert_alike(tmp_path / "dpo", tmp_path / "own-dpo")
    assert run(capsys, *given) == (0, out, "")


def test_options_of_lora_reach_it(toy, tmp_path, capsys):
    messages = write(tmp_path / "sft.jsonl", MESSAGES)
    given = ["train", "sft", toy.base, messages, *OPTIONS, "--method", "lora", "--lora-rank", 2]
    assert run(capsys, *given, "-o", tmp_path / "default")[0] == 0
    assert run(capsys, *given, "-o", tmp_path / "own", "--lora-targets", "o_proj", "--lora-targets", "up_proj")[0] == 0
    for name, targets in (("default", ["q_proj", "v_proj"]), ("own", ["o_proj", "up_proj"])):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["r"], sorted(config["target_modules"])) == (2, targets)


@pytest.mark.parametrize(("name", "kind"), [("sft", TrainSettings), ("dpo", DpoSettings)])
def test_every_setting_is_an_option_with_its_own_default(name, kind):
    options = {option.name: option for option in typer.main.get_command(command.app).commands[name].params}
    for setting in fields(kind):
        assert f"--{setting.name.replace('_', '-')}" in options[setting.name].opts
        if setting.name != "lora_targets":
            assert options[setting.name].default == setting.default


def test_rows_are_chosen_by_limit_and_where(toy, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", [pair | {"kind": "ab"[i % 2]} for i, pair in enumerate(PAIRS)])
    given = ["train", "dpo", toy.base, pairs, "--sft", toy.sft(), *OPTIONS, "--json"]
    for name, choice, rows in (
        ("limit", ["--limit", 3], PAIRS[:3]),
        ("filter", ["--filter", "kind=b,c"], PAIRS[1::2]),
        ("both", ["--filter", "kind=b", "--limit", 2], PAIRS[1::2][:2]),
    ):
        code, out, err = run(capsys, *given, *choice, "-o", tmp_path / name)
        assert code == 0, err
        assert json.loads(out)["rows"] == len(rows)
        train_dpo(toy.base, toy.sft(), rows, tmp_path / f"own-{name}", dpo_settings(epochs=2))
        assert_alike(tmp_path / name, tmp_path / f"own-{name}")


def test_a_file_in_a_sets_published_format(toy, tmp_path, capsys):
    rows = [
        {"chosen": talk(*asked, chosen), "rejected": talk(*asked, rejected)}
        for *asked, chosen, rejected in (("ask one", "no", "yes"), ("ask two", "it is", "ask one", "never", "here"))
    ]
    given = ["train", "dpo", toy.base, write(tmp_path / "hh.jsonl", rows), "--sft", toy.sft(), *OPTIONS, "--json"]
    code, out, err = run(capsys, *given, "--format", "hh-harmless", "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["rows"] == 2
    same = [
        {"prompt": toys.said("ask one"), "chosen": toys.answered("no"), "rejected": toys.answered("yes")},
        {
            "prompt": toys.said("ask two", "it is", "ask one"),
            "chosen": toys.answered("never"),
            "rejected": toys.answered("here"),
        },
    ]
    train_dpo(toy.base, toy.sft(), same, tmp_path / "own", dpo_settings(epochs=2))
    assert_alike(tmp_path / "out", tmp_path / "own")


@pytest.mark.parametrize(
    ("given", "wanted"),
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
        (["dpo", "--objective", "shp", "--skip-bad"], {"source": "shp", "split": "train", "skip_bad": True}),
        (["sft", "--skip-bad"], {"source": "sharegpt", "split": "train", "skip_bad": True}),
    ],
    ids=" ".join,
)
def test_a_named_set_is_trained_on_by_its_training_split(toy, tmp_path, capsys, asked, given, wanted):
    kind, *rest = given
    code, _, err = run(capsys, "train", kind, toy.base, *rest, "-o", tmp_path / "out")
    assert (code, err) == (2, "snpatch: error: no hub here\n")
    assert asked == [{"skip_bad": False, **wanted}]


def test_an_objectives_own_sample_gives_way_to_what_is_asked_for(toy, tmp_path, capsys, asked):
    rows = [shp("ask one", "no", "yes", 1), shp("ask two", "yes", "never", 0), shp("ask", "no", "yes", 1)]
    asked.rows = write(tmp_path / "shp.jsonl", rows)
    given = ["train", "dpo", toy.base, "--sft", toy.sft(), "--objective", "shp", *OPTIONS, "--json"]
    for choice in ([], ["--sample-seed", 3]):
        code, _, err = run(capsys, *given, *choice, "-o", tmp_path / "all")
        assert code == 2
        assert "shp: cannot draw 36000 examples, it has 3" in err
    pairs = load_dataset(asked.rows, format="shp")
    for name, choice, rows in (
        ("limit", ["--limit", 2], pairs.first(2)),
        ("sample", ["--sample", 2], pairs.sample(2, 0)),
        ("other", ["--sample", 2, "--sample-seed", 3], pairs.sample(2, 3)),
    ):
        code, out, err = run(capsys, *given, *choice, "-o", tmp_path / name)
        assert code == 0, err
        assert json.loads(out)["rows"] == 2
        told = json.loads((tmp_path / name / "training.json").read_text())["provenance"]["asked"]["data"]
        digest = hashlib.sha256(b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows.pairs()))
        assert told == {"rows": 2, "sha256": digest.hexdigest()}


def test_broken_rows_are_left_out_if_asked_and_told(toy, tmp_path, capsys):
    path = write(tmp_path / "sft.jsonl", [*MESSAGES, {"messages": "hello"}])
    given = ["train", "sft", toy.base, path, *OPTIONS, "--json", "-o", tmp_path / "out"]
    code, _, err = run(capsys, *given)
    assert code == 2
    assert "sft.jsonl, line 9: " in err
    code, out, err = run(capsys, *given, "--skip-bad")
    assert code == 0, err
    assert err.startswith(f"{path}: left out 1 broken rows\n")
    assert json.loads(out)["rows"] == 8


def test_pairs_without_an_answer_are_counted_in_all_that_is_told(toy, tmp_path, capsys):
    half = [*PAIRS, {"prompt": "ask one", "chosen": "yes"}]
    path, why = write(tmp_path / "half.jsonl", half), "no rejected answer"
    given = ["train", "dpo", toy.base, path, "--sft", toy.sft(), *OPTIONS, "--max-dropped"]
    code, out, err = run(capsys, *given, 0.12, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"{path}: 1 of 9 rows have a prompt and no pair: {why}\n" in err
    assert f"dropped 1 of 9 rows: {why}" in out
    record = json.loads((tmp_path / "out" / "training.json").read_text())["provenance"]
    assert (record["figures"]["rows"], record["figures"]["dropped"]) == (9, {why: 1})
    assert record["asked"]["data"]["dropped"] == {why: 1}
    assert (record["source"]["rows"], record["source"]["no_pair"]) == (9, {why: 1})
    train_dpo(toy.base, toy.sft(), PAIRS, tmp_path / "own", dpo_settings(epochs=2))
    assert_alike(tmp_path / "out", tmp_path / "own")
    code, _, err = run(capsys, *given, 0.1, "-o", tmp_path / "less")
    assert code == 2
    assert f"dropped 1 of 9 rows: {why}: more than max_dropped = 0.1 of the rows" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dpo", "DATA", "--objective", "safety"], "give DATA or --objective, not both"),
        (["dpo", "--objective", "kindness"], "no objective named 'kindness': there are safety, helpful, shp"),
        (["dpo", "DATA", "--sft", "nowhere"], "cannot load nowhere: it holds no weights"),
        (["dpo", "nowhere.jsonl"], "nowhere.jsonl: no such file, nor a set of that name"),
        (["sft", "DATA"], "DATA.jsonl has no responses to train on"),
        (["sft", "DATA", "--filter", "kind"], "--filter wants column=value,value, got 'kind'"),
        (
            ["sft", "--filter", "kind=a"],
            "--format, --split, --column, --revision, --filter are for DATA: there is none",
        ),
        (["sft", "--split", "test"], "--format, --split, --column, --revision, --filter are for DATA: there is none"),
        (["sft", "--format", "lima"], "--format, --split, --column, --revision, --filter are for DATA: there is none"),
        (["dpo", "--limit", "2", "--sample", "2"], "set hh-harmless: give first or sample, not both"),
        (["sft", "lima", "--format", "lima"], "lima: format and column are for files; this is a set's name"),
        (["dpo", "DATA", "--method", "all"], "method must be one of ia3, lora, full, got 'all'"),
        (["dpo", "DATA", "--micro-batch-size", "7"], "micro_batch_size must divide batch_size, got 7 and 120"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(toy, tmp_path, capsys, given, message):
    write(tmp_path / "DATA.jsonl", PAIRS)
    kind, *rest = (str(tmp_path / "DATA.jsonl") if word == "DATA" else word for word in given)
    code, out, err = run(capsys, "train", kind, toy.base, *rest, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out" / "training.json").exists()


def test_integrations_reach_the_trainer(toy, tmp_path, capsys, monkeypatch):
    seen, config = [], trainer._config

    def spy(*arguments, **own):
        seen.append(config(*arguments, **own).report_to)
        raise SnpatchError("seen")

    monkeypatch.setattr(trainer, "_config", spy)
    given = ["train", "sft", toy.base, write(tmp_path / "sft.jsonl", MESSAGES), "-o", tmp_path / "out"]
    assert run(capsys, *given, "--report-to", "tensorboard", "--report-to", "mlflow")[0] == 2
    assert run(capsys, *given)[0] == 2
    assert seen == [["tensorboard", "mlflow"], []]


# ---- what is trained on


def test_objectives_are_the_papers():
    assert {name: (chosen.source, chosen.split) for name, chosen in OBJECTIVES.items()} == {
        "safety": ("hh-harmless", "train"),
        "helpful": ("hh-helpful", "train"),
        "shp": ("shp", "train"),
        "reasoning": ("reward-bench", "filtered"),
        "stack-exchange": ("stack-exchange", "train"),
        "reward-bench-safety": ("reward-bench", "filtered"),
    }
    assert objective("shp").sample == 18 * 2000
    assert objective("reasoning").where == (
        "subset", "hep-python", "hep-go", "hep-cpp", "hep-js", "hep-rust", "hep-java", "math-prm",
    )  # fmt: skip
    assert objective("reward-bench-safety").where == (
        "subset", "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
        "donotanswer",
    )  # fmt: skip
    for chosen in OBJECTIVES.values():
        assert chosen.split == training_split(chosen.source) == DATASETS[chosen.source].hub.train
    assert training_split("rows.jsonl") is None


def test_two_trainings_do_not_run_in_one_folder(toy, tmp_path):
    """The second ends with an error, and the first's checkpoints stay."""

    def meanwhile(step, *_) -> None:
        if step == 2:
            with pytest.raises(SnpatchError, match="another process trains in this folder"):
                train_sft(toy.base, MESSAGES, tmp_path / "out", settings())

    figures = train_sft(toy.base, MESSAGES, tmp_path / "out", settings(), watch=meanwhile, save_steps=1)
    assert figures["resumed_at"] == 0
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_folder_is_free_again_when_its_process_is_gone(toy, tmp_path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    with open(tmp_path / "out" / "checkpoints" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    train_sft(toy.base, MESSAGES, tmp_path / "out", settings())
