"""Starting a training: the command line that says all of its settings, and the process that it runs in.

Why a process of its own: it frees the GPU for the engine when it ends, and accelerate can start it on several.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.training.settings import TrainSettings

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launcher_of(text: str) -> list[str]:
    """What starts a training, from text: words of a command that is on PATH or beside this Python; default: Python."""
    words = shlex.split(text) or [sys.executable]
    found = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    if found is None:
        raise SnpatchError(f"--launcher: there is no program {words[0]}")
    return [found, *words[1:]]


def train_command(
    launcher: Sequence[str],
    model: str,
    rows: PromptSet,
    source: str,
    out: Path,
    settings: TrainSettings,
    sft: Path | None,
    skip_invalid: bool,
) -> list[str]:
    """`snpatch train` with everything that differs from its defaults. source: where the rows lie; sft: for DPO."""
    command = [*launcher, "-m", "snpatch.cli", "train", "dpo" if sft else "sft", model, source, "--out", str(out)]
    if sft:
        command += ["--sft", str(sft)]
    for name in ("first", "format", "split", "column", "revision", "sample"):
        if getattr(rows, name) is not None:
            command += ["--limit" if name == "first" else f"--{name}", str(getattr(rows, name))]
    if rows.sample is not None:
        command += ["--sample-seed", str(rows.seed)]
    if rows.filter:
        if any("," in value for value in rows.filter):
            raise SnpatchError(f"{rows.source}: filter: `snpatch train` has no way to name a value with a comma")
        command += ["--filter", f"{rows.filter[0]}={','.join(rows.filter[1:])}"]
    if skip_invalid:
        command.append("--skip-invalid")
    for f in fields(settings):
        value, option = getattr(settings, f.name), f.name.replace("_", "-")
        if value == f.default:
            continue
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            for one in value if isinstance(value, tuple) else (value,):
                command += [f"--{option}", str(one)]
    return command


def run(command: Sequence[str]) -> None:
    """Run a training to its end; its own words go to stderr. It ends with this process, if that is killed, too.

    What a launcher has started is the launcher's to end: of a killed one a training may live on, and holds its folder.
    """
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}
    process = subprocess.Popen(command, env=environment, stdout=2, preexec_fn=_die_with_parent)
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C reaches both: it may save and stop its own workers before it ends
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code:
        raise SnpatchError(f"the training ended with exit code {code}; see above")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
