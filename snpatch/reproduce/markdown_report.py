"""The report of a reproduction: report.md, report.json and reproduction.csv.

report.md has each experiment's summary. The paper's numbers stand next to the measured ones only where model, preset
and protocol are the paper's; otherwise in a table of their own, because side by side they would be read as a result.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from snpatch import experiments
from snpatch.experiments.common.summary import format_section
from snpatch.report import files
from snpatch.report.formatting import escape_markdown, format_value
from snpatch.report.report import Row
from snpatch.reproduce.paper import COMMON_DEVIATIONS, list_deviations
from snpatch.reproduce.paper_comparison import compare_with_paper, list_differences
from snpatch.reproduce.pipeline import ADAPTERS, Pipeline
from snpatch.utils.files import write_text

COMPARISON_FILE = "reproduction.csv"


def write(pipeline: Pipeline) -> list[Path]:
    """Write the report of all finished experiments into the pipeline's folder; return its paths."""
    out, preset, finished = pipeline.out, pipeline.preset, pipeline.list_finished()
    tables = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in finished}
    abilities = [row for name in pipeline.ability_targets if name in tables for row in tables.pop(name)["rows"]]
    rows = compare_with_paper(pipeline, finished)
    title = escape_markdown(preset.title or preset.name)
    parts = [f"# {title}\n", *_comparison_sections(list_differences(pipeline), rows), _deviations_section(pipeline)]
    parts.append(_trainings_section(pipeline))
    parts += [format_section(name, table) for name, table in tables.items()]
    parts.append(_ability_section(abilities))
    names = [*preset.experiments, *pipeline.ability_targets]
    unfinished = {name: "not done" for name in names if name not in finished}
    if skipped := {**unfinished, **pipeline.skipped}:
        reasons = (f"- {escape_markdown(name)}: {escape_markdown(reason)}\n" for name, reason in skipped.items())
        parts.append("## Skipped\n\n" + "".join(reasons))
    summaries = {
        name: {part: table[part] for part in ("headline", "notes", "provenance") if part in table}
        for name, table in tables.items()
    }
    write_text(out / "report.md", "\n".join(filter(None, parts)))
    write_text(
        out / "report.json",
        json.dumps({"experiments": summaries, "ability": abilities, "comparison": rows}, indent=1) + "\n",
    )
    files.write_records(rows, out / COMPARISON_FILE)
    return [out / "report.md", out / "report.json", out / COMPARISON_FILE]


def _comparison_sections(differences: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of the comparable numbers, and one of the published numbers that have no counterpart."""
    compared = [row for row in rows if row["difference"] is not None]
    others = [row for row in rows if row["difference"] is None]
    if compared:
        header = ("", "model", "data", "measured", "published", "difference", "table")
        cells = [
            (*_labels(row), row["measured"], _describe_published(row), row["difference"], row["table"])
            for row in compared
        ]
        yield "## Measured and published\n\ndifference: measured - published.\n\n" + _format_table(header, cells)
    if others:
        reason = f"This run differs from the paper's preset in {', '.join(differences)}. " if differences else ""
        note = f"{reason}These numbers are of another model or protocol, or of what was not measured here.\n\n"
        header = ("", "model", "data", "published", "published of", "table")
        cells = [(*_labels(row), _describe_published(row), row["published_of"], row["table"]) for row in others]
        yield "## Published only\n\n" + note + _format_table(header, cells)


def _labels(row: Row) -> tuple[str, str, str]:
    return row["what"], row["model"], row["set"]


def _describe_published(row: Row) -> str:
    return f"{row['bound']} {format_value(row['published'])}".strip()


def _format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(escape_markdown(format_value(cell)) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _deviations_section(pipeline: Pipeline) -> str:
    """List what the presets do unlike the paper, by the experiment that it concerns."""
    if pipeline.preset.published is None:
        return ""
    names = [COMMON_DEVIATIONS, *experiments.NAMES, "ability"]
    lines = [
        f"- {'all experiments' if name == COMMON_DEVIATIONS else name}: {escape_markdown(text)}\n"
        for name in names
        for text in list_deviations(name)
    ]
    note = "Numbers of an experiment that is named here have no difference.\n\n"
    return "## Known deviations of the presets from the paper\n\n" + note + "".join(lines)


def _ability_section(rows: Sequence[Row]) -> str:
    """Return the table of general ability: one row per model and task."""
    if not rows:
        return ""
    header = ("model", "task", "accuracy", "standard error", "rows", "examples in the prompt")
    keys = ("model", "task", "value", "stderr", "rows", "num_fewshot")
    return "## General ability\n\n" + _format_table(header, [[row[key] for key in keys] for row in rows])


def _trainings_section(pipeline: Pipeline) -> str:
    """Return one line per finished or provided adapter, and the weight decay of all."""
    lines = []
    for name in pipeline.trainings:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name not in pipeline.steps.steps:
            lines.append(f"- {escape_markdown(name)}: provided, not trained here")
        elif pipeline.steps.reason(name) is None:
            record = json.loads(path.read_text(encoding="utf-8"))
            seconds = record["provenance"]["figures"]["seconds"]
            lines.append(f"- {escape_markdown(name)}: {escape_markdown('; '.join(record['headline']))} ({seconds} s)")
    if not lines:
        return ""
    decays = dict.fromkeys(
        f"weight decay {settings.weight_decay:g} towards {settings.weight_decay_target:g}"
        for settings in (training.settings for training in pipeline.trainings.values())
    )
    return "## Trainings\n\n" + "\n".join(lines) + f"\n\nIA3 scales: {', '.join(decays)}.\n"
