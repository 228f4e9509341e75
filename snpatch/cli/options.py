"""Options that several commands have, and output: engines, judges, reports, text and progress bars."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from snpatch.config import EngineConfig
from snpatch.errors import ESCAPE, SnpatchError, encodable, one_line, printable
from snpatch.names import check_name
from snpatch.utils.parsing import parse_pairs

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL to this file instead of text to stdout.")]
Judges = Annotated[
    list[str],
    typer.Option(
        help="Judge: folder or hub name of a cost or reward model, `refusal` (refusal words), or module:function. "
        "name=judge for several. Repeatable."
    ),
]
OptionalJudges = Annotated[list[str] | None, *get_args(Judges)[1:]]
JudgeFormat = Annotated[
    str | None,
    typer.Option(
        help="Input format of a score model: beaver (Beavertails' own), tulu (of the paper's code and numbers), chat, "
        "pair, or a text with {prompt} and {completion}. Default: the model's own."
    ),
]


def open_engine(config: EngineConfig):
    """Open the engine of a config; print the memory of secondary weights."""
    import transformers

    from snpatch.engine import Engine

    transformers.utils.logging.disable_progress_bar()
    engine = Engine.from_config(config)
    if config.secondary is not None:
        print(f"snpatch: {engine.executor.memory}", file=sys.stderr)
    return engine


@contextmanager
def open_judges(entries: list[str], form: str | None, config: EngineConfig) -> Iterator[dict]:
    """Open judges (name=judge, or one judge that is called "cost"); close them at the end."""
    from snpatch.judges.factory import is_model_judge, open_judge

    sources = parse_sources(entries, "judge", lambda _: "cost")
    check_judge_format(form, sources)
    arguments = {"format": form, "backend": config.backend}
    if config.device != EngineConfig.device:
        arguments["device"] = config.device
    judges = {}
    with ExitStack() as opened:
        for name, source in sources.items():
            judges[name] = open_judge(source, **(arguments if is_model_judge(source) else {}))
            if is_model_judge(source):
                opened.callback(judges[name].close)
        yield judges


def check_judge_format(form: str | None, sources: Mapping[str, str]) -> None:
    """Raise if --judge-format was given and no judge is a model."""
    from snpatch.judges.factory import is_model_judge

    if form is not None and not any(map(is_model_judge, sources.values())):
        raise SnpatchError("--judge-format: expected a model as judge, got none. Leave the option out.")


def parse_sources(entries: list[str] | None, option: str, default_name: Callable[[str], str]) -> dict[str, str]:
    """Parse repeated `name=source` options; a source without a name is called `default_name(source)`."""
    form = "a source or name=source"
    sources = parse_pairs(entries, f"--{option}", expected=form, default_name=default_name)
    for name in sources:
        check_name(name, f"--{option}: one")
    return sources


def file_stem(source: str) -> str:
    """Return the default name of a file (without its suffix) or of a folder (whole)."""
    path = Path(source)
    return path.name if path.is_dir() else path.stem


def command_line() -> str:
    """Return the command that runs, as it can be typed again. File names that are not UTF-8 are escaped."""
    return printable(shlex.join(["snpatch", *sys.argv[1:]]))


def echo(text: str, *, is_error: bool = False) -> None:
    """Print lines to stdout or stderr, with control characters escaped."""
    if is_error:
        print(printable(text), file=sys.stderr, flush=True)
    else:
        write(text + "\n")


def write(text: str) -> None:
    """Write to stdout; control characters, and characters that its encoding lacks, are escaped."""
    with _written():
        sys.stdout.write(encodable(printable(text), sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()


@contextmanager
def _written() -> Iterator[None]:
    """Raise SnpatchError if stdout is full or its reader has closed it."""
    try:
        yield
    except OSError as error:
        with open(os.devnull, "w") as devnull:  # or Python would write the rest of the buffer when it exits
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        raise SnpatchError(f"stdout: cannot be written: {error.strerror or error}") from error


def write_report(report, out: Path, as_json: bool) -> list[Path]:
    """Write a report's files, print it, and return the paths of the files."""
    from snpatch.report import files, terminal

    paths = files.write_report(report, out)
    if as_json:
        content = {"name": report.name, "tables": report.tables, "headline": report.headline, "notes": report.notes}
        echo(json.dumps({**content, "files": [str(path) for path in paths]}))
        return paths
    with console() as screen:
        terminal.print_report(report, screen)
        terminal.print_line("wrote " + ", ".join(map(str, paths)), screen)
    return paths


@contextmanager
def console() -> Iterator["Console"]:
    """Yield a rich console on stdout; characters that its encoding lacks are escaped."""
    from rich.console import Console

    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors=ESCAPE)
    with _written():
        yield Console(width=None if sys.stdout.isatty() else 160)
        sys.stdout.flush()


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[..., None]]:
    """Yield a callback `(done, total, note="")` that draws a bar on stderr.

    Without a terminal it writes a line per tenth.
    """
    name = one_line(name)
    if not sys.stderr.isatty():
        last_tenth = -1

        def print_tenth(done: int, total: int, note: str = "") -> None:
            nonlocal last_tenth
            if done * 10 // total > last_tenth:
                last_tenth = done * 10 // total
                print(f"{name}: {done}/{total} {one_line(note)}".rstrip(), file=sys.stderr, flush=True)

        yield print_tenth
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{name} {one_line(note)}".rstrip())

        yield update
