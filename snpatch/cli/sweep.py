"""`snpatch sweep`: every window into every recipient, judged."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.generated import Data, Engine, Fields, Prompts, Some, generated
from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.runs.config import SweepConfig
from snpatch.sampling import GREEDY, Sampling


@generated(
    config=Engine(),
    prompts=Data(),
    swept=Some(SweepConfig, ("controls", "control_kind", "where")),
    sampling=Some(GREEDY, ("max_tokens",)),
)
def sweep(
    config: EngineConfig,
    prompts: Prompts,
    ranking: Annotated[list[str], typer.Option(help="Ranking file, or name=file. May be repeated.")],
    donor: Annotated[str, typer.Option(help="The model whose activations are copied.")],
    judge: o.Judges,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, plot and completions.")],
    recipient: Annotated[list[str], typer.Option(help="A model to patch. May be repeated.")],
    window: Annotated[str, typer.Option("--windows", "-k", help="Comma-separated k or LO:HI.")],
    swept: Fields,
    sampling: Fields,
    overlapping_controls: Annotated[
        bool, typer.Option("--overlapping-controls", help="Controls may hold the ranking's own neurons.")
    ] = False,
    judge_format: o.JudgeFormat = None,
    as_json: o.AsJson = False,
) -> None:
    """Patch every window into every recipient, judge the texts, and draw cost against k. Continues if killed."""
    from snpatch.experiments.sweeps import report_of
    from snpatch.files import check_writable
    from snpatch.patching import spec
    from snpatch.ranking.ranking import Ranking
    from snpatch.runs.sweep import sweep as run_sweep
    from snpatch.worlds.provenance import Provenance

    wanted = Sampling(**sampling)
    used = Provenance(model=config.model, max_tokens=wanted.max_tokens)
    used.set(prompts.name, prompts.data)
    named = [entry.rpartition("=")[::2] for entry in ranking]
    names = [name or Path(path).stem for name, path in named]
    if len(set(names)) < len(names):
        raise SnpatchError(f"two rankings have one name ({', '.join(names)}): give them as name=file")
    rankings = {name: Ranking.load(path) for name, (_, path) in zip(names, named, strict=True)}
    plan = SweepConfig(
        tuple(recipient),
        donor,
        tuple(map(spec.window_of, window.split(","))),
        disjoint=not overlapping_controls,
        sampling=wanted,
        **swept | {"where": spec.where_of(swept["where"])},
    )
    check_writable(out / "sweep.csv")
    with (
        o.open_judges(judge, judge_format, config) as judges,
        o.open_engine(config) as engine,
        o.progress_bar("sweep") as progress,
    ):
        result = run_sweep(engine, prompts.data.prompts, rankings, judges, plan, store=out, progress=progress)
        for name in (*plan.recipients, plan.donor):
            used.model(engine, name, engine.config.origin(name))
        for name, source in zip(judges, judge, strict=True):
            used.judge(name, {"source": source.rpartition("=")[2], "format": judge_format})
        for name, one in rankings.items():
            used.ranking(name, one)
    o.show(replace(report_of(result, "sweep"), provenance=used.told(asdict(plan))), out, as_json)
