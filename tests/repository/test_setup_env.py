"""The set-up stops with one clear line: old Python, no compiler, full disk, a failed step."""

import ast
import collections
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "setup_env.py"
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def setup_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("SNPATCH_STACK", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**12))
    return module


def exit_message(call, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        call(*arguments)
    assert isinstance(exit_info.value.code, str)
    assert "\n" not in exit_info.value.code
    return exit_info.value.code


def test_check_machine_with_an_old_python_says_so(setup_env, monkeypatch):
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    assert "expected Python 3.11 or newer" in exit_message(setup_env.check_machine, "cpu")
    assert "is 3.8" in exit_message(setup_env.check_machine, "cpu")


def test_check_machine_without_a_compiler_says_so(setup_env, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "expected a C++ compiler" in exit_message(setup_env.check_machine, "cpu")


def test_setup_with_a_full_disk_says_so_before_and_during_a_step(setup_env, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
    assert "expected 6 GB of free disk for the cpu stack" in exit_message(setup_env.check_machine, "cpu")
    assert "expected 20 GB" in exit_message(setup_env.check_machine, "cuda")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**7))
    failing = sys.executable, "-c", "raise SystemExit(1)"
    assert exit_message(setup_env.run, "a step", *failing).endswith("the disk is full")


def test_run_names_the_failed_step(setup_env):
    message = exit_message(setup_env.run, "a step", sys.executable, "-c", "exit(3)")
    assert "a step failed, see the lines above" in message


def test_select_stack_follows_the_gpu_unless_set(setup_env, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setattr(shutil, "which", lambda name: str(smi) if name == "nvidia-smi" and smi.exists() else None)
    assert setup_env.select_stack() == "cpu"
    for status, stack in ((1, "cpu"), (0, "cuda")):
        smi.write_text(f"#!/bin/sh\nexit {status}\n")
        os.chmod(smi, 0o755)
        assert setup_env.select_stack() == stack
    monkeypatch.setenv("SNPATCH_STACK", "cpu")
    assert setup_env.select_stack() == "cpu"
    monkeypatch.setenv("SNPATCH_STACK", "tpu")
    assert "SNPATCH_STACK: expected cpu or cuda, got 'tpu'" in exit_message(setup_env.select_stack)
