"""`snpatch sweep`: run a sweep from a file or from options, show its progress, export its completions.

Why options are written as a sweep file into the output folder: any sweep can be rerun, resumed or split into shards by
its file.
"""

import inspect
import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import (
    DatasetSourceOptions,
    EngineOptions,
    FieldOptions,
    Fields,
    is_given,
    with_options,
)
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError, one_line
from snpatch.sampling import GREEDY, Sampling
from snpatch.sweeps.config import SweepConfig

if TYPE_CHECKING:
    from snpatch.sweeps.sweep_file import SweepSpec

EXIT_INCOMPLETE = 1  # exit code if some completions or scores failed
SWEEP_FIELDS = FieldOptions(
    SweepConfig, ("controls", "control_kind", "extra_controls", "coherence", "positions", "samples")
)
SAMPLING_FIELDS = FieldOptions(GREEDY, ("max_tokens", "temperature", "seed"))
REQUIRED_OPTIONS = ("ranking", "donor", "recipient", "windows", "judge")  # without a sweep file


class SweepGroup(TyperGroup):
    """Command group that passes arguments to `run` unless they name another of its commands."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Parse arguments; `run` is the default command.

        `run` is put before arguments that begin with neither a command nor a help option.
        """
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=SweepGroup,
    no_args_is_help=True,
    help="Patch every window into every recipient, judge the completions, and plot the cost against k.\n\n"
    "`snpatch sweep SPEC` runs a sweep file; `snpatch sweep MODEL PROMPTS` takes the options of `snpatch sweep run`.",
)


@dataclass(frozen=True)
class SweepArguments:
    """A sweep's file, and arguments of the ExperimentContext that runs it."""

    spec: "SweepSpec"
    context_arguments: dict


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep: either its file alone, or a model, prompts and the sweep's settings."""

    def parameters(self) -> list[inspect.Parameter]:
        """Return the sweep's own parameters, then those of its engine, prompts, grid and sampling."""
        sweep = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in _OPTIONS.items()
        ]
        groups = (EngineOptions(), DatasetSourceOptions(), SWEEP_FIELDS, SAMPLING_FIELDS)
        return [*sweep, *(parameter for group in groups for parameter in group.parameters())]

    def build(self, values: dict) -> SweepArguments:
        """Load the sweep's file if there are no PROMPTS; otherwise build the sweep from the options.

        Raises:
            SnpatchError: A required option is missing, an option repeats a setting of the file, or a value is invalid.
        """
        from snpatch.sweeps.sweep_file import SweepSpec

        if values["prompts"] is None:
            self._check_not_in_file(values)
            spec = SweepSpec.load(values["model"], values["trust_config"])
            return SweepArguments(
                spec, {"backend": spec.engine.backend, **EngineOptions(has_model=False).build(values)}
            )
        if missing := [f"--{name}" for name in REQUIRED_OPTIONS if not values[name]]:
            raise SnpatchError(f"sweep: expected a sweep file or {', '.join(missing)}, got neither.")
        config, prompts = EngineOptions().build(values), DatasetSourceOptions().build(values)
        assert prompts is not None
        config.checked_backend()
        arguments = {"backend": config.backend, "skip_invalid": prompts.pop("skip_invalid")}
        fields = SWEEP_FIELDS.build(values) | {"disjoint": not values["overlapping_controls"]}
        table = _build_table(config, prompts, values, fields, Sampling(**SAMPLING_FIELDS.build(values)))
        return SweepArguments(SweepSpec.from_dict(table, Path()), arguments)

    def _check_not_in_file(self, values: dict) -> None:
        """Raise for an option that the sweep's file sets."""
        allowed = {parameter.name for parameter in EngineOptions(has_model=False).parameters()} | {
            "model",
            "trust_config",
        }
        names = [p.name for p in self.parameters() if p.name not in allowed and is_given(values, p.name)]
        names += [name for name in ("adapter", "checkpoint", "lora") if values[name]]
        if names:
            option = names[0].replace("_", "-")
            raise SnpatchError(
                f"--{option}: expected no --{option} with a sweep file ({values['model']}, without PROMPTS). Set it in "
                "the file."
            )


_OPTIONS = {
    "ranking": (
        Annotated[list[str] | None, typer.Option(help="Ranking file, or name=file. Repeatable.")],
        None,
    ),
    "donor": (
        Annotated[list[str] | None, typer.Option(help="Donor: the model whose activations are copied. Repeatable.")],
        None,
    ),
    "judge": (o.OptionalJudges, None),
    "recipient": (Annotated[list[str] | None, typer.Option(help="Recipient: the model to patch. Repeatable.")], None),
    "windows": (
        Annotated[
            str | None,
            typer.Option(
                "--windows",
                "-k",
                help="Comma-separated windows: k for the top k, or ranks LO:HI; for example 0,200,1000.",
            ),
        ],
        None,
    ),
    "strengths": (Annotated[str, typer.Option(help="Comma-separated patch strengths.")], "1"),
    "overlapping_controls": (
        Annotated[
            bool, typer.Option("--overlapping-controls", help="Let random controls contain neurons of the window.")
        ],
        False,
    ),
    "judge_format": (o.JudgeFormat, None),
}


