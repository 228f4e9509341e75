"""Report files: tables as CSV and JSON with provenance, plots as PNG and SVG, records as JSONL.

CSV cells are written unescaped, for programs. A spreadsheet may interpret a cell that begins with `=` as a formula
unless its columns are imported as text.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.report.report import Report, Row
from snpatch.utils.files import atomic_write, file_stem, write_text
from snpatch.utils.optional import install_hint


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write all files of a report.

    Args:
        report: Its file names are STEM.csv and STEM.json for each table, STEM.png and STEM.svg for each plot, and
            NAME-records.jsonl.
        folder: Created if missing.

    Returns:
        Paths of the files.
    """
    folder = Path(folder)
    contents = {}
    for stem, rows in report.tables.items():
        stem = file_stem(stem)
        contents[f"{stem}.csv"] = _to_csv(rows)
        table = {"provenance": report.provenance, "headline": report.headline, "notes": report.notes, "rows": rows}
        contents[f"{stem}.json"] = json.dumps(table, indent=1) + "\n"
    if report.records:
        contents[f"{report.name}-records.jsonl"] = "".join(json.dumps(record) + "\n" for record in report.records)
    for name, content in contents.items():
        write_text(folder / name, content)
    paths = [folder / name for name in contents]
    for stem, figure in report.plots.items():
        for kind in ("png", "svg"):
            paths.append(folder / f"{file_stem(stem)}.{kind}")
            with atomic_write(paths[-1]) as partial:
                figure.savefig(partial, format=kind, dpi=130)
    return paths


def write_records(records: Sequence[Row], path: str | Path) -> None:
    """Write records that have the same keys as a .csv, .jsonl or .parquet file, atomically.

    Lone surrogates, which UTF-8 cannot encode, become escapes.

    Raises:
        SnpatchError: Another suffix, or .parquet without pyarrow.
    """
    path = Path(path)
    records = [{name: _encodable(value) for name, value in record.items()} for record in records]
    if path.suffix == ".csv":
        write_text(path, _to_csv(records))
    elif path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise SnpatchError(f"writing Parquet needs more packages: {install_hint('data')}") from None
        with atomic_write(path) as partial:
            parquet.write_table(pyarrow.Table.from_pylist(list(records)), partial)
    else:
        raise SnpatchError(f"{path}: expected a name that ends in .csv, .jsonl or .parquet.")


def _encodable(value: object) -> object:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _to_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
