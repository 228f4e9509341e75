"""`snpatch train sft | dpo`: the pair of models, trained by the paper's recipe."""

import inspect
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.generated import Column, Fields, Format, SkipBad, Some, generated
from snpatch.errors import SnpatchError
from snpatch.training.settings import DpoSettings, TrainSettings

app = typer.Typer(
    help="Train the pair: SFT on conversations, DPO on preferences. Several GPUs: accelerate launch -m snpatch.cli "
    "train ...",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="Hugging Face folder or model name.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter (or checkpoint), its table and plot.")]
SaveSteps = Annotated[int, typer.Option(min=1, help="Steps between checkpoints, from which a killed run goes on.")]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="transformers' integration: wandb, tensorboard, ... May be repeated.")
]
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_OPTIONS = {
    "data": (
        Annotated[str | None, typer.Argument(help="File or folder (JSONL, JSON, CSV, parquet), or a data set's name.")],
        None,
    ),
    "form": (Format, None),
    "split": (
        Annotated[str | None, typer.Option(help="Split. Default for a named set: what it has to train on.")],
        None,
    ),
    "column": (Column, None),
    "revision": (Annotated[str | None, typer.Option(help="Of a named set: branch, tag or commit.")], None),
    "filter": (Annotated[str | None, typer.Option(help="column=value,value: only rows that have one of them.")], None),
    "limit": (Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")], None),
    "sample": (Annotated[int | None, typer.Option(min=1, help="So many rows, drawn with --sample-seed.")], None),
    "sample_seed": (Annotated[int, typer.Option(min=0, help="What --sample draws with.")], 0),
    "skip_bad": (SkipBad, False),
}

_SOME = {"first": "limit", "sample": "sample", "seed": "sample_seed"}  # of a PromptSet -> the option


@dataclass(frozen=True)
class Trained:
    """Options for the rows that are trained on. Made: a PromptSet's fields, with a source where there is DATA, and
    skip_bad."""

    def parameters(self) -> list[inspect.Parameter]:
        return [inspect.Parameter(n, _BY_NAME, default=d, annotation=hint) for n, (hint, d) in _OPTIONS.items()]

    def made(self, values: dict) -> Fields:
        given = {name: values[name] for name in ("split", "column", "revision", "filter") if values[name] is not None}
        if values["data"] is None:
            if given or values["form"]:
                raise SnpatchError("--format, --split, --column, --revision, --filter are for DATA: there is none")
            return {"skip_bad": values["skip_bad"], **{n: values[o] for n, o in _SOME.items() if values[o]}}
        if "filter" in given:
            column, equals, wanted = given["filter"].partition("=")
            if not equals or not column:
                raise SnpatchError(f"--filter wants column=value,value, got {given['filter']!r}")
            given["filter"] = (column, *wanted.split(","))
        names = {"source": "data", "format": "form", "skip_bad": "skip_bad", **_SOME}
        return {**given, **{name: values[option] for name, option in names.items()}}


def _all(kind: type) -> Some:
    return Some(kind, tuple(f.name for f in fields(kind)))


@app.command("sft")
@generated(data=Trained(), settings=_all(TrainSettings))
def sft(
    model: Model,
    data: Fields,
    out: Out,
    settings: Fields,
    save_steps: SaveSteps = 100,
    report_to: ReportTo = None,
    as_json: o.AsJson = False,
) -> None:
    """Train on conversations; DATA's default is ShareGPT, the paper's. The same command again goes on, or tells that
    all is done."""
    from snpatch.training.objectives import SFT

    chosen = TrainSettings(**settings)
    rows = _read(data, SFT).conversations()
    _train("train_sft", out, as_json, (model, rows, out, chosen), save_steps=save_steps, report_to=report_to)


@app.command("dpo")
@generated(data=Trained(), settings=_all(DpoSettings))
def dpo(
    model: Model,
    data: Fields,
    out: Out,
    settings: Fields,
    sft: Annotated[Path | None, typer.Option(help="The SFT model's adapter on MODEL. Default: MODEL is SFT.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Pairs in place of DATA: safety, helpful, shp, reasoning, stack-exchange, reward-bench-safety."
        ),
    ] = None,
    save_steps: SaveSteps = 100,
    report_to: ReportTo = None,
    as_json: o.AsJson = False,
) -> None:
    """Train on pairs of a chosen and a rejected answer, from SFT. Without DATA for safety: HH harmless, the paper's."""
    from snpatch.training import objectives

    if objective is not None and "source" in data:
        raise SnpatchError("give DATA or --objective, not both")
    chosen = DpoSettings(**settings)
    rows = _read(data, objectives.objective(objective or "safety")).pairs()
    _train("train_dpo", out, as_json, (model, sft, rows, out, chosen), save_steps=save_steps, report_to=report_to)


def _read(data: Fields, default):
    """The rows that were asked for. default: a PromptSet."""
    from snpatch.training.objectives import training_split
    from snpatch.worlds.config import PromptSet

    given = dict(data)
    skip_bad = given.pop("skip_bad")
    if "source" in given:
        given.setdefault("split", training_split(given["source"]))
        chosen = PromptSet(**given)
    else:
        if "first" in given:
            given.setdefault("sample", None)  # the default's own
        chosen = replace(default, **given)
    rows = chosen.read(Path(), skip_bad)
    rows.print_row_notes(chosen.source)
    return rows


def _train(kind: str, out: Path, as_json: bool, arguments: tuple, **how: object) -> None:
    """Train with a bar, and tell what came of it, in the main process alone."""
    try:
        from snpatch.training import trainer
    except ImportError as error:  # it names the extra to install
        raise SnpatchError(str(error)) from error
    trainer.quiet()
    was_done = trainer.is_done(out)
    how["report_to"] = how["report_to"] or ()
    with o.progress_bar(out.name) as tell:

        def watch(step: int, steps: int, logs) -> None:
            tell(step, steps, f"loss {float(logs['loss']):.4f}")

        figures = getattr(trainer, kind)(*arguments, watch=watch, **how)
    if not trainer.is_main():
        return
    if as_json:
        o.tell(json.dumps({"out": str(out), **figures}))
        return
    for line in trainer.told(out):
        o.tell(line)
    what = "was done before" if was_done else "wrote the adapter or checkpoint, and training.csv, .json, .png, .svg"
    o.tell(f"{out}: {what}")
