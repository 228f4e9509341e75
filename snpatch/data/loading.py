"""`load_dataset`: one way from a name, a file or a folder to a Dataset."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from snpatch.data.dataset import Dataset, Example, fingerprint
from snpatch.data.file_reader import find_files, kind_of, read_rows
from snpatch.data.formats import DATASETS, Format, RowError, short
from snpatch.data.generic import lines, plain
from snpatch.data.source_row import Row, fault
from snpatch.errors import SnpatchError

SAVED = ("state.json", "dataset_dict.json")  # in a folder that the `datasets` library saved


def load_dataset(
    source: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """A data set by its name (see `snpatch.data.DATASETS`), from the hub; or from a file or a folder of files.

    source: a set's name, or a path: .jsonl, .json, .csv, .parquet, or .txt and .raw (a text), and .gz or .xz of them;
    a pipe with JSON or CSV; a folder that the `datasets` library saved.
    format: the set whose published format a file has; None: rows as data.plain reads them, or a prompt on each line.
    split: of a set (its default is in DATASETS), or the files of a folder with that word in their path.
    column: the column with the prompt; None: the one that can hold it. revision: of a set: a branch, a tag or a commit.
    skip_bad: count bad rows instead of raising SnpatchError with file and line at the first. A file that is broken as
    a whole, a missing column, and a source without a single good row are errors all the same.
    """
    if isinstance(source, str) and source in DATASETS:
        if format or column:
            raise SnpatchError(f"{source}: format and column are for files; this is a set's name (a file: ./{source})")
        from snpatch.data.hub import fetch

        name, layout = source, DATASETS[source]
        rows, origin = fetch(layout.hub, layout.columns, split, revision)
    else:
        if revision:
            raise SnpatchError(f"{source}: revision is for sets from the hub, this is a path")
        path, name = Path(source), format or Path(source).name
        layout = _layout(format, column)
        if not path.exists():
            raise SnpatchError(f"{source}: no such file, nor a set of that name ({', '.join(DATASETS)})")
        if any((path / one).is_file() for one in SAVED):
            from snpatch.data.hub import read_saved

            rows = read_saved(path, layout.columns, split)
        else:
            files = find_files(path, split)
            if (format or column) is None and all(kind_of(file) == ".txt" for file in files):
                layout = lines()
            rows = (row for file in files for row in read_rows(file, layout.columns))
        origin = {"path": str(path), "format": format, "split": split, "column": column}
    return _collect(name, rows, layout, origin, skip_bad)


def _layout(format: str | None, column: str | None) -> Format:
    if format is None:
        return plain(column)
    if format not in DATASETS:
        raise SnpatchError(f"format: wanted one of {', '.join(DATASETS)}, got {format!r}")
    if column:
        raise SnpatchError(f"column: {format} has its own columns, got {column!r}")
    return DATASETS[format]


def _collect(name: str, rows: Iterator[Row], layout: Format, origin: dict, skip_bad: bool) -> Dataset:
    examples, left_out, read, skipped, seen = [], Counter(), 0, 0, set()
    for row in rows:
        read += 1
        try:
            example = _example(row, layout)
        except RowError as error:
            if not skip_bad:
                raise SnpatchError(f"{row.where}: {error}") from None
            skipped += 1
            continue
        if isinstance(example, str):
            left_out[example] += 1
        elif layout.distinct and example.prompt[0]["content"] in seen:
            left_out["repeated prompt"] += 1
        else:
            examples.append(replace(example, meta={**example.meta, "file": row.file, "row": row.number}))
            seen.add(example.prompt[0]["content"] if layout.distinct else None)
    if not examples:
        why = "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        raise SnpatchError(f"{name}: holds no prompt ({read} rows, {skipped} of them bad){why}")
    counts = {"rows": read, "skipped": skipped, "left_out": dict(left_out)}
    for reason in ("no_pair", "left_aside"):
        counts[reason] = dict(Counter(e.meta[reason] for e in examples if reason in e.meta))
    examples = tuple(examples)
    return Dataset(name, examples, skipped, {**origin, **counts, "sha256": fingerprint(examples)})


def _example(row: Row, layout: Format) -> Example | str:
    if row.error:
        raise RowError(row.error)
    is_object = isinstance(row.value, dict)
    if found := fault(row.value if is_object else (), layout.columns):
        raise RowError(f"wanted an object with {found if is_object else f'{found}; the row is {short(row.value)}'}")
    return layout.parse(row.value)
