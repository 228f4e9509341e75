"""`load`: one way from a name, a file or a folder to a Dataset."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from snpatch.data.dataset import Dataset, Example, digest
from snpatch.data.files import find_files, read_rows
from snpatch.data.formats import SETS, Format, RowError, plain
from snpatch.data.rows import Row
from snpatch.errors import SnpatchError


def load(
    source: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """A data set by its name (see `snpatch.data.SETS`), from the hub; or from a file or a folder of files.

    source: a set's name, or a path: .jsonl, .json, .csv, .parquet, or .txt and .raw (a text), and .gz or .xz of them.
    format: the set whose published format a file has; None: rows with `prompt` (a text or turns) or `messages`.
    split: of a set (its default is in SETS), or the files of a folder with that word in their path.
    column: the column with the prompt, in place of `prompt`. revision: of a set: a branch, a tag or a commit.
    skip_bad: count bad rows instead of raising SnpatchError with file and line at the first. A file that is broken as
    a whole, a missing column, and a source without a single good row are errors all the same.
    """
    if isinstance(source, str) and source in SETS:
        if format or column:
            raise SnpatchError(f"{source}: format and column are for files; this is a set's name (a file: ./{source})")
        from snpatch.data.hub import fetch

        name, layout = source, SETS[source]
        rows, origin = fetch(layout.hub, layout.columns, split, revision)
    else:
        if revision:
            raise SnpatchError(f"{source}: revision is for sets from the hub, this is a path")
        path, layout = Path(source), _layout(format, column)
        if not path.exists():
            raise SnpatchError(f"{source}: no such file, nor a set of that name ({', '.join(SETS)})")
        name = format or path.name
        files = find_files(path, split)
        rows = (row for file in files for row in read_rows(file, layout.columns))
        origin = {"path": str(path), "format": format, "split": split}
    return _collect(name, rows, layout, origin, skip_bad)


def _layout(format: str | None, column: str | None) -> Format:
    if format is None:
        return plain(column)
    if format not in SETS:
        raise SnpatchError(f"format: wanted one of {', '.join(SETS)}, got {format!r}")
    if column:
        raise SnpatchError(f"column: {format} has its own columns, got {column!r}")
    return SETS[format]


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
        raise SnpatchError(f"{name}: holds no prompt ({read} rows, {skipped} of them bad)")
    no_pair = Counter(e.meta["no_pair"] for e in examples if "no_pair" in e.meta)
    counts = {"rows": read, "skipped": skipped, "left_out": dict(left_out), "no_pair": dict(no_pair)}
    examples = tuple(examples)
    return Dataset(name, examples, skipped, {**origin, **counts, "sha256": digest(examples)})


def _example(row: Row, layout: Format) -> Example | str:
    if row.error:
        raise RowError(row.error)
    if not isinstance(row.value, dict) or not any(set(choice) <= row.value.keys() for choice in layout.columns):
        wanted = " or ".join(", ".join(choice) for choice in layout.columns)
        raise RowError(f"wanted an object with {wanted}")
    return layout.parse(row.value)