@app.command()
@with_options(sweep=SweepOptions())
def run(
    sweep: SweepArguments,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for table, plot, completions and scores.")],
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: generate only shard i of n, into a separate file. Run without --shard to merge all shards."
        ),
    ] = None,
    ray: Annotated[int | None, typer.Option(min=1, help="Number of replicas of the engine, as Ray actors.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per replica, with --ray.")] = 0,
    max_restarts: Annotated[int, typer.Option(min=0, help="Maximum number of restarts after engine crashes.")] = 5,
    as_json: o.AsJson = False,
) -> None:
    """Run a sweep file (SPEC), or MODEL on PROMPTS with these options. Repeat the command to resume.

    Exit code 1 if completions or scores failed; they are listed, and everything else is written.
    """
    from snpatch.experiments.common.sweep_report import build_sweep_report
    from snpatch.experiments.context import ExperimentContext
    from snpatch.sweeps.store import STORE_FILE, Store, find_shards, parse_shard, shard_name
    from snpatch.sweeps.sweep_file import SPEC_FILE
    from snpatch.utils.files import check_writable

    spec = sweep.spec
    check_writable(out / "sweep.csv")
    spec.save(out / SPEC_FILE)
    command, outcome = o.command_line(), "interrupted"
    shard_numbers = None if shard is None else parse_shard(shard)
    with (
        ExperimentContext(spec, out, progress=o.progress_bar, command=command, **sweep.context_arguments) as context,
        Store(out, name=STORE_FILE if shard_numbers is None else shard_name(*shard_numbers)) as store,
    ):
        if shard_numbers is not None:
            n = context.write_shard(spec, store, *shard_numbers, max_restarts=max_restarts)
            o.echo(f"wrote {n} completions to {store.path}")
            return
        for path in find_shards(out):
            o.echo(f"snpatch: merged {store.merge(path)} completions of {path.name}", is_error=True)
        provenance, run_id = context.start_provenance(), store.start_run(command)
        try:
            if ray is None:
                result = context.run_sweep(spec, store, max_restarts)
            else:
                result = _import_replicas().run(
                    context, spec, store, replicas=ray, gpus=gpus, max_restarts=max_restarts, **sweep.context_arguments
                )
            outcome = "done" if not result.failures else f"{len(result.failures)} failed"
        except SnpatchError as error:
            outcome = str(error)
            raise
        finally:
            store.finish_run(run_id, outcome)
        report = provenance.complete(build_sweep_report(result, "sweep"), asdict(spec.sweep))
    o.write_report(report, out, as_json)
    if result.failures:
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    as_json: o.AsJson = False,
) -> None:
    """Show the progress of a sweep: completions done, open and failed, the rate, and the time left."""
    from snpatch.report.formatting import format_value
    from snpatch.sweeps.store import Store

    with Store(folder, must_exist=True) as store:
        status = store.status()
    if as_json:
        o.echo(json.dumps(asdict(status)))
        return
    o.echo(f"{status.done} completions done, {status.open} open ({status.claimed} running), {status.failed} failed")
    if status.rate is not None and status.left_s is not None and status.open:
        left = timedelta(seconds=round(status.left_s))
        o.echo(f"{format_value(status.rate)} completions/s: {left} left")
    o.echo(f"{status.scores} scores")
    for failure in status.failures:
        labels = ", ".join(f"{name} {value!r}" for name, value in failure.items() if name != "error")
        o.echo(one_line(f"failed: {labels}: {failure['error']}"))
    for last in status.runs[-1:]:
        o.echo(f"last run: {last['command']}: {last['outcome'] or 'running, or killed'}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    out: Annotated[Path, typer.Argument(help="File: .csv, .jsonl or .parquet.")],
) -> None:
    """Write one row per completion of a sweep: labels, state, completion and scores.

    State: done, open or failed.
    """
    from snpatch.report.files import write_records
    from snpatch.sweeps.store import Store, describe_unfinished

    with Store(folder, must_exist=True) as store:
        records = store.records()
    rows = []
    for record in records:
        scores = {f"score {name}": score for name, score in record.pop("scores").items()}
        rows.append({**record, **scores})
    if not rows:
        raise SnpatchError(f"{folder} holds no completions of a sweep")
    write_records(rows, out)
    o.echo(describe_unfinished(rows) or f"All {len(rows)} completions are written.")
    o.echo(f"wrote {len(rows)} rows to {out}")


def _import_replicas():
    """Import the module that needs Ray."""
    try:
        from snpatch.experiments import replicas
    except ImportError as error:
        raise SnpatchError(f"--ray: {error}") from error
    return replicas


def _build_table(config: EngineConfig, prompts: Fields, values: dict, fields: Fields, sampling: Sampling) -> dict:
    """Return the sweep file that the options stand for, as data."""
    from snpatch.judges.factory import is_model_judge
    from snpatch.patching import spec
    from snpatch.sweeps.sweep_file import engine_table

    rankings = o.parse_sources(values["ranking"], "ranking", o.file_stem)
    sources = o.parse_sources(values["judge"], "judge", lambda _: "cost")
    judge_format = values["judge_format"]
    o.check_judge_format(judge_format, sources)
    arguments = {"format": judge_format} if judge_format else {}
    if config.device != EngineConfig.device:
        arguments["device"] = config.device
    judges = {}
    for name, source in sources.items():
        judges[name] = {"source": source, **(arguments if is_model_judge(source) else {})}
    return {
        **engine_table(config),
        "sets": {"prompts": {name: value for name, value in prompts.items() if value is not None}},
        "judges": judges,
        "rankings": rankings,
        "sampling": {name: value for name, value in asdict(sampling).items() if value is not None},
        "sweep": {
            **fields,
            "positions": spec.parse_positions(str(fields["positions"])),
            "strengths": [spec.parse_number(text, float, "--strengths") for text in values["strengths"].split(",")],
            "recipients": values["recipient"],
            "donors": values["donor"],
            "windows": values["windows"].split(","),
        },
    }
