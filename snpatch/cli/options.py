"""Options that commands share, and what they stand for: judges, an engine, a report, a progress bar."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snpatch.config import EngineConfig
from snpatch.errors import ESCAPE, SnpatchError, encodable, one_line, printable
from snpatch.names import check_name, split_name

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL there instead of to stdout.")]
Judges = Annotated[
    list[str],
    typer.Option(
        help="Folder or hub name of a cost or reward model, `refusal` (refusal words), or module:function; as "
        "name=judge for several. May be repeated."
    ),
]
OptionalJudges = Annotated[list[str] | None, *Judges.__metadata__]
JudgeFormat = Annotated[
    str | None,
    typer.Option(
        help="Input of a score model: beaver (Beavertails' own), tulu (what the paper's code feeds it, and its numbers "
        "need), chat, pair, or a text with {prompt} and {completion}. Default: the model's own."
    ),
]


def open_engine(config: EngineConfig):
    """The Engine of a config, quietly."""
    import transformers

    from snpatch.engine import Engine

    transformers.utils.logging.disable_progress_bar()
    engine = Engine.from_config(config)
    if config.secondary is not None:
        print(f"snpatch: {engine.executor.memory}", file=sys.stderr)
    return engine


@contextmanager
def open_judges(entries: list[str], form: str | None, config: EngineConfig) -> Iterator[dict]:
    """name=judge, or the judge alone (then its name is "cost"), each opened, and closed afterwards."""
    from snpatch.judges.factory import is_model_judge, open_judge

    sources = named(entries, "judge", lambda _: "cost")
    if form is not None and not any(map(is_model_judge, sources.values())):
        raise SnpatchError("--judge-format is for a model, and no judge is one")
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


def named(entries: list[str] | None, option: str, default: Callable[[str], str]) -> dict[str, str]:
    """name=source, or the source alone, named by `default`; see split_name."""
    found = {}
    for entry in entries or ():
        name, source = split_name(entry)
        if not source:
            raise SnpatchError(f"--{option}: expected a source or name=source, got {entry!r}")
        name = name or default(source)
        check_name(name, f"--{option}: one")
        if name in found:
            raise SnpatchError(f"--{option}: two have one name ({name}): give them as name=source")
        found[name] = source
    return found


def stem(source: str) -> str:
    """What a file is called where it has no other name."""
    return Path(source).stem


def command() -> str:
    """What runs now, as it can be typed again."""
    return printable(shlex.join(["snpatch", *sys.argv[1:]]))  # of names that are no UTF-8 nothing else can be kept


def tell(text: str, *, is_error: bool = False) -> None:
    """Print lines without what a terminal would obey in names and texts."""
    if is_error:
        print(printable(text), file=sys.stderr, flush=True)
    else:
        write(text + "\n")


def write(text: str) -> None:
    """Write to stdout, without what a terminal would obey, and with escapes for what its encoding lacks."""
    with _written():
        sys.stdout.write(encodable(printable(text), sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()


@contextmanager
def _written() -> Iterator[None]:
    """Turn a stdout that is full, or that nobody reads any more, into an error."""
    try:
        yield
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # the end of the process would write what is left in the buffer
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise SnpatchError(f"stdout: cannot be written: {error.strerror or error}") from error


def show(report, out: Path, as_json: bool) -> list[Path]:
    """Write a report and print it; the files that it wrote."""
    from snpatch.report import files, terminal

    paths = files.write_report(report, out)
    if as_json:
        content = {"name": report.name, "tables": report.tables, "headline": report.headline}
        tell(json.dumps({**content, "files": [str(path) for path in paths]}))
        return paths
    with console() as screen:
        terminal.print_report(report, screen)
        terminal.print_line("wrote " + ", ".join(map(str, paths)), screen)
    return paths


@contextmanager
def console() -> Iterator["Console"]:
    """A console of rich on stdout, which prints what its encoding lacks as escapes."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=ESCAPE)
    with _written():
        yield Console(width=None if sys.stdout.isatty() else 160)
        sys.stdout.flush()


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; where that is no terminal, a line at the start of each tenth. What it gives is told (done,
    total), and perhaps a note on how it goes."""
    name = one_line(name)
    if not sys.stderr.isatty():
        told = -1

        def tell(done: int, total: int, note: str = "") -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                print(f"{name}: {done}/{total} {one_line(note)}".rstrip(), file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{name} {one_line(note)}".rstrip())

        yield update
