"""Printed output: all encodings, closed pipes and full disks, and markup shown as text."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run
from rich.progress import Progress

from snpatch.cli import options
from snpatch.cli.generate import write_completions
from snpatch.data import load_dataset
from snpatch.errors import SnpatchError, encodable
from snpatch.models.fingerprint import fingerprint_checkpoint
from snpatch.ranking.ranking import Ranking
from snpatch.report.report import Report, TableView
from snpatch.sweeps.store import Store

TEXT = "“yes” é 漢 😀 \ud800 [/INST] [b]"
CHAT = [{"role": "user", "content": "café 😀"}]


def capture_stdout(monkeypatch, encoding, act):
    """Return what an action writes to a stdout of some encoding, as text."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    act()
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift_jis"])
@pytest.mark.parametrize("as_json", [False, True])
def test_completions_are_written_completely_in_every_encoding(monkeypatch, encoding, as_json):
    completion = SimpleNamespace(text=TEXT, finish_reason="eos", overwrites=0, token_ids=[1])
    text = capture_stdout(monkeypatch, encoding, lambda: write_completions([CHAT], [completion], [{}], None, as_json))
    if as_json:
        row = json.loads(text)
        assert (row["prompt"], row["completion"]) == (CHAT[0]["content"], TEXT)
    else:
        unescaped = json.loads('"' + text.replace("\n", "\\n") + '"')
        assert unescaped == f"> {CHAT[0]['content']}\n{TEXT}\n\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_and_lines_are_written_completely_in_every_encoding(monkeypatch, encoding, tmp_path):
    report = Report("t", {"t": [{"a": 1}]}, {}, (TableView(("é",), ((TEXT,),), title="漢"),), [TEXT])
    text = capture_stdout(monkeypatch, encoding, lambda: options.write_report(report, tmp_path, as_json=False))
    assert text.count("[/INST] [b]") == 2
    assert text.count("\\ud83d\\ude00" if encoding != "utf-8" else "😀") == 2
    assert text.count("\\ud800") == 2
    line = capture_stdout(monkeypatch, encoding, lambda: options.echo(TEXT))
    assert json.loads(f'"{line.strip()}"') == TEXT


def test_encodable_keeps_encodable_text():
    assert encodable("é😀", "latin-1") == "é\\ud83d\\ude00"
    assert encodable("é😀", "utf-8") == "é😀"


def test_progress_bars_show_names_and_notes_unchanged(monkeypatch):
    updates = []
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(Progress, "update", lambda self, task, **how: updates.append(how))
    with options.progress_bar("run [/x] [b]") as tell:
        tell(1, 2, "note [/INST]")
    assert updates[0]["description"] == "run [/x] [b] note [/INST]"


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">/dev/full", "stdout: cannot be written: No space left on device"),
        (">&-", "stdout: closed. Redirect it to a file, or to /dev/null."),
        ("| true", "stdout: cannot be written: Broken pipe"),
    ],
)
def test_unwritable_stdout_raises_one_line_error(redirection, message):
    command = f"{sys.executable} -m snpatch.cli env --json {redirection}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if redirection == "| true" and result.returncode == 0:
        pytest.skip("`true` ended after the text was written")
    assert (result.returncode, result.stderr) == (2, f"snpatch: error: {message}\n")


def test_closed_stderr_adds_nothing_to_stdout():
    command = f"{sys.executable} -m snpatch.cli env --json 2>&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0
    assert json.loads(result.stdout)
    command = f"{sys.executable} -m snpatch.cli report missing 2>&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")


