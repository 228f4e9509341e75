"""One line on stderr for Ctrl-C: what the output folder has, and how to continue.

Why the command's callback is wrapped: typer turns KeyboardInterrupt into exit code 130 before `main` sees it.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import typer

from snpatch.cli import options as o
from snpatch.errors import SnpatchError

EXIT_CODE = 130


def report_interrupts(command) -> None:
    """Make a click command, or all commands of a group, report Ctrl-C on stderr and exit with 130."""
    for subcommand in getattr(command, "commands", {}).values():
        report_interrupts(subcommand)
    if command.callback is not None:
        command.callback = _wrap(command.callback, command.name)


def _wrap(callback: Callable, name: str) -> Callable:
    @functools.wraps(callback)
    def run(**values):
        try:
            return callback(**values)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":  # a launcher starts a training in several processes
                o.echo(f"snpatch: interrupted{describe_kept(name, values)}", is_error=True)
            raise typer.Exit(EXIT_CODE) from None

    return run


def describe_kept(command: str, values: dict) -> str:
    """Return ": ", what an interrupted command has stored, and how to continue.

    The text is "" for commands that write nothing.

    Args:
        command: Name of the command, for example "run" of `snpatch sweep run`.
        values: Its parameters.
    """
    if command not in _DESCRIPTIONS:
        return ""
    stored = _DESCRIPTIONS[command](values)
    if stored is None:
        return ": nothing is stored. Repeat the command to start again."
    return f": {stored} in {values['out']}. Repeat the command to resume."


def _describe_completions(values: dict, with_total: bool = False) -> str | None:
    """Return how many completions the store has.

    For a sweep, whose completions are all requested, add of how many.
    """
    from snpatch.sweeps.store import STORE_FILE, Store, parse_shard, shard_name

    shard = values.get("shard")
    try:
        with Store(
            values["out"], must_exist=True, name=shard_name(*parse_shard(shard)) if shard else STORE_FILE
        ) as store:
            status = store.status()
    except SnpatchError:  # the store was not made yet, or the shard is invalid
        return None
    total = status.done + status.open + status.failed
    of_total = f" of {total}" if with_total and total else ""
    return f"{status.done}{of_total} completions are stored"


def _describe_experiments(values: dict) -> str:
    completions = _describe_completions(values)
    return f"finished tables and {completions}" if completions else "finished tables are stored"


def _describe_steps(values: dict) -> str | None:
    from snpatch.reproduce.steps import STEPS_FILE

    path = Path(values["out"]) / STEPS_FILE
    if not path.is_file():
        return None
    num_done = sum("outputs" in record for record in json.loads(path.read_text(encoding="utf-8")).values())
    return f"{num_done} finished steps and the completions of the interrupted one are stored"


def _describe_training(values: dict) -> str | None:
    from snpatch.training import record

    checkpoint = record.find_checkpoint(Path(values["out"]))
    return None if checkpoint is None else f"the training up to step {record.checkpoint_step(checkpoint)} is stored"


def _describe_nothing(values: dict) -> None:
    return None


_DESCRIPTIONS: dict[str, Callable[[dict], str | None]] = {
    "run": functools.partial(_describe_completions, with_total=True),
    "find-minimal": _describe_completions,
    "demo": _describe_completions,
    "exp": _describe_experiments,
    "reproduce": _describe_steps,
    "sft": _describe_training,
    "dpo": _describe_training,
    "build": lambda values: "finished models are stored",
    **dict.fromkeys(("generate", "contrast", "fit", "eval", "apply", "report", "export"), _describe_nothing),
}
