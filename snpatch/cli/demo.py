"""`snpatch demo`: the main experiment on the demo model; or rebuild it."""

from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli import report
from snpatch.cli.dataclass_options import FieldOptions, Fields, with_options
from snpatch.cli.exp import run_experiments
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError

app = typer.Typer(help="The demo model: find its safety neurons and sweep k; or rebuild it.")


@app.callback(invoke_without_command=True)
@with_options(engine=FieldOptions(EngineConfig, ("backend",)))
def demo(
    context: typer.Context,
    engine: Fields,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table and the plot.")] = Path("snpatch-demo"),
    as_json: o.AsJson = False,
) -> None:
    """Contrast SFT with DPO, rank, sweep k for SFT and Base, judge; table and plot."""
    if context.invoked_subcommand:
        return
    run_experiments(["curve"], "demo", out, as_json, **engine)
    path = report.write_folder_page(out, out / report.FILE)
    if not as_json:
        o.echo(f"open {path} in a browser: the curve, and every text")


@app.command("build")
def build(
    out: Annotated[Path, typer.Argument(help="Folder for the demo model: new, empty, or a demo model to complete.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make the demo model from nothing: base, SFT, DPO objectives, a second seed, score models. Takes minutes."""
    try:
        from snpatch.demo.build import build as build_demo_model
    except ImportError as error:  # it names the extra to install
        raise SnpatchError(str(error)) from error
    build_demo_model(out, seed)
