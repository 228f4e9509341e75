"""`snpatch reproduce`: all experiments of the paper on a model, step by step."""

import json
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import EngineOptions, Fields, SkipInvalid, TrustConfig, with_options
from snpatch.cli.report import FILE, write_folder_page
from snpatch.errors import SnpatchError
from snpatch.utils.parsing import parse_pairs

Model = Annotated[
    str,
    typer.Option(
        help="Preset: llama2-7b, mistral-7b, gemma-7b, qwen2.5-3b (trained by the paper's recipe); qwen3-4b-saferl, "
        "tulu-2-7b, llama-3-8b-sft-dpo (public pairs); demo; or a preset file (.toml)."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder. Repeat the command with it to resume.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print steps, downloads, GPU hours and disk space; run nothing.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Run only this step, even if it is done. Repeatable.", metavar="STEP"),
]
StartAt = Annotated[
    str | None, typer.Option(help="Run this step and all later ones, even if they are done.", metavar="STEP")
]
Base = Annotated[str | None, typer.Option(help="Folder or name of the base model, in place of the preset's.")]
UseAdapter = Annotated[
    list[str] | None,
    typer.Option(help="Use an existing adapter instead of training it: name=folder, such as dpo-42=DPO. Repeatable."),
]
Seed = Annotated[list[int] | None, typer.Option(help="Training seed. Repeatable; the first seed trains the main pair.")]
Launcher = Annotated[str, typer.Option(help='Command that starts trainings: "accelerate launch". Default: Python.')]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts of each dataset.")]


@with_options(config=EngineOptions(has_model=False))
def reproduce(
    config: Fields,
    model: Model,
    out: Out,
    dry_run: DryRun = False,
    only: Only = None,
    start_at: StartAt = None,
    base: Base = None,
    use_adapter: UseAdapter = None,
    seed: Seed = None,
    launcher: Launcher = "",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    trust_config: TrustConfig = False,
    as_json: o.AsJson = False,
) -> None:
    """Train or reuse the pairs, rank, run every experiment, and report next to the paper's numbers.

    Interrupted runs resume. Steps whose inputs did not change are skipped. The exit code is 1 if an experiment failed;
    the results of the others are kept.
    """
    from snpatch.reproduce.pipeline import Pipeline
    from snpatch.reproduce.preset import load_preset

    if only and start_at:
        raise SnpatchError("--start-at: expected no --only with --start-at, got both. Pass one of them")
    adapters = parse_pairs(use_adapter, "--use-adapter", expected="name=folder")
    pipeline = Pipeline(
        load_preset(model, base, tuple(seed or ()), trust_config),
        out,
        provided_adapters=adapters,
        launcher=launcher,
        limit=limit,
        skip_invalid=skip_invalid,
        progress=o.progress_bar,
        command=o.command_line(),
        options={"model": model, "base": base, "use_adapter": adapters, "seed": seed, "limit": limit},
        **config,
    )
    if dry_run:
        _print_plan(pipeline, tuple(only or ()), start_at, as_json)
    else:
        _run(pipeline, tuple(only or ()), start_at, as_json)


def _run(pipeline, only: tuple[str, ...], start_at: str | None, as_json: bool) -> None:
    """Run the steps, write the report, and exit with code 1 if an experiment failed."""
    from snpatch import experiments
    from snpatch.reproduce import markdown_report

    failed = pipeline.run(only, start_at, log=lambda line: o.echo(line, is_error=True))
    paths = markdown_report.write(pipeline)
    if any(name in experiments.NAMES for name in pipeline.list_finished()):
        paths.append(write_folder_page(pipeline.out, pipeline.out / FILE))
    if as_json:
        o.echo(json.dumps({"failed": failed, "files": [str(path) for path in paths]}))
    else:
        o.echo("wrote " + ", ".join(str(path) for path in paths))
    if failed:
        o.echo(f"snpatch: {len(failed)} steps failed: {', '.join(failed)}; see above", is_error=True)
        raise typer.Exit(1)


def _print_plan(pipeline, only: tuple[str, ...], start_at: str | None, as_json: bool) -> None:
    from snpatch.report import terminal
    from snpatch.reproduce.run_plan import plan_downloads, plan_steps

    views = {"steps": plan_steps(pipeline, only, start_at), "downloads": plan_downloads(pipeline)}
    if as_json:
        rows = {name: [dict(zip(v.columns, row, strict=True)) for row in v.rows] for name, v in views.items()}
        commands = {name: step.command for name, step in pipeline.steps.steps.items()}
        o.echo(json.dumps({**rows, "commands": commands, "skipped": pipeline.skipped}))
        return
    with o.console() as console:
        for view in views.values():
            terminal.print_table(view, console)
        for name, reason in pipeline.skipped.items():
            terminal.print_line(f"skipped: {name}: {reason}", console)
