"""Readers of JSON, CSV, Parquet and text files; each row has its location in the file.

Why a row can have an error instead of a value: the caller may skip an invalid row, but not a file that is damaged as a
whole (truncated, missing column, decompression bomb), which raises an error here.
"""

import codecs
import csv
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any, AnyStr, cast

from snpatch.data.source_row import Columns, SourceRow, check_columns, find_column_error, is_turns_column
from snpatch.errors import SnpatchError, is_unicode
from snpatch.utils.files import check_no_lfs_pointer
from snpatch.utils.schema import parse_json

TEXT_SUFFIXES = (".txt", ".raw")
KINDS = (".jsonl", ".json", ".csv", ".parquet", *TEXT_SUFFIXES)
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
METADATA_FILES = ("dataset_info.json", "dataset_infos.json")  # metadata files of the `datasets` library
DELIMITERS = (";", "\t")  # of CSV files that are not read
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
MESSAGE_KEYS = {"role", "from"}  # of messages, with either of which a list is a chat and not a column
MAX_LINE_BYTES = 2**26  # of a line or CSV field; the csv module's default of 131072 is less than some published fields
MAX_EXPANSION = 100  # decompressed / compressed size above MAX_LINE_BYTES; text has 3 to 20


def find_files(path: Path, split: str | None = None) -> list[Path]:
    """Return the file, or the data files in a folder and its subfolders, sorted by name.

    Args:
        path: File or folder.
        split: Only files of a folder with this word in their path, such as `test-00000-of-00002.parquet` or
            `test/0000.parquet`.

    Raises:
        SnpatchError: There is no data file, or the folder mixes splits or kinds of file.
    """
    if not path.is_dir():
        if not path.exists():
            raise SnpatchError(f"{path}: no such file")
        if split:
            raise SnpatchError(f"{path}: split chooses among the files of a folder, this is one file")
        return [path]
    names = sorted(
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if p.is_file() and get_suffix(p) in KINDS and p.name not in METADATA_FILES
    )
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    splits = [word for word in SPLITS if any(_has_word(name, word) for name in names)]
    if split:
        names = [name for name in names if _has_word(name, split)]
    elif len(splits) > 1:
        raise SnpatchError(f"{path}: holds several splits ({', '.join(splits)}): choose one with split")
    if not names:
        which = f" with {split!r} in its name" if split else ""
        raise SnpatchError(f"{path}: holds no data file{which} (expected {', '.join(KINDS)})")
    kinds = sorted({get_suffix(path / name) for name in names})
    if len(kinds) > 1:
        raise SnpatchError(f"{path}: holds several kinds of file ({', '.join(kinds)}): expected one kind")
    return [path / name for name in names]


