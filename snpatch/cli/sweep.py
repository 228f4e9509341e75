"""`snpatch sweep`: every window into every recipient, judged; how far it is; its texts as a table.

Why one command takes a file or flags: flags are written as a file beside the results, so that any sweep can be run
again, continued or split among workers by its file.
"""

import inspect
import json
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from snpatch.cli import options as o
from snpatch.cli.generated import Engine, Fields, Some, Source, generated, is_given
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError, one_line
from snpatch.sampling import GREEDY, Sampling
from snpatch.sweeps.config import SweepConfig

if TYPE_CHECKING:
    from snpatch.sweeps.sweep_file import SweepSpec

INCOMPLETE = 1  # exit code of a sweep of which something failed
SWEPT = Some(SweepConfig, ("controls", "control_kind", "positions", "samples"))
SAMPLING = Some(GREEDY, ("max_tokens", "temperature", "seed"))
NEEDED = ("ranking", "donor", "recipient", "windows", "judge")  # of a sweep by flags


class SweepGroup(TyperGroup):
    """What follows `snpatch sweep` and is no command of it is `run`'s."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=SweepGroup,
    no_args_is_help=True,
    help="Patch every window into every recipient, judge the texts, and draw cost against k: `snpatch sweep SPEC`, or "
    "`snpatch sweep MODEL PROMPTS` with the options of `snpatch sweep run`.",
)


@dataclass(frozen=True)
class Planned:
    """A sweep: a file alone, or a model on prompts with options, as a SweepSpec and arguments of ExperimentContext."""

    def parameters(self) -> list[inspect.Parameter]:
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in _PLAN.items()
        ]
        parts = (Engine(), Source(), SWEPT, SAMPLING)
        return [*own, *(parameter for part in parts for parameter in part.parameters())]

    def made(self, values: dict) -> "Plan":
        from snpatch.sweeps.sweep_file import SweepSpec

        if values["prompts"] is None:
            self._check_none_given(values)
            spec = SweepSpec.load(values["model"], values["trust_config"])
            return Plan(spec, {"backend": spec.engine.backend, **Engine(has_model=False).made(values)})
        if missing := [f"--{name}" for name in NEEDED if not values[name]]:
            raise SnpatchError(f"a sweep without a file needs {', '.join(missing)}")
        config, prompts = Engine().made(values), Source().made(values)
        config.checked_backend()
        arguments = {"backend": config.backend, "skip_bad": prompts.pop("skip_bad")}
        plan = SWEPT.made(values) | {"disjoint": not values["overlapping_controls"]}
        table = _table(config, prompts, values, plan, Sampling(**SAMPLING.made(values)))
        return Plan(SweepSpec.of(table, Path()), arguments)

    def _check_none_given(self, values: dict) -> None:
        """A file says what is swept: options that say it, too, are an error."""
        engine = {parameter.name for parameter in Engine(has_model=False).parameters()} | {"model", "trust_config"}
        for parameter in self.parameters():
            if parameter.name not in engine and is_given(values, parameter.name):
                name = parameter.name.replace("_", "-")
                raise SnpatchError(f"--{name}: without PROMPTS, {values['model']} is a sweep's file, which says it")
        for name in ("adapter", "checkpoint", "lora"):
            if values[name]:
                raise SnpatchError(f"--{name}: without PROMPTS, {values['model']} is a sweep's file, which says it")


@dataclass(frozen=True)
class Plan:
    """A sweep's file, and arguments of the ExperimentContext that runs it."""

    spec: "SweepSpec"
    context: dict


_PLAN = {
    "ranking": (
        Annotated[list[str] | None, typer.Option(help="Ranking file, or name=file. May be repeated.")],
        None,
    ),
    "donor": (
        Annotated[list[str] | None, typer.Option(help="A model whose activations are copied. May be repeated.")],
        None,
    ),
    "judge": (o.OptionalJudges, None),
    "recipient": (Annotated[list[str] | None, typer.Option(help="A model to patch. May be repeated.")], None),
    "windows": (Annotated[str | None, typer.Option("--windows", "-k", help="Comma-separated k or LO:HI.")], None),
    "strengths": (Annotated[str, typer.Option(help="Comma-separated strengths of the patch.")], "1"),
    "overlapping_controls": (
        Annotated[bool, typer.Option("--overlapping-controls", help="Controls may hold the ranking's own neurons.")],
        False,
    ),
    "judge_format": (o.JudgeFormat, None),
}


