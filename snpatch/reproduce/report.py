"""report.md, report.json, reproduction.csv: each experiment's sentences, the paper's numbers beside the measured."""

import json
from collections.abc import Sequence
from pathlib import Path

from snpatch.experiments.common.summary import section
from snpatch.report import files
from snpatch.report.formatting import escape_markdown, format_value
from snpatch.report.report import Row
from snpatch.reproduce.comparison import beside, differs
from snpatch.reproduce.pipeline import ADAPTERS, Pipeline
from snpatch.utils.files import write_text

TABLE = "reproduction.csv"


def done_in(pipeline: Pipeline) -> list[str]:
    """The experiments whose tables are there and current."""
    steps = pipeline.steps
    return [name for name in pipeline.preset.experiments if name in steps.steps and steps.reason(name) is None]


def write(pipeline: Pipeline) -> list[Path]:
    """Write all of them into the pipeline's folder, of the experiments that are done; their paths."""
    out, preset, done = pipeline.out, pipeline.preset, done_in(pipeline)
    found = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in done}
    rows = beside(pipeline, done)
    title = escape_markdown(preset.title or preset.name)
    parts = [f"# {title}\n", _comparison(differs(pipeline), rows), _trainings(pipeline)]
    parts += [section(name, table) for name, table in found.items()]
    open_ones = {name: "not done" for name in preset.experiments if name not in done}
    if left := {**open_ones, **pipeline.skipped}:
        reasons = (f"- {escape_markdown(name)}: {escape_markdown(why)}\n" for name, why in left.items())
        parts.append("## Left out\n\n" + "".join(reasons))
    told = {name: {"headline": table["headline"], "provenance": table["provenance"]} for name, table in found.items()}
    write_text(out / "report.md", "\n".join(filter(None, parts)))
    write_text(out / "report.json", json.dumps({"experiments": told, "beside": rows}, indent=1) + "\n")
    files.write_records(rows, out / TABLE)
    return [out / "report.md", out / "report.json", out / TABLE]


def _comparison(other: Sequence[str], rows: Sequence[Row]) -> str:
    """The table for people."""
    note = (
        f"The published numbers are of another run than this one, which differs in {', '.join(other)}: only directions "
        "can be compared.\n"
        if other
        else "difference: measured - published, where both are of this model.\n"
    )
    head = ("", "of", "on", "measured", "published", "difference", "published of", "source")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        printed = f"{row['bound']} {format_value(row['published'])}".strip()
        measured, difference = format_value(row["measured"]), format_value(row["difference"])
        cells = [row["what"], row["model"], row["set"], measured, printed, difference]
        lines.append(f"| {' | '.join(map(escape_markdown, [*cells, row['published_of'], row['table']]))} |")
    return f"## Measured and published\n\n{note}\n" + "\n".join(lines) + "\n"


def _trainings(pipeline: Pipeline) -> str:
    """A line a training that is done."""
    lines = []
    for name in pipeline.pairs:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name not in pipeline.steps.steps:
            lines.append(f"- {escape_markdown(name)}: taken, not trained here")
        elif pipeline.steps.reason(name) is None:
            data = json.loads(path.read_text(encoding="utf-8"))
            seconds = data["provenance"]["figures"]["seconds"]
            lines.append(f"- {escape_markdown(name)}: {escape_markdown('; '.join(data['headline']))} ({seconds} s)")
    return "## Trained\n\n" + "\n".join(lines) + "\n" if lines else ""
