"""`snpatch find-minimal`: the smallest k that reaches a target effect, from as few completions as possible."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import with_options
from snpatch.cli.sweep import SweepArguments, SweepOptions


@with_options(sweep=SweepOptions())
def find_minimal(
    sweep: SweepArguments,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for table, plot, completions and scores.")],
    target_effect: Annotated[
        float, typer.Option(min=0, max=1, help="Effect to reach: 0 is the recipient's mean score, 1 the donor's.")
    ] = 0.9,
    monotone: Annotated[
        bool,
        typer.Option(
            help="Assume that the effect rises with k. --no-monotone tests every smaller k and uses more completions."
        ),
    ] = True,
    score_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Lowest and highest possible score of the judge. Default: guessed, and the answer is measured on all "
            "prompts."
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Also search blocks of N layers for a small set that reaches the target effect (greedy)."
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Find the smallest window that reaches the target effect, for each recipient and ranking.

    Takes the arguments of `snpatch sweep`; uses the first prompt set and the first judge. The folder stores the
    completions, and a sweep into the same folder reuses them.
    """
    from snpatch.experiments.common.minimal_report import build_minimal_report
    from snpatch.experiments.context import ExperimentContext
    from snpatch.sweeps.minimal import find_minimal as search
    from snpatch.sweeps.store import Store
    from snpatch.utils.files import check_writable

    spec = sweep.spec
    check_writable(out / "minimal.csv")
    with (
        ExperimentContext(
            spec, out, progress=o.progress_bar, command=o.command_line(), **sweep.context_arguments
        ) as context,
        Store(out) as store,
    ):
        provenance, judge, prompts = (
            context.start_provenance(),
            context.judge(spec.judge_names[0]),
            context.prompts(spec.set_names[0]),
        )
        rankings = context.sweep_rankings(spec)
        with context.progress("minimal") as progress:
            results = search(
                context.engine, prompts, rankings, judge, spec.sweep,
                target=target_effect, monotone=monotone, score_range=score_range, block_layers=blocks, store=store,
                progress=progress,
            )  # fmt: skip
        settings = {
            **asdict(spec.sweep),
            "target_effect": target_effect,
            "monotone": monotone,
            "score_range": score_range,
            "blocks": blocks,
        }
        report = provenance.complete(build_minimal_report(results, target_effect), settings)
    o.write_report(report, out, as_json)