@app.command()
@generated(plan=Planned())
def run(
    plan: Plan,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, plot, texts and scores.")],
    worker: Annotated[
        str | None,
        typer.Option(
            help="i/n: write only the i-th of n parts, to a file of its own; the sweep without it joins them."
        ),
    ] = None,
    ray: Annotated[int | None, typer.Option(min=1, help="So many replicas, as actors of Ray.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each replica, with --ray.")] = 0,
    restarts: Annotated[int, typer.Option(min=0, help="How often an engine that dies is started anew.")] = 5,
    as_json: o.AsJson = False,
) -> None:
    """Run a sweep's file (SPEC), or a MODEL on PROMPTS with these options. The same command again continues.

    Exit code 1: something failed, and is told; all else is there.
    """
    from snpatch.experiments.common.sweep_report import build_sweep_report
    from snpatch.experiments.context import ExperimentContext
    from snpatch.sweeps.store import NAME, Store, part_name, parts_in
    from snpatch.sweeps.sweep_file import FILE
    from snpatch.utils.files import check_writable

    spec, given = plan.spec, plan.context
    check_writable(out / "sweep.csv")
    spec.save(out / FILE)
    command, outcome = o.command(), "interrupted"
    part = None if worker is None else _part(worker)
    with (
        ExperimentContext(spec, out, progress=o.progress_bar, command=command, **given) as context,
        Store(out, name=NAME if part is None else part_name(*part)) as store,
    ):
        if part is not None:
            o.tell(f"wrote {context.write_part(spec, store, *part, restarts=restarts)} texts to {store.path}")
            return
        for path in parts_in(out):
            o.tell(f"snpatch: took in {store.take_in(path)} texts of {path.name}", is_error=True)
        used, number = context.begin(), store.begin(command)
        try:
            if ray is None:
                result = context.run(spec, restarts=restarts, store=store)
            else:
                result = _replicas().run(context, spec, store, replicas=ray, gpus=gpus, restarts=restarts, **given)
            outcome = "done" if not result.failures else f"{len(result.failures)} failed"
        except SnpatchError as error:
            outcome = str(error)
            raise
        finally:
            store.end(number, outcome)
        report = replace(build_sweep_report(result, "sweep"), provenance=used.told(asdict(spec.plan)))
    o.show(report, out, as_json)
    if result.failures:
        raise typer.Exit(INCOMPLETE)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    as_json: o.AsJson = False,
) -> None:
    """How far a sweep is: texts done, open and failed, the rate, and the time left."""
    from snpatch.report.formatting import format_value
    from snpatch.sweeps.store import Store

    with Store(folder, must_exist=True) as store:
        found = store.status()
    if as_json:
        o.tell(json.dumps(asdict(found)))
        return
    o.tell(f"{found.done} texts done, {found.open} open ({found.taken} being written), {found.failed} failed")
    if found.rate is not None and found.open:
        left = timedelta(seconds=round(found.left_s))
        o.tell(f"{format_value(found.rate)} texts a second: {left} left")
    o.tell(f"{found.scores} scores")
    for failure in found.failures:
        details = ", ".join(f"{name} {value!r}" for name, value in failure.items() if name != "error")
        o.tell(one_line(f"failed: {details}: {failure['error']}"))
    for one in found.runs[-1:]:
        o.tell(f"last run: {one['command']}: {one['outcome'] or 'under way, or killed'}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    out: Annotated[Path, typer.Argument(help="File: .csv, .jsonl or .parquet.")],
) -> None:
    """Write a row for each text of a sweep: labels, state (done, open or failed), completion and scores."""
    from snpatch.report.files import write_records
    from snpatch.sweeps.store import Store, describe_unfinished

    with Store(folder, must_exist=True) as store:
        records = [
            {**{n: v for n, v in r.items() if n != "scores"}, **{f"score {n}": v for n, v in r["scores"].items()}}
            for r in store.records()
        ]
    if not records:
        raise SnpatchError(f"{folder} holds no sweep's texts")
    write_records(records, out)
    o.tell(describe_unfinished(records) or f"All {len(records)} texts are written.")
    o.tell(f"wrote {len(records)} rows to {out}")


def _replicas():
    """The room that needs Ray."""
    try:
        from snpatch.experiments import replicas
    except ImportError as error:
        raise SnpatchError(f"--ray: {error}") from error
    return replicas


def _table(config: EngineConfig, prompts: Fields, values: dict, plan: Fields, sampling: Sampling) -> dict:
    """The file that options stand for, as data."""
    from snpatch.judges.factory import is_model_judge
    from snpatch.patching import spec
    from snpatch.sweeps.sweep_file import engine_table

    rankings = o.named(values["ranking"], "ranking", o.stem)
    judges = o.named(values["judge"], "judge", lambda _: "cost")
    form = values["judge_format"]
    if form is not None and not any(map(is_model_judge, judges.values())):
        raise SnpatchError("--judge-format is for a model, and no judge is one")
    arguments = {"format": form} if form else {}
    if config.device != EngineConfig.device:
        arguments["device"] = config.device
    return {
        **engine_table(config),
        "sets": {"prompts": {name: value for name, value in prompts.items() if value is not None}},
        "judges": {name: {"source": one, **(arguments if is_model_judge(one) else {})} for name, one in judges.items()},
        "rankings": rankings,
        "sampling": {name: value for name, value in asdict(sampling).items() if value is not None},
        "sweep": {
            **plan,
            "positions": spec.parse_positions(str(plan["positions"])),
            "strengths": [spec.parse_number(one, float, "--strengths") for one in values["strengths"].split(",")],
            "recipients": values["recipient"],
            "donors": values["donor"],
            "windows": values["windows"].split(","),
        },
    }


def _part(worker: str) -> tuple[int, int]:
    """i and n of "i/n"."""
    number, slash, of = worker.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise SnpatchError(f"--worker wants i/n with i in 1..n, got {worker!r}")
    return int(number), int(of)
