"""`snpatch minimal`: the smallest k that recovers a share of the gain, from as few completions as possible."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.generated import generated
from snpatch.cli.sweep import Plan, Planned


@generated(plan=Planned())
def minimal(
    plan: Plan,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, plot, texts and scores.")],
    recover: Annotated[float, typer.Option(min=0, max=1, help="The share of the gain.")] = 0.9,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Also find which blocks of so many layers suffice, greedily.")
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Find the smallest of the windows that recovers the share, for each recipient and ranking of the first set.

    As `snpatch sweep`: a sweep's file, or a model on prompts with these options; the first judge decides. Texts are
    kept in the folder, and a sweep into it finds them.
    """
    from snpatch.experiments.common.minimal_report import build_minimal_report
    from snpatch.experiments.context import ExperimentContext
    from snpatch.sweeps.minimal import minimal as search
    from snpatch.sweeps.store import Store
    from snpatch.utils.files import check_writable

    spec = plan.spec
    check_writable(out / "minimal.csv")
    with (
        ExperimentContext(spec, out, progress=o.progress_bar, command=o.command(), **plan.context) as context,
        Store(out) as store,
    ):
        used, judge, prompts = context.begin(), context.judge(spec.judged[0]), context.prompts(spec.swept[0])
        rankings = context.rankings(spec)
        with context.progress("minimal") as progress:
            found = search(
                context.engine, prompts, rankings, judge, spec.plan,
                share=recover, layers=blocks, store=store, progress=progress,
            )  # fmt: skip
        told = used.told({**asdict(spec.plan), "recover": recover, "blocks": blocks})
    o.show(replace(build_minimal_report(found, recover), provenance=told), out, as_json)
