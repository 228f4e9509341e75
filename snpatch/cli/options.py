"""Options that commands share, and what they stand for: an engine, prompts, judges, a patch, a progress bar."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from snpatch.errors import SnpatchError

Model = Annotated[str, typer.Argument(help="Hugging Face folder or model name.")]
Prompts = Annotated[
    str,
    typer.Argument(help="File (JSONL, CSV, parquet; `prompt` or `messages`), or a data set's name: beavertails, ..."),
]
Format = Annotated[str | None, typer.Option("--format", help="The data set whose published format the file has.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave broken rows out, and say how many.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="name=folder, or name=folder,folder stacked in order. May be repeated."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Template = Annotated[str, typer.Option(help="How chats become text: auto, tokenizer or tulu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Backend = Annotated[str, typer.Option(help="auto, vllm or transformers. auto: vllm where it is installed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... (transformers only).")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Most sequences of a batch (vllm: its max_num_seqs).")]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option("--engine", help="name=value for the backend, as tensor_parallel_size=2. May be repeated."),
]
Judges = Annotated[
    list[str],
    typer.Option(
        help="Folder or hub name of a cost or reward model, `refusal` (refusal words), or module:function; as "
        "name=judge for several. May be repeated."
    ),
]
JudgeFormat = Annotated[
    str | None,
    typer.Option(
        help="Input of a score model: beaver (Beavertails' own), tulu (what the paper's code feeds it, and its numbers "
        "need), chat, pair, or a text with {prompt} and {completion}. Default: the model's own."
    ),
]
Untested = Annotated[bool, typer.Option("--allow-untested", help="Try architectures that were not tested.")]


def open_engine(model, adapter, template, dtype, backend, device, batch_size, setting, allow_untested):
    """The Engine that the common options ask for."""
    import transformers

    from snpatch.config import choose_backend
    from snpatch.engine import Engine

    transformers.utils.logging.disable_progress_bar()
    adapters = {}
    for entry in adapter or ():
        name, equals, folders = entry.partition("=")
        if not equals or not name or not folders:
            raise SnpatchError(f"--adapter wants name=folder or name=folder,folder; got {entry!r}")
        if name in adapters:
            raise SnpatchError(f"--adapter names {name!r} twice")
        adapters[name] = folders.split(",")
    backend = choose_backend(backend)
    settings = pairs(setting, "--engine")
    if backend == "transformers":
        settings |= {"device": device}
    elif device != "auto":
        raise SnpatchError("--device is for --backend transformers; vllm runs on its own platform")
    if batch_size is not None:
        settings |= {"batch_size": batch_size}
    return Engine(
        model, adapters, backend=backend, template=template, dtype=dtype, allow_untested=allow_untested, **settings
    )


def pairs(texts: list[str] | None, option: str) -> dict[str, object]:
    """name=value of a repeated option; a value is JSON where it is JSON, else as it stands."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SnpatchError(f"{option} wants name=value, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def read(prompts: str, form: str | None, limit: int | None, skip_bad: bool):
    """The Dataset of a prompts argument; what was skipped is told."""
    from snpatch.data import load

    data = load(prompts, format=form, skip_bad=skip_bad)
    if data.skipped:
        print(f"{prompts}: left out {data.skipped} broken rows", file=sys.stderr)
    return data if limit is None else data.first(min(limit, len(data)))


def a_patch(recipient: str, donor: str, ranking: Path | None, window: str | None, where: str, seed: int | None):
    from snpatch.patching.patch import Constant, Noise, Patch
    from snpatch.ranking.ranking import Ranking

    if ranking is None or window is None:
        raise SnpatchError("--donor needs --ranking and --window")
    loaded = Ranking.load(ranking)
    kind, _, argument = donor.partition(":")
    if donor == "zero":
        source = Constant.zero(loaded)
    elif kind == "mean" and argument in ("recipient", "donor"):
        source = Constant.mean(loaded, argument)
    elif kind == "noise" and argument:
        source = Noise.of_std(loaded, a_number(argument, float, "--donor noise:N"), seed=seed or 0)
    else:
        source = donor
    return Patch(recipient, source, loaded, a_window(window), a_where(where))


def a_window(text: str):
    from snpatch.patching.patch import Window

    lo, colon, hi = text.strip().partition(":")
    if not colon:
        return Window(0, a_number(lo, int, "a window"))
    return Window(a_number(lo, int, "a window"), a_number(hi, int, "a window"))


def a_where(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def a_number(text: str, kind: Callable, what: str):
    try:
        return kind(text)
    except ValueError:
        raise SnpatchError(f"{what}: {text!r} is not a number") from None


@contextmanager
def open_judges(entries: list[str], form: str | None, backend: str, device: str) -> Iterator[dict]:
    """name=judge, or the judge alone (then its name is "cost"), each opened, and closed afterwards."""
    from snpatch.judges.opening import is_model, open_judge

    named = {}
    for entry in entries:
        name, _, source = entry.rpartition("=")
        if (name or "cost") in named:
            raise SnpatchError(f"--judge: two judges have one name ({name or 'cost'}): give them as name=judge")
        named[name or "cost"] = source
    if form is not None and not any(map(is_model, named.values())):
        raise SnpatchError("--judge-format is for a model, and no judge is one")
    arguments = {"format": form, "backend": backend} | ({"device": device} if device != "auto" else {})
    judges = {}
    with ExitStack() as opened:
        for name, source in named.items():
            judges[name] = open_judge(source, **(arguments if is_model(source) else {}))
            if is_model(source):
                opened.callback(judges[name].close)
        yield judges


def show(report, out: Path, as_json: bool) -> list[Path]:
    """Write a report and print it; the files that it wrote."""
    from rich.console import Console

    from snpatch.report import files, terminal

    paths = files.write(report, out)
    if as_json:
        told = {"name": report.name, "tables": report.tables, "headline": report.headline}
        print(json.dumps({**told, "files": [str(path) for path in paths]}))
        return paths
    console = Console(width=None if sys.stdout.isatty() else 160)
    terminal.show(report, console)
    console.print("wrote " + ", ".join(str(path) for path in paths), highlight=False, soft_wrap=True)
    return paths


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; where that is no terminal, a line at the start of each tenth."""
    if not sys.stderr.isatty():
        told = -1

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
