"""Sweeps on two Ray replicas, one of which is killed: the table equals that of one engine."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from commands import run, write_sweep_file

ray = pytest.importorskip("ray", reason="replicas need Ray")

from snpatch import SnpatchError  # noqa: E402
from snpatch.sweeps.store import STORE_FILE  # noqa: E402


def replicas() -> list[int]:
    """Return the processes of all replicas."""
    output = subprocess.run(["pgrep", "-f", "ray::Replica.generate"], capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


def read_rows(path) -> list[dict]:
    """Return a table's rows; what is computed from activations depends on the batch by rounding."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rounded = ("logprob", "energy")
    return [{**row, **{name: f"{float(row[name] or 0):.3f}" for name in rounded}} for row in rows]


def count_texts(out) -> int:
    if not (out / STORE_FILE).is_file():
        return 0
    with sqlite3.connect(out / STORE_FILE) as file:
        is_made = file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'texts'").fetchone()[0]
        return file.execute("SELECT count(*) FROM texts").fetchone()[0] if is_made else 0


def test_killed_replica_is_replaced(capsys, prompts, ranking, tmp_path):
    path, out, expected_out = write_sweep_file(tmp_path, prompts, ranking), tmp_path / "out", tmp_path / "alone"
    assert run(capsys, "sweep", path, "--trust-config", "-o", expected_out)[0] == 0
    command = [
        sys.executable,
        "-m",
        "snpatch.cli",
        "sweep",
        path,
        "--trust-config",
        "-o",
        out,
        "--ray",
        "2",
        "--engine-arg",
        "batch_size=1",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and count_texts(out) < 5:
        time.sleep(0.02)
    os.kill(replicas()[0], signal.SIGKILL)
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err[-3000:]
    assert "is replaced: a replica has ended" in err
    assert read_rows(out / "sweep.csv") == read_rows(expected_out / "sweep.csv")
    with sqlite3.connect(out / STORE_FILE) as file:
        assert file.execute("SELECT count(*) FROM work").fetchone() == (0,)
    provenance = json.loads((out / "sweep.json").read_text())["provenance"]
    assert provenance["models"].keys() == {"sft", "dpo"}
    assert replicas() == []


def test_killed_replica_without_restarts_raises(capsys, prompts, ranking, tmp_path, monkeypatch):
    from snpatch.experiments import replicas

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path = write_sweep_file(tmp_path, prompts, ranking, recipients=["base"])
    monkeypatch.setattr(replicas.Replica, "prepare", lambda self: os._exit(1))
    code, _, err = run(capsys, "sweep", path, "--trust-config", "-o", tmp_path / "out", "--ray", 1)
    assert (code, "a replica has ended" in err) == (2, True)
    with pytest.raises(SnpatchError, match="went wrong"):
        raise replicas._to_snpatch_error(type("E", (Exception,), {"cause": SnpatchError("went wrong")})())
