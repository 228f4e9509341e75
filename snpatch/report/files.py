"""Reports as files: CSV for spreadsheets, JSON with provenance for programs, plots as PNG and SVG.

Why rows are plain dicts: every experiment's table goes through the same two writers. Cells of CSV are the texts as they
are, for programs: a spreadsheet may read one that begins with `=` as a formula unless its columns are imported as text.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.files import file_stem, whole_file, write_text
from snpatch.report.report import Report, Row


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """STEM.csv and STEM.json of each table, STEM.png and STEM.svg of each plot, NAME-records.jsonl; their paths."""
    folder = Path(folder)
    texts = {}
    for stem, rows in report.tables.items():
        stem = file_stem(stem)
        texts[f"{stem}.csv"] = _csv(rows)
        kept = {"provenance": report.provenance, "headline": report.headline, "rows": rows}
        texts[f"{stem}.json"] = json.dumps(kept, indent=1) + "\n"
    if report.records:
        texts[f"{report.name}-records.jsonl"] = "".join(json.dumps(record) + "\n" for record in report.records)
    for name, text in texts.items():
        write_text(folder / name, text)
    paths = [folder / name for name in texts]
    for stem, figure in report.plots.items():
        for kind in ("png", "svg"):
            paths.append(folder / f"{file_stem(stem)}.{kind}")
            with whole_file(paths[-1]) as partial:
                figure.savefig(partial, format=kind, dpi=130)
    return paths


def write_records(records: Sequence[Row], path: str | Path) -> None:
    """Records of the same keys as one table: .csv, .jsonl or .parquet; the file appears whole or not at all.

    Lone surrogates, which UTF-8 does not have, become escapes.
    """
    path = Path(path)
    records = [{name: _encodable(value) for name, value in record.items()} for record in records]
    if path.suffix == ".csv":
        write_text(path, _csv(records))
    elif path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise SnpatchError("parquet needs pyarrow: pip install 'snpatch[data]'") from None
        with whole_file(path) as partial:
            parquet.write_table(pyarrow.Table.from_pylist(list(records)), partial)
    else:
        raise SnpatchError(f"{path}: wanted .csv, .jsonl or .parquet")


def _encodable(value: object) -> object:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
