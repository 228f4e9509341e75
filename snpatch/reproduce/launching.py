"""Training commands, and the processes that run them.

A training runs in a process of its own: it frees the GPU for the engine when it ends, and accelerate can start several.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.training.settings import TrainSettings

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parse_launcher(text: str) -> list[str]:
    """Return the words of a launcher command; default: this Python.

    The program is on PATH or next to this Python.
    """
    words = shlex.split(text) or [sys.executable]
    program = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    if program is None:
        raise SnpatchError(f"--launcher: expected a program on PATH, got {words[0]}")
    return [program, *words[1:]]


def build_train_command(
    launcher: Sequence[str],
    model: str,
    data: PromptSet,
    source: str,
    out: Path,
    settings: TrainSettings,
    sft: Path | None,
    skip_invalid: bool,
) -> list[str]:
    """Return the `snpatch train` command with every option that differs from its default.

    Args:
        launcher: Words before `-m snpatch.cli`.
        model: Folder or name of the base model.
        data: Training data.
        source: File or name of the training data.
        out: Output folder.
        settings: Settings of the training.
        sft: SFT adapter for DPO; None for SFT.
        skip_invalid: Skip broken rows.
    """
    kind = "dpo" if sft else "sft"
    command = [*launcher, "-m", "snpatch.cli", "train", kind, model, source, "--out", str(out)]
    if sft:
        command += ["--sft", str(sft)]
    command += _data_options(data)
    if skip_invalid:
        command.append("--skip-invalid")
    return [*command, *_setting_options(settings)]


def _data_options(data: PromptSet) -> Iterator[str]:
    if data.last is not None:
        raise SnpatchError(
            f"{data.source}: last: expected none for training data, got {data.last}. Use first or sample."
        )
    for name in ("first", "format", "split", "column", "revision", "sample"):
        if getattr(data, name) is not None:
            yield from ("--limit" if name == "first" else f"--{name}", str(getattr(data, name)))
    if data.sample is not None:
        yield from ("--sample-seed", str(data.seed))
    if data.filter:
        column, *values = data.filter
        if any("," in value for value in data.filter):
            raise SnpatchError(
                f"{data.source}: filter: expected values without a comma, which `snpatch train` cannot pass"
            )
        yield from ("--filter", f"{column}={','.join(values)}")


def _setting_options(settings: TrainSettings) -> Iterator[str]:
    for field in fields(settings):
        value, option = getattr(settings, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            for item in value if isinstance(value, tuple) else (value,):
                yield from (f"--{option}", str(item))


def run(command: Sequence[str], what: str = "training") -> None:
    """Run a training, or another command, to its end with its output on stderr. what: names it in errors.

    If this process is killed, the training ends as well. Processes that a launcher has started are the launcher's to
    end: if the launcher is killed, a training may survive and keep the lock on its folder.
    """
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}
    process = subprocess.Popen(command, env=environment, stdout=2, preexec_fn=_die_with_parent)
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C reaches both processes: the training may save and stop its workers before it ends
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code:
        raise SnpatchError(f"{what}: expected exit code 0, got {code}. See its output above")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
