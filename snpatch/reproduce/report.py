"""report.md, report.json and reproduction.csv: every experiment's sentences, and the paper's numbers beside the measured."""

import json
from collections.abc import Sequence
from pathlib import Path

from snpatch.experiments.summary import section
from snpatch.files import write_text
from snpatch.report import files
from snpatch.report.cells import cell
from snpatch.report.report import Row
from snpatch.reproduce.pipeline import ADAPTERS, Pipeline
from snpatch.reproduce.published import beside

TABLE = "reproduction.csv"


def write(pipeline: Pipeline) -> list[Path]:
    """Write all of them into the pipeline's folder, of the experiments that are done; their paths."""
    out, preset = pipeline.out, pipeline.preset
    done = [name for name in preset.experiments if name in pipeline.steps.steps and not pipeline.steps.reason(name)]
    found = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in done}
    rows = beside(preset, pipeline.world, out, done)
    parts = [f"# {preset.title or preset.name}\n"]
    if rows:
        parts.append(_comparison(preset.name, preset.published, rows))
    parts.append(_trainings(pipeline))
    parts += [section(name, table) for name, table in found.items()]
    left = {
        **pipeline.skipped,
        **{n: "not done" for n in preset.experiments if n not in done and n not in pipeline.skipped},
    }
    if left:
        parts.append("## Left out\n\n" + "".join(f"- {name}: {why}\n" for name, why in left.items()))
    told = {name: {"headline": table["headline"], "provenance": table["provenance"]} for name, table in found.items()}
    write_text(out / "report.md", "\n".join(filter(None, parts)))
    write_text(out / "report.json", json.dumps({"experiments": told, "beside": rows}, indent=1) + "\n")
    paths = [out / "report.md", out / "report.json"]
    if rows:
        files.write_records(rows, out / TABLE)
        paths.append(out / TABLE)
    return paths


def _comparison(name: str, published: str, rows: Sequence[Row]) -> str:
    """The table for people. Rows of other models have no difference, and a sentence says so."""
    note = (
        "difference: measured - published.\n"
        if name == published
        else f"The published numbers are {published}'s: another model than this one, with its own sets and judges, so that "
        "only directions can be compared.\n"
    )
    lines = ["| | of | on | published | measured | difference | source |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        printed = f"{row['bound']} {cell(row['published'])}".strip()
        cells = [row["what"], row["model"], row["set"], printed, cell(row["measured"]), cell(row["difference"])]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['table']} |")
    return f"## Published and measured\n\n{note}\n" + "\n".join(lines) + "\n"


def _trainings(pipeline: Pipeline) -> str:
    """A line a training that is done."""
    lines = []
    for name in pipeline.pairs:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name in pipeline.steps.steps and not pipeline.steps.reason(name):
            data = json.loads(path.read_text(encoding="utf-8"))
            figures = data["provenance"]["figures"]
            lines.append(f"- {name}: {'; '.join(data['headline'])} ({figures['seconds']} s)")
        elif name not in pipeline.steps.steps:
            lines.append(f"- {name}: taken, not trained here")
    return "## Trained\n\n" + "\n".join(lines) + "\n" if lines else ""