def read_rows(path: Path, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a file: JSON, CSV, Parquet or lines of text; of a pipe, JSON or CSV.

    For JSON see `_read_json`. Files ending in .gz or .xz are decompressed. A byte order mark is ignored, and so are
    blank lines, except in text.

    Args:
        path: The file.
        columns: Required columns.

    Raises:
        SnpatchError: The file cannot be read to its end, or its header lacks a required column.
    """
    kind, is_stream = get_suffix(path), not path.is_file() or path.parts[:2] == ("/", "dev")
    if kind not in KINDS and not is_stream:
        raise SnpatchError(f"{path}: expected a file that ends in {', '.join(KINDS)} (with or without .gz, .xz)")
    with _open(path) as stream:
        if kind not in KINDS:
            kind = ".json" if stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] in b"{[" else ".csv"
        if kind == ".csv":
            yield from _read_csv(path, stream, columns)
        elif kind in TEXT_SUFFIXES:
            yield from _read_text(path, stream, columns)
        elif kind != ".parquet":
            yield from _read_json(path, stream, columns)
    if kind == ".parquet":
        from snpatch.data.parquet import read_parquet_rows

        yield from read_parquet_rows(path, columns)


def get_suffix(path: Path) -> str:
    """Return a file's suffix, without .gz or .xz: one of KINDS if it is a data file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.is_file():  # a pipe can be read once
            check_no_lfs_pointer(path)
        with cast(BufferedReader, OPENERS.get(path.suffix.lower(), open)(path, "rb")) as stream:
            _check_encoding(path, stream.peek(4)[:4])
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SnpatchError(f"{path}: cannot be read: {error}") from error


def _check_encoding(path: Path, start: bytes) -> None:
    """Raise a SnpatchError for the first bytes of a text in UTF-16 or UTF-32.

    A byte order mark is not needed.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if (
        encoding is None
        and start[:1]
        and b"\0" in start
        and get_suffix(path) in (".jsonl", ".json", ".csv", *TEXT_SUFFIXES)
    ):
        encoding = "UTF-32" if start.count(0) > 2 else "UTF-16"
    if encoding:
        raise SnpatchError(f"{path}: expected UTF-8, got {encoding}. Convert it: iconv -f {encoding} -t UTF-8.")


def _lines(path: Path, stream: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield lines; raise a SnpatchError for one above MAX_LINE_BYTES and for a decompression bomb."""
    number, total, limit = 0, 0, _max_bytes(path)
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number, total = number + 1, total + len(line)
        if len(line) > MAX_LINE_BYTES:
            raise SnpatchError(f"{path}, line {number}: expected at most {MAX_LINE_BYTES} bytes, got more")
        if total > limit:
            raise _bomb_error(path, limit)
        yield line


def _read_rest(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the rest of a file in chunks; raise a SnpatchError for a decompression bomb."""
    total, limit = 0, _max_bytes(path)
    while chunk := stream.read(MAX_LINE_BYTES):
        total += len(chunk)
        if total > limit:
            raise _bomb_error(path, limit)
        yield chunk


def _max_bytes(path: Path) -> float:
    """Return the maximum size of a file's content.

    It is MAX_EXPANSION times the file's own size if the file is compressed and large.
    """
    return max(MAX_LINE_BYTES, MAX_EXPANSION * path.stat().st_size) if path.suffix.lower() in OPENERS else math.inf


def _bomb_error(path: Path, limit: float) -> SnpatchError:
    return SnpatchError(
        f"{path}: expected at most {limit} bytes ({MAX_EXPANSION} times its size), got more. Unpack it."
    )


def _read_json(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[SourceRow]:
    """Yield JSON objects.

    They are one per line, the items of an array or of an object's only list, the items of an object's columns, or one
    object on several lines.
    """
    first, parser = True, _JsonParser()
    for number, line in enumerate(_lines(path, stream), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        value, error = parser.parse(line)
        is_row = value is not None and not isinstance(value, list)
        if first and (not is_row or _find_rows(path, value, columns) is not None):
            content = b"\n" * (number - 1) + line + b"".join(_read_rest(path, stream))
            is_lines = value is not None or error is None
            yield from _read_json_document(path, content, columns, is_lines)
            return
        first = False
        yield SourceRow(str(path), "line", number, value, error)


def _read_json_document(path: Path, content: bytes, columns: Columns, is_lines: bool) -> Iterator[SourceRow]:
    """Yield the rows of a file whose first line is not a row, or contains several.

    An example is hh-rlhf's red_team_attempts.jsonl.gz, an array. A string in an array is a prompt.
    is_lines: the first line alone is JSON, so that a file that is no document has one value per line.
    """
    parser = _JsonParser()
    document, error = parser.parse(content)
    if error and document is None:
        if not is_lines and content.lstrip().startswith(b"["):
            raise SnpatchError(f"{path}: {error}")
        for number, line in enumerate(_lines(path, BytesIO(content)), start=1):
            if line.strip():
                yield SourceRow(str(path), "line", number, *parser.parse(line))
        return
    rows = document if isinstance(document, list) else _find_rows(path, document, columns)
    if error and rows is not document and rows is not None:
        raise SnpatchError(f"{path}: {error}")
    for number, value in enumerate([document] if rows is None else rows, start=1):
        error = parser.find_doubled_key(value)
        yield SourceRow(str(path), "item", number, {"prompt": value} if isinstance(value, str) else value, error)


def _find_rows(path: Path, value: object, columns: Columns) -> list | None:
    """Return the rows in an object such as {"data": [...]} or {"prompt": [...], "id": [...]}, or None.

    The rows are the items of its columns, or of its only list, objects or strings; these get the object's other fields.
    """
    needs_no_column = not callable(columns) and () in columns
    if not isinstance(value, dict) or needs_no_column:  # then the caller reads tables itself
        return None
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    if find_column_error(value, columns) is None:
        return _transpose_columns(path, value) if len(lists) == len(value) and not _is_row_of_lists(value) else None
    ((name, rows),) = lists.items() if len(lists) == 1 else ((None, []),)
    if not rows or not isinstance(rows[0], dict | str):
        return None
    shared = {key: item for key, item in value.items() if key != name}
    rows = ({"prompt": row} if isinstance(row, str) else row for row in rows)
    return [{**shared, **row} if isinstance(row, dict) else row for row in rows]


def _transpose_columns(path: Path, table: dict[str, list]) -> list[dict]:
    if len({len(column) for column in table.values()}) > 1:
        lengths = ", ".join(f"{len(column)} of {name}" for name, column in table.items())
        raise SnpatchError(f"{path}: expected columns of one length, got {lengths}. Write one object per row.")
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def _is_row_of_lists(value: dict[str, list]) -> bool:
    """Return whether an object of lists is one row: it has a list of messages, or nothing but turns."""
    has_messages = any(
        isinstance(item, dict) and item.keys() & MESSAGE_KEYS for items in value.values() for item in items
    )
    return has_messages or all(is_turns_column(name) for name in value)


class _JsonParser:
    """Parser of JSON that names a key which one object has twice; one per file, because a decoder is slow to build."""

    def __init__(self) -> None:
        # id -> (object, its doubled key); the objects stay alive, so that ids are unique.
        self._doubled: dict[int, tuple[dict, str]] = {}
        self._decoder = json.JSONDecoder(object_pairs_hook=self._build_object)

    def parse(self, content: bytes) -> tuple[Any, str | None]:
        """Return (value, None), (None, error), or (value, error) if an object has two keys of one name."""
        self._doubled.clear()
        try:
            value = parse_json(content.decode("utf-8"), self._decoder.decode)
        except UnicodeDecodeError as error:
            return None, f"not UTF-8: {error}"
        except ValueError as error:
            lines = content.strip().count(b"\r")
            remedy = ". Its lines end in CR alone: convert them to LF" if lines and b"\n" not in content.strip() else ""
            return None, f"not JSON: {error}{remedy}"
        return value, self.find_doubled_key(value)

    def find_doubled_key(self, value: object) -> str | None:
        """Return an error if a part of the last value has two keys of one name."""
        if not self._doubled:
            return None
        if id(value) in self._doubled:
            name = self._doubled[id(value)][1]
            return f"expected different keys in an object, got {name!r} twice. Remove or rename one"
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next(filter(None, map(self.find_doubled_key, parts)), None)

    def _build_object(self, pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self._doubled[id(value)] = value, next(name for name in names if names.count(name) > 1)
        return value


def _read_csv(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[SourceRow]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the module has one limit for the whole process
    reader = csv.reader(_lines(path, _decode(stream, newline="")), strict=True)
    number = 1
    try:
        if (header := next(reader, None)) is None:
            return
        if len(set(header)) < len(header):
            raise SnpatchError(f"{path}: two columns have one name ({', '.join(header)})")
        _check_delimiter(path, header, columns)
        check_columns(path, header, columns)
        number = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _build_csv_row(path, number, header, cells)
            number = reader.line_num + 1
    except csv.Error as error:
        raise SnpatchError(f"{path}, line {number}: not CSV: {error}") from error


def _check_delimiter(path: Path, header: list[str], columns: Columns) -> None:
    """Raise a SnpatchError for a header with another delimiter, unless it is a required column."""
    is_required = find_column_error(header, columns) is None and find_column_error((), columns) is not None
    if len(header) == 1 and not is_required:
        for delimiter in DELIMITERS:
            if delimiter in header[0]:
                raise SnpatchError(
                    f"{path}: expected columns separated by ',', got {header[0][:80]!r}, separated by {delimiter!r}. "
                    "Convert it to commas."
                )


def _build_csv_row(path: Path, number: int, header: list[str], cells: list[str]) -> SourceRow:
    if len(cells) != len(header):
        return SourceRow(str(path), "line", number, error=f"expected {len(header)} fields, got {len(cells)}")
    if not all(map(is_unicode, cells)):
        return SourceRow(str(path), "line", number, error="not UTF-8")
    return SourceRow(str(path), "line", number, dict(zip(header, cells, strict=True)))


def _read_text(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[SourceRow]:
    """Yield a row {"text"} per line, as the hub has Wikitext: with its line end, or "" for a blank line."""
    check_columns(path, ["text"], columns)
    for number, line in enumerate(_lines(path, _decode(stream)), start=1):
        if is_unicode(line):
            yield SourceRow(str(path), "line", number, {"text": line if line.strip() else ""})
        else:
            yield SourceRow(str(path), "line", number, error="not UTF-8")


def _decode(stream: IO[bytes], newline: str | None = None) -> TextIOWrapper:
    """Decode UTF-8.

    Invalid bytes become lone surrogates, so that the reader can name their row and continue.
    """
    return TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