def test_ascii_locale_does_not_change_results(tmp_path):
    for name, env in (("utf", {}), ("ascii", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})):
        code = (
            "import json, sys; from pathlib import Path; from snpatch.data import load_dataset; "
            "print(json.dumps([load_dataset(sys.argv[1]).prompts, load_dataset(sys.argv[2]).prompts]))"
        )
        row = json.dumps({"prompt": TEXT[:12]}, ensure_ascii=False)
        (tmp_path / "p.jsonl").write_text(f"{row}\n", encoding="utf-8")
        (tmp_path / "p.csv").write_text(f"prompt\n{TEXT[:12]}\n", encoding="utf-8")
        result = subprocess.run([sys.executable, "-c", code, tmp_path / "p.jsonl", tmp_path / "p.csv"],
                              capture_output=True, text=True, env={**os.environ, **env})  # fmt: skip
        assert result.returncode == 0, result.stderr
        (tmp_path / name).write_text(result.stdout)
    assert (tmp_path / "utf").read_text() == (tmp_path / "ascii").read_text()
    assert len(json.loads((tmp_path / "utf").read_text())) == 2


NO_UTF8 = os.fsdecode(b"caf\xe9")


def test_files_with_non_utf8_names_are_read_and_written(tmp_path, capsys, monkeypatch):
    folder = tmp_path / NO_UTF8
    folder.mkdir()
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert len(load_dataset(folder / "p.jsonl")) == 1
    order = Ranking.from_scores(torch.arange(16.0).reshape(2, 8))
    order.save(folder / "r.safetensors")
    with pytest.raises(SnpatchError, match="is not valid UTF-8"):  # safetensors opens none
        Ranking.load(folder / "r.safetensors")
    with Store(folder / "store") as store:
        monkeypatch.setattr(sys, "argv", ["snpatch", "sweep", NO_UTF8])
        store.finish_run(store.start_run(options.command_line()), "done")
    code, out, _ = run(capsys, "sweep", "status", folder / "store")
    assert (code, "caf\\udce9" in out) == (0, True)
    report = Report(NO_UTF8, {NO_UTF8: [{"a": NO_UTF8}]}, {}, (TableView(("a",), ((NO_UTF8,),)),), [NO_UTF8])
    options.write_report(report, folder, as_json=False)
    assert capsys.readouterr().out.count("caf\\udce9") >= 2
    code, _, err = run(capsys, "generate", folder / "missing", folder / "p.jsonl", "--backend", "transformers")
    assert (code, err.count("\n"), "caf\\udce9" in err) == (2, 1, True)


def test_fingerprint_does_not_depend_on_encoding_of_names(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("config.json", "a.safetensors", f"{NO_UTF8}.safetensors"):
        (tmp_path / name).write_text("{}")
    assert len(fingerprint_checkpoint(tmp_path)) == 16


@pytest.mark.parametrize("cache_content", ["[]", "{}", "[" * 10**5, '{"x": 1}', "\x00", None])
def test_missing_or_damaged_hash_cache_only_costs_time(tmp_path, monkeypatch, cache_content):
    for name in ("config.json", "a.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fingerprint = fingerprint_checkpoint(tmp_path)
    if cache_content is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "cache" / "snpatch" / "digests.json").write_text(cache_content)
    assert fingerprint_checkpoint(tmp_path) == fingerprint


def no_home():
    """Raise what Path.home does for a user that no /etc/passwd knows."""
    raise RuntimeError("Could not determine home directory.")


def test_rich_console_ignores_markup_in_paths(capsys, tmp_path):
    folder = tmp_path / "[red]x[" / "y]"
    report = Report("t", {"t": [{"a": 1}]}, {}, (TableView(("a",), (("[/]",),)),), [])
    options.write_report(report, folder, as_json=False)
    assert "[red]x[/y]" in capsys.readouterr().out.replace("\n", "")


def test_log_of_the_library_goes_to_stderr_with_control_characters_escaped(capsys, monkeypatch):
    def fail(*_, **__):
        logging.getLogger("snpatch.sweeps.queue").warning("snpatch: a%%\x1b[1m %s", "b%")
        logging.getLogger("snpatch.server.launcher").info("snpatch: serving")
        raise SnpatchError("stop")

    monkeypatch.setattr("snpatch.data.load_dataset", fail)
    code, out, err = run(capsys, "generate", "m", "prompts.jsonl")
    assert (code, out) == (2, "")
    assert err == "snpatch: a%\\u001b[1m b%\nsnpatch: serving\nsnpatch: error: stop\n"
    logger = logging.getLogger("snpatch")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.WARNING, True)
