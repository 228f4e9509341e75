"""`snpatch exp`: the paper's experiments on an experiment config."""

from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import EngineOptions, Fields, SkipInvalid, TrustConfig, parse_values, with_options
from snpatch.errors import ReceiptError, SnpatchError


@with_options(engine_fields=EngineOptions(has_model=False))
def exp(
    names: Annotated[
        list[str],
        typer.Argument(
            help="curve, sliding_window, transfer, stability, objectives, alignment_tax, perplexity, distribution, "
            "neuron_tokens, positions, guard, safeguard; or all.",
            metavar="NAME...",
        ),
    ],
    engine_fields: Fields,
    config: Annotated[str, typer.Option("--config", "-c", help="Experiment config: a TOML file, or demo.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables, plots, rankings and texts.")] = Path(
        "snpatch-results"
    ),
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value of the experiment's settings, as k=[0,200]. May be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts of each set.")] = None,
    skip_invalid: SkipInvalid = False,
    trust_config: TrustConfig = False,
    as_json: o.AsJson = False,
) -> None:
    """Run experiments of the paper: tables (CSV, JSON), plots (PNG, SVG). Continues if killed."""
    given = parse_values(setting, "--set")
    run_experiments(
        names, config, out, as_json, given, trust=trust_config, limit=limit, skip_invalid=skip_invalid, **engine_fields
    )


def run_experiments(
    names: list[str],
    config: str,
    out: Path,
    as_json: bool,
    settings: dict | None = None,
    trust: bool = False,
    **arguments: object,
) -> None:
    """Run, write and print each; one that cannot be run is told at the end and stops none of the others.

    But for a ReceiptError: the device did what it was not asked, so that nothing of this run may be used; what it has
    written of tables and plots is removed. trust: see load_experiment_config; arguments: the ExperimentContext's.
    """
    from snpatch import experiments
    from snpatch.experiments.common import summary
    from snpatch.experiments.config import load_experiment_config
    from snpatch.experiments.context import ExperimentContext
    from snpatch.utils.files import check_writable

    chosen = list(experiments.NAMES) if names == ["all"] else names
    unknown = [name for name in chosen if name not in experiments.NAMES]
    if unknown:
        raise SnpatchError(f"no experiment named {unknown[0]!r}: there are {', '.join(experiments.NAMES)}, or all")
    if settings and len(chosen) > 1:
        raise SnpatchError("--set is for one experiment; for several, write the settings into the config's file")
    place = load_experiment_config(config, trust)
    for name in {**place.settings, **dict.fromkeys(chosen)}:
        experiments.resolve_settings(place, name, settings if name in chosen else None)
    for name in chosen:
        check_writable(out / f"{name}.csv")
    failed, written = {}, []
    with ExperimentContext(place, out, progress=o.progress_bar, command=o.command_line(), **arguments) as context:
        for name in chosen:
            try:
                written += o.write_report(experiments.run(name, context, settings), out, as_json)
            except ReceiptError as error:
                for path in (*written, out / "report.md", out / "report.json"):
                    path.unlink(missing_ok=True)
                raise ReceiptError(f"{name}: {error}; the tables of this run were removed: run it again") from error
            except SnpatchError as error:
                if len(chosen) == 1:
                    raise
                failed[name] = error
                o.echo(f"snpatch: {name}: {error}", is_error=True)
        for name, why in summary.write(context, dict.fromkeys(chosen, settings or {})).items():
            o.echo(f"snpatch: {name}.json is left out of report.md: {why}", is_error=True)
    if failed:
        raise SnpatchError(f"{len(failed)} of {len(chosen)} experiments failed: {', '.join(failed)}; see above")
