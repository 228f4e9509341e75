"""Progress bars of Python calls: when they are shown, and messages of long steps."""

import io
import sys

import pytest

from snpatch.utils import progress as module
from snpatch.utils.progress import announced, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shown_by_default(monkeypatch):
    monkeypatch.setattr(module, "_is_shown_by_default", True)  # the command line switches it off


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function, because pytest sets sys.stderr again between fixtures and test."""

    def open_one() -> Terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return open_one


def test_progress_is_off_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with open_progress(None, "generate") as report:
        assert report is None


def test_progress_shows_a_bar_in_a_terminal(open_terminal):
    terminal = open_terminal()
    with open_progress(None, "generate") as report:
        report(1, 3)
        report(3, 3)
    assert "generate" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_progress_true_shows_a_bar_without_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with open_progress(True, "contrast") as report:
        report(2, 2)
    assert "2/2" in stream.getvalue()


def test_progress_false_and_default_off_show_nothing(open_terminal, monkeypatch):
    terminal = open_terminal()
    with open_progress(False, "generate") as report:
        assert report is None
    monkeypatch.setattr(module, "_is_shown_by_default", False)
    with open_progress(None, "generate") as report:
        assert report is None
    assert not terminal.getvalue()


def test_progress_callback_is_passed_on():
    calls = []
    with open_progress(lambda *counts: calls.append(counts), "generate") as report:
        report(1, 2)
    assert calls == [(1, 2)]


def test_announced_prints_seconds_in_a_terminal(open_terminal):
    terminal = open_terminal()
    with announced("starting vLLM"):
        pass
    assert terminal.getvalue() == "snpatch: starting vLLM ...\nsnpatch: starting vLLM took 0 s\n"
