"""`snpatch reproduce`: the whole paper on a model, step by step."""

import json
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import EngineOptions, Fields, SkipInvalid, TrustConfig, with_options
from snpatch.cli.report import FILE, write_folder_page
from snpatch.errors import SnpatchError
from snpatch.utils.parsing import parse_pairs


@with_options(config=EngineOptions(has_model=False))
def reproduce(
    config: Fields,
    model: Annotated[
        str,
        typer.Option(
            help="llama2-7b, mistral-7b, gemma-7b (trained by the paper's recipe); qwen3-4b-saferl, tulu-2-7b, "
            "llama-3-8b-sft-dpo (public pairs); demo; or a preset's file (.toml)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all of it. The same folder again: goes on.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, downloads, GPU hours, disk; do nothing.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this step alone, done or not. May be repeated.", metavar="STEP")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start-at", help="Run this step and all after it, done or not.", metavar="STEP")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or name of the model, in place of the preset's.")] = None,
    use_adapter: Annotated[
        list[str] | None,
        typer.Option(help="name=folder: an adapter that is there and not trained, as dpo-42=FOLDER. May be repeated."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Training seed, the main pair's first. May be repeated.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help='What starts a training, as "accelerate launch". Default: Python.')
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts of each set.")] = None,
    skip_invalid: SkipInvalid = False,
    trust_config: TrustConfig = False,
    as_json: o.AsJson = False,
) -> None:
    """Train or take the pairs, contrast, run every experiment, report beside the paper's numbers. What is done is not
    done again, by the content of what it reads; a killed run goes on.

    Exit code 1 where an experiment failed; the others' results stand.
    """
    from snpatch.reproduce import report
    from snpatch.reproduce.pipeline import Pipeline
    from snpatch.reproduce.preset import load_preset

    if only and start:
        raise SnpatchError("give --only or --start-at, not both")
    taken = parse_pairs(use_adapter, "--use-adapter", expected="name=folder")
    pipeline = Pipeline(
        load_preset(model, base, tuple(seed or ()), trust_config),
        out,
        taken=taken,
        launcher=launcher,
        limit=limit,
        skip_invalid=skip_invalid,
        progress=o.progress_bar,
        command=o.command_line(),
        options={"model": model, "base": base, "use_adapter": taken, "seed": seed, "limit": limit},
        **config,
    )
    if dry_run:
        _show_plan(pipeline, tuple(only or ()), start, as_json)
        return
    failed = pipeline.run(tuple(only or ()), start, tell=lambda line: o.echo(line, is_error=True))
    paths = report.write(pipeline)
    if report.done_in(pipeline):
        paths.append(write_folder_page(out, out / FILE))
    if as_json:
        o.echo(json.dumps({"failed": failed, "files": [str(path) for path in paths]}))
    else:
        o.echo("wrote " + ", ".join(str(path) for path in paths))
    if failed:
        o.echo(f"snpatch: {len(failed)} experiments failed: {', '.join(failed)}; see above", is_error=True)
        raise typer.Exit(1)


def _show_plan(pipeline, only: tuple[str, ...], start: str | None, as_json: bool) -> None:
    from snpatch.report import terminal
    from snpatch.reproduce import estimates

    views = {"steps": estimates.plan(pipeline, only, start), "downloads": estimates.downloads(pipeline)}
    if as_json:
        rows = {name: [dict(zip(v.columns, row, strict=True)) for row in v.rows] for name, v in views.items()}
        commands = {name: step.command for name, step in pipeline.steps.steps.items()}
        o.echo(json.dumps({**rows, "commands": commands, "left_out": pipeline.skipped}))
        return
    with o.console() as console:
        for view in views.values():
            terminal.print_table(view, console)
        for name, why in pipeline.skipped.items():
            terminal.print_line(f"left out: {name}: {why}", console)
