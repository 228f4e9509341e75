"""`snpatch train sft | dpo`: train the pair of models by the paper's recipe."""

import inspect
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import Column, FieldOptions, Fields, Format, SkipInvalid, with_options
from snpatch.errors import SnpatchError
from snpatch.training.settings import DpoSettings, TrainSettings

app = typer.Typer(
    help="Train the pair: SFT on conversations, DPO on preferences. Several GPUs: accelerate launch -m snpatch.cli "
    "train ...",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="Folder or hub name of the base model.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Output folder for the adapter or checkpoint, the loss table and its plot.")
]
SaveSteps = Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints. A killed run resumes there.")]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="Integration of transformers: wandb, tensorboard, ... Repeatable.")
]
DATA_OPTIONS = "--format, --split, --column, --revision, --filter"
_DATA_PARAMETERS = {
    "data": (
        Annotated[
            str | None,
            typer.Argument(help="Training rows: file or folder (JSONL, JSON, CSV, parquet) or dataset name."),
        ],
        None,
    ),
    "form": (Format, None),
    "split": (
        Annotated[str | None, typer.Option(help="Split of a named dataset. Default: its training split.")],
        None,
    ),
    "column": (Column, None),
    "revision": (Annotated[str | None, typer.Option(help="Branch, tag or commit of a named dataset.")], None),
    "filter": (Annotated[str | None, typer.Option(help="column=value,value: only rows with one of the values.")], None),
    "limit": (Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.")], None),
    "sample": (Annotated[int | None, typer.Option(min=1, help="Use N random rows, drawn with --sample-seed.")], None),
    "sample_seed": (Annotated[int, typer.Option(min=0, help="Random seed of --sample.")], 0),
    "skip_invalid": (SkipInvalid, False),
}
_SUBSET_FIELDS = {"first": "limit", "sample": "sample", "seed": "sample_seed"}  # field of PromptSet -> option


@dataclass(frozen=True)
class TrainingDataOptions:
    """Options of the training rows; they give the fields of a PromptSet (a source only with DATA) and skip_invalid."""

    def parameters(self) -> list[inspect.Parameter]:
        """Return parameters for DATA and for the options that read, filter or sample its rows."""
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in _DATA_PARAMETERS.items()
        ]

    def build(self, values: dict) -> Fields:
        """Return PromptSet fields and skip_invalid.

        Without DATA, return only the given subset fields (first, sample, seed).

        Raises:
            SnpatchError: An option of DATA_OPTIONS was given without DATA, or --filter is not column=value,value.
        """
        fields = {name: values[name] for name in ("split", "column", "revision", "filter") if values[name] is not None}
        if values["data"] is None:
            if fields or values["form"]:
                raise SnpatchError(f"{DATA_OPTIONS}: expected DATA with these options, got none. Pass DATA")
            subset = {name: values[option] for name, option in _SUBSET_FIELDS.items() if values[option]}
            return {"skip_invalid": values["skip_invalid"], **subset}
        if "filter" in fields:
            fields["filter"] = _parse_row_filter(fields["filter"])
        names = {"source": "data", "format": "form", "skip_invalid": "skip_invalid", **_SUBSET_FIELDS}
        return {**fields, **{name: values[option] for name, option in names.items()}}


def _parse_row_filter(text: str) -> tuple[str, ...]:
    column, equals, values = text.partition("=")
    if not equals or not column:
        raise SnpatchError(f"--filter: expected column=value,value, got {text!r}")
    return (column, *values.split(","))


def _all_fields(kind: type) -> FieldOptions:
    return FieldOptions(kind, tuple(field.name for field in fields(kind)))


@app.command("sft")
@with_options(data=TrainingDataOptions(), settings=_all_fields(TrainSettings))
def sft(
    model: Model,
    data: Fields,
    out: Out,
    settings: Fields,
    save_steps: SaveSteps = 100,
    report_to: ReportTo = None,
    as_json: o.AsJson = False,
) -> None:
    """Train on conversations. DATA defaults to ShareGPT, as in the paper. Repeat the command to resume."""
    from snpatch.training.paper_data import SFT

    train_settings = TrainSettings(**settings)
    rows = _read_data(data, SFT).conversations()
    _train("train_sft", out, as_json, (model, rows, out, train_settings), save_steps=save_steps, report_to=report_to)


@app.command("dpo")
@with_options(data=TrainingDataOptions(), settings=_all_fields(DpoSettings))
def dpo(
    model: Model,
    data: Fields,
    out: Out,
    settings: Fields,
    sft: Annotated[
        Path | None, typer.Option(help="SFT adapter on MODEL. Default: MODEL itself is the SFT model.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="The paper's preference data, in place of DATA: safety, helpful, harmless-helpful, shp, reasoning, "
            "stack-exchange, reward-bench-safety."
        ),
    ] = None,
    save_steps: SaveSteps = 100,
    report_to: ReportTo = None,
    as_json: o.AsJson = False,
) -> None:
    """Train on pairs of a chosen and a rejected answer, starting from SFT.

    DATA defaults to HH harmless, as in the paper. Repeat the command to resume.
    """
    from snpatch.training import paper_data

    if objective is not None and "source" in data:
        raise SnpatchError("--objective: expected no DATA with --objective, got both. Pass one of them")
    train_settings = DpoSettings(**settings)
    rows = _read_data(data, paper_data.get_objective(objective or "safety")).pairs()
    arguments = (model, sft, rows, out, train_settings)
    _train("train_dpo", out, as_json, arguments, save_steps=save_steps, report_to=report_to)


def _read_data(data: Fields, default):
    """Read the training rows. default: the PromptSet that options change if there is no DATA."""
    from snpatch.data.prompt_set import PromptSet
    from snpatch.training.paper_data import training_split

    values = dict(data)
    skip_invalid = values.pop("skip_invalid")
    if "source" in values:
        values.setdefault("split", training_split(values["source"]))
        prompt_set = PromptSet(**values)
    else:
        if "first" in values:
            values.setdefault("sample", None)  # the default's own sample
        prompt_set = replace(default, **values)
    rows = prompt_set.read(Path(), skip_invalid)
    rows.log_row_notes(prompt_set.source)
    path = Path(prompt_set.source)
    read_set = replace(prompt_set, source=str(path.resolve())) if path.exists() else prompt_set
    return replace(rows, source={**rows.source, "prompt_set": asdict(read_set)})


def _train(function: str, out: Path, as_json: bool, arguments: tuple, **options: object) -> None:
    """Train with a progress bar and print the summary, in the main process alone."""
    try:
        from snpatch.training import record, trainer
    except ImportError as error:  # the message names the extra to install
        raise SnpatchError(str(error)) from error
    trainer.silence_libraries()
    was_done = record.is_done(out)
    options["report_to"] = options["report_to"] or ()
    with o.progress_bar(out.name) as update:

        def on_step(step: int, total_steps: int, logs) -> None:
            update(step, total_steps, f"loss {float(logs['loss']):.4f}")

        figures = getattr(trainer, function)(*arguments, on_step=on_step, **options)
    if not trainer.is_main_process():
        return
    if as_json:
        o.echo(json.dumps({"out": str(out), **figures}))
        return
    for line in record.read_headline(out):
        o.echo(line)
    wrote = "wrote the adapter or checkpoint, and training.csv, .json, .png, .svg"
    o.echo(f"{out}: {'training was already done' if was_done else wrote}")
