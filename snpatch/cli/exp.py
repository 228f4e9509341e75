"""`snpatch exp`: the paper's experiments on an experiment config."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import EngineOptions, Fields, SkipInvalid, TrustConfig, parse_values, with_options
from snpatch.errors import ReceiptError, SnpatchError, unknown_name
from snpatch.experiments import DESCRIPTIONS, NAMES


@with_options(engine_fields=EngineOptions(has_model=False))
def exp(
    names: Annotated[
        list[str],
        typer.Argument(help=f"{', '.join(NAMES)}; `all`; or `list` to describe them.", metavar="NAME..."),
    ],
    engine_fields: Fields,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Experiment config: a TOML file, or demo.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for tables, plots, rankings and completions.")
    ] = Path("snpatch-results"),
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the experiment as name=value, e.g. k=[0,200]. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts of each set.")] = None,
    skip_invalid: SkipInvalid = False,
    trust_config: TrustConfig = False,
    as_json: o.AsJson = False,
) -> None:
    """Run experiments of the paper: tables (CSV, JSON) and plots (PNG, SVG). Interrupted runs resume."""
    if names == ["list"]:
        _list_experiments(as_json)
        return
    if config is None:
        raise SnpatchError("--config: expected an experiment config, got none. Give a TOML file, or demo.")
    overrides = parse_values(setting, "--set")
    run_experiments(
        names,
        config,
        out,
        as_json,
        overrides,
        trust=trust_config,
        limit=limit,
        skip_invalid=skip_invalid,
        **engine_fields,
    )


def _list_experiments(as_json: bool) -> None:
    if as_json:
        o.echo(json.dumps(DESCRIPTIONS))
        return
    for name, description in DESCRIPTIONS.items():
        o.echo(f"{name:16s} {description}")


def run_experiments(
    names: list[str],
    config: str,
    out: Path,
    as_json: bool,
    settings: dict | None = None,
    trust: bool = False,
    **arguments: Any,
) -> None:
    """Run, write and print experiments.

    One that fails is reported at the end and does not stop the others. A ReceiptError stops all: the device did not do
    what was requested, so the tables and plots of this run are removed.

    Args:
        names: Experiments, or ["all"].
        config: Experiment config file, or "demo".
        out: Folder of the results.
        as_json: Print JSON instead of tables.
        settings: Override the config's settings of one experiment.
        trust: See load_experiment_config.
        arguments: Of ExperimentContext.

    Raises:
        ReceiptError: See above.
        SnpatchError: Invalid names, settings or config, or experiments that failed.
    """
    from snpatch import experiments
    from snpatch.experiments.common import summary
    from snpatch.experiments.config import load_experiment_config
    from snpatch.experiments.context import ExperimentContext
    from snpatch.utils.files import check_writable

    selected = list(NAMES) if names == ["all"] else names
    unknown = [name for name in selected if name not in NAMES]
    if unknown:
        raise unknown_name("experiment", unknown[0], [*NAMES, "all"])
    if settings and len(selected) > 1:
        raise SnpatchError(
            f"--set: expected one experiment, got {len(selected)}. Write the settings into the experiment config."
        )
    experiment_config = load_experiment_config(config, trust)
    for name in {**experiment_config.settings, **dict.fromkeys(selected)}:
        resolved = experiments.resolve_settings(experiment_config, name, settings if name in selected else None)
        if names == ["all"] and (missing := experiments.find_missing(experiment_config, name, resolved)):
            selected.remove(name)
            o.echo(f"snpatch: {name}: skipped: it {missing}", is_error=True)
    for name in selected:
        check_writable(out / f"{name}.csv")
    failed, paths = {}, []
    with ExperimentContext(
        experiment_config, out, progress=o.progress_bar, command=o.command_line(), **arguments
    ) as context:
        for name in selected:
            try:
                paths += o.write_report(experiments.run(name, context, settings), out, as_json)
            except ReceiptError as error:
                for path in (*paths, out / "report.md", out / "report.json"):
                    path.unlink(missing_ok=True)
                raise ReceiptError(f"{name}: {error}; the tables of this run were removed: run it again") from error
            except SnpatchError as error:
                if len(selected) == 1:
                    raise
                failed[name] = error
                o.echo(f"snpatch: {name}: {error}", is_error=True)
        for name, reason in summary.write_summary(context, dict.fromkeys(selected, settings or {})).items():
            o.echo(f"snpatch: {name}.json is left out of report.md: {reason}", is_error=True)
    if failed:
        raise SnpatchError(f"{len(failed)} of {len(selected)} experiments failed: {', '.join(failed)}; see above")
