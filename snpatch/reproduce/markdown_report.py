"""The report of a reproduction: report.md, report.json and reproduction.csv.

report.md has each experiment's summary and the paper's numbers next to the measured ones.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from snpatch.experiments.common.summary import format_section
from snpatch.report import files
from snpatch.report.formatting import escape_markdown, format_value
from snpatch.report.report import Row
from snpatch.reproduce.paper_comparison import compare_with_paper, list_differences
from snpatch.reproduce.pipeline import ADAPTERS, Pipeline
from snpatch.utils.files import write_text

COMPARISON_FILE = "reproduction.csv"


def list_finished(pipeline: Pipeline) -> list[str]:
    """Return the experiments whose tables exist and are current."""
    steps = pipeline.steps
    return [name for name in pipeline.preset.experiments if name in steps.steps and steps.reason(name) is None]


def write(pipeline: Pipeline) -> list[Path]:
    """Write the report of all finished experiments into the pipeline's folder; return its paths."""
    out, preset, finished = pipeline.out, pipeline.preset, list_finished(pipeline)
    tables = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in finished}
    rows = compare_with_paper(pipeline, finished)
    title = escape_markdown(preset.title or preset.name)
    parts = [f"# {title}\n", _comparison_section(list_differences(pipeline), rows), _trainings_section(pipeline)]
    parts += [format_section(name, table) for name, table in tables.items()]
    unfinished = {name: "not done" for name in preset.experiments if name not in finished}
    if skipped := {**unfinished, **pipeline.skipped}:
        reasons = (f"- {escape_markdown(name)}: {escape_markdown(reason)}\n" for name, reason in skipped.items())
        parts.append("## Skipped\n\n" + "".join(reasons))
    summaries = {
        name: {part: table[part] for part in ("headline", "notes", "provenance") if part in table}
        for name, table in tables.items()
    }
    write_text(out / "report.md", "\n".join(filter(None, parts)))
    write_text(out / "report.json", json.dumps({"experiments": summaries, "comparison": rows}, indent=1) + "\n")
    files.write_records(rows, out / COMPARISON_FILE)
    return [out / "report.md", out / "report.json", out / COMPARISON_FILE]


def _comparison_section(differences: Sequence[str], rows: Sequence[Row]) -> str:
    note = (
        f"The published numbers are of another run: this one differs in {', '.join(differences)}. Compare directions "
        "only.\n"
        if differences
        else "difference: measured - published, if both are of this model.\n"
    )
    header = ("", "model", "data", "measured", "published", "difference", "published of", "source")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        published = f"{row['bound']} {format_value(row['published'])}".strip()
        measured, difference = format_value(row["measured"]), format_value(row["difference"])
        cells = [row["what"], row["model"], row["set"], measured, published, difference]
        lines.append(f"| {' | '.join(map(escape_markdown, [*cells, row['published_of'], row['table']]))} |")
    return f"## Measured and published\n\n{note}\n" + "\n".join(lines) + "\n"


def _trainings_section(pipeline: Pipeline) -> str:
    """Return one line per finished or provided adapter."""
    lines = []
    for name in pipeline.trainings:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name not in pipeline.steps.steps:
            lines.append(f"- {escape_markdown(name)}: provided, not trained here")
        elif pipeline.steps.reason(name) is None:
            record = json.loads(path.read_text(encoding="utf-8"))
            seconds = record["provenance"]["figures"]["seconds"]
            lines.append(f"- {escape_markdown(name)}: {escape_markdown('; '.join(record['headline']))} ({seconds} s)")
    return "## Trainings\n\n" + "\n".join(lines) + "\n" if lines else ""
