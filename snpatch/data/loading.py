"""`load_dataset`: a Dataset from the name of a published dataset, a file or a folder."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from snpatch.config import check_choice
from snpatch.data.dataset import Dataset, Example, fingerprint_examples
from snpatch.data.file_reader import find_files, get_suffix, read_rows
from snpatch.data.formats import DATASETS, Format, RowError, shorten_repr
from snpatch.data.generic import NOTES, find_unused_columns, generic_format, line_format
from snpatch.data.overlap import split_words
from snpatch.data.source_row import SourceRow, find_column_error
from snpatch.errors import SnpatchError
from snpatch.utils.optional import require
from snpatch.utils.schema import check_argument

SAVED_FILES = ("state.json", "dataset_dict.json")  # in a folder written by `save_to_disk` of the `datasets` library


def load_dataset(
    source: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    distinct: bool | None = None,
    skip_invalid: bool = False,
) -> Dataset:
    """Load prompts, preference pairs, conversations or text.

    Args:
        source: Name of a published dataset (see `snpatch.data.DATASETS`), or a path: .jsonl, .json, .csv, .parquet,
            .txt, .raw, or these as .gz or .xz; a pipe with JSON or CSV; a folder of such files, or one written by
            `save_to_disk` of the `datasets` library.
        format: Published dataset whose format a file has; None: the generic format (`generic.generic_format`), or one
            prompt per line of a .txt file.
        split: Split of a published dataset (default: see DATASETS), or the files of a folder with this word in their
            path.
        column: Column with the prompt; None: found by its name.
        revision: Branch, tag or commit of a published dataset.
        distinct: Drop rows whose prompt has the same words as an earlier one; None: if the format does (beavertails).
        skip_invalid: Count invalid rows instead of raising an error at the first.

    Returns:
        The examples in the order of the source.

    Raises:
        SnpatchError: A row is invalid (with file and line), a file is damaged, a column is missing, or no row is valid.
    """
    check_argument(source, str | Path, "source")
    for name, value in {"format": format, "split": split, "column": column, "revision": revision}.items():
        check_argument(value, str | None, name)
    check_argument(distinct, bool | None, "distinct")
    if isinstance(source, str) and source in DATASETS:
        if format or column:
            raise SnpatchError(
                f"{source}: expected a file with format and column, got a dataset name. Write ./{source} for a file."
            )
        from snpatch.data.hub_datasets import fetch

        name, row_format = source, DATASETS[source]
        rows, origin = fetch(require(row_format.hub), row_format.columns, split, revision)
    else:
        if revision:
            raise SnpatchError(f"{source}: expected a dataset name with revision, got a path. Leave revision out.")
        path, name = Path(source), format or Path(source).name
        row_format = _get_format(format, column)
        if not path.exists():
            raise SnpatchError(f"{source}: expected a file or a dataset ({', '.join(DATASETS)}), got neither")
        if any((path / file).is_file() for file in SAVED_FILES):
            from snpatch.data.hub_datasets import read_saved

            rows = read_saved(path, row_format.columns, split)
        else:
            files = find_files(path, split)
            if (format or column) is None and all(get_suffix(file) == ".txt" for file in files):
                row_format = line_format()
            rows = (row for file in files for row in read_rows(file, row_format.columns))
        origin = {"path": str(path), "format": format, "split": split, "column": column}
    is_distinct = row_format.distinct if distinct is None else distinct
    return _collect(name, rows, row_format, origin, is_distinct, skip_invalid)


def _get_format(format: str | None, column: str | None) -> Format:
    if format is None:
        return generic_format(column)
    check_choice("format", format, tuple(DATASETS))
    if column:
        raise SnpatchError(f"column: expected none with format {format}, which has its own, got {column!r}")
    return DATASETS[format]


def _collect(
    name: str, rows: Iterator[SourceRow], row_format: Format, origin: dict, is_distinct: bool, skip_invalid: bool
) -> Dataset:
    examples, dropped, num_rows, skipped, known_prompts = [], Counter(), 0, 0, set()
    for row in rows:
        num_rows += 1
        try:
            example = _parse_row(row, row_format)
        except RowError as error:
            if not skip_invalid:
                raise SnpatchError(f"{row.location}: {error}") from None
            skipped += 1
            continue
        if isinstance(example, str):
            dropped[example] += 1
            continue
        if is_distinct and example.prompt:
            prompt = tuple(" ".join(split_words(message["content"])) for message in example.prompt)
            if prompt in known_prompts:
                dropped["repeated prompt"] += 1
                continue
            known_prompts.add(prompt)
        examples.append(replace(example, meta={**example.meta, "file": row.file, "row": row.number}))
    if not examples:
        reasons = "".join(f"; {count} dropped: {reason}" for reason, count in dropped.items())
        raise SnpatchError(f"{name}: expected prompts, got none in {num_rows} rows ({skipped} invalid{reasons})")
    counts = {"rows": num_rows, "skipped": skipped, "left_out": dict(dropped)}
    for reason in NOTES:
        counts[reason] = dict(Counter(e.meta[reason] for e in examples if reason in e.meta))
    counts["unused_columns"] = find_unused_columns(examples) if row_format.hub is None else []
    examples = tuple(examples)
    return Dataset(name, examples, skipped, {**origin, **counts, "sha256": fingerprint_examples(examples)})


def _parse_row(row: SourceRow, row_format: Format) -> Example | str:
    if row.error:
        raise RowError(row.error)
    is_object = isinstance(row.value, dict)
    if error := find_column_error(row.value if is_object else (), row_format.columns):
        raise RowError(
            f"expected an object with {error if is_object else f'{error}; the row is {shorten_repr(row.value)}'}"
        )
    return row_format.parse(row.value)
