"""Rows of files in the formats that data sets are published in, each with its place in the file.

Why a row can hold an error instead of a value: one broken row may be skipped if the caller says so; a file that is
broken as a whole (truncated, no such column, a bomb) may not, and is raised here.
"""

import codecs
import csv
import gzip
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any, AnyStr

from snpatch.data.source_row import Columns, Row, check_columns, fault
from snpatch.errors import SnpatchError, is_unicode
from snpatch.schema import parse_json

TEXTS = (".txt", ".raw")
KINDS = (".jsonl", ".json", ".csv", ".parquet", *TEXTS)
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
CARDS = ("dataset_info.json", "dataset_infos.json")  # what the `datasets` library tells of the files beside them
LFS = b"version https://git-lfs.github.com/spec/"
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
MAX_LINE_BYTES = 2**26  # of a line, or a field of CSV; the csv module's own 131072 is less than some published fields
MAX_EXPANSION = 100  # times a compressed file's own size, past MAX_LINE_BYTES: texts take 3 to 20 times


def find_files(path: Path, split: str | None = None) -> list[Path]:
    """The file, or the data files in a folder (and its folders) in the order of their names.

    split: only those of a folder that have it as a word of their path, such as `test-00000-of-00002.parquet` or
    `test/0000.parquet`. A folder that mixes splits, or kinds of file, is an error.
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
        if p.is_file() and kind_of(p) in KINDS and p.name not in CARDS
    )
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    found = [word for word in SPLITS if any(_has_word(name, word) for name in names)]
    if split:
        names = [name for name in names if _has_word(name, split)]
    elif len(found) > 1:
        raise SnpatchError(f"{path}: holds several splits ({', '.join(found)}): choose one with split")
    if not names:
        which = f" with {split!r} in its name" if split else ""
        raise SnpatchError(f"{path}: holds no data file{which} (wanted {', '.join(KINDS)})")
    kinds = sorted({kind_of(path / name) for name in names})
    if len(kinds) > 1:
        raise SnpatchError(f"{path}: holds several kinds of file ({', '.join(kinds)}): wanted one kind")
    return [path / name for name in names]


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file: JSON (see _json_rows), CSV, Parquet, or lines of text; of a pipe JSON or CSV.

    Compressed by gzip or xz if its name ends so; a byte order mark is passed over, and so are blank lines, except in
    a text. Raises SnpatchError if the file cannot be read to its end, or if its header lacks what `columns` wants.
    """
    kind, is_stream = kind_of(path), not path.is_file() or path.parts[:2] == ("/", "dev")
    if kind not in KINDS and not is_stream:
        raise SnpatchError(f"{path}: wanted a file that ends in {', '.join(KINDS)} (with or without .gz, .xz)")
    with _open(path) as stream:
        if kind not in KINDS:
            kind = ".json" if stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] in b"{[" else ".csv"
        if kind == ".csv":
            yield from _csv_rows(path, stream, columns)
        elif kind in TEXTS:
            yield from _text_rows(path, stream, columns)
        elif kind != ".parquet":
            yield from _json_rows(path, stream, columns)
    if kind == ".parquet":
        from snpatch.data.parquet import parquet_rows

        yield from parquet_rows(path, columns)


def kind_of(path: Path) -> str:
    """Return which of KINDS a file's name says it is, or what else it ends in."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name) is not None


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as stream:
            head = stream.peek(len(LFS))
            if head.startswith(LFS):
                raise SnpatchError(f"{path}: a pointer of Git LFS, not the data. Fetch them with `git lfs pull`.")
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise SnpatchError(f"{path}: UTF-16, wanted UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")
            yield stream
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SnpatchError(f"{path}: cannot be read: {error}") from error


def _lines(path: Path, stream: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield lines; one longer than MAX_LINE_BYTES, and more in all than a file holds that is no bomb, are errors."""
    number, total, most = 0, 0, _most(path)
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number, total = number + 1, total + len(line)
        if len(line) > MAX_LINE_BYTES:
            raise SnpatchError(f"{path}, line {number}: expected at most {MAX_LINE_BYTES} bytes, got more")
        if total > most:
            raise _bomb(path, most)
        yield line


def _rest(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield what is left of a file, in pieces; more than a file holds that is no bomb is an error."""
    total, most = 0, _most(path)
    while piece := stream.read(MAX_LINE_BYTES):
        total += len(piece)
        if total > most:
            raise _bomb(path, most)
        yield piece


def _most(path: Path) -> float:
    """Return how many bytes a file may hold: it was compressed by at most MAX_EXPANSION if it is large."""
    return max(MAX_LINE_BYTES, MAX_EXPANSION * path.stat().st_size) if path.suffix.lower() in OPENERS else math.inf


def _bomb(path: Path, most: float) -> SnpatchError:
    return SnpatchError(f"{path}: expected at most {most} bytes ({MAX_EXPANSION} times its size), got more. Unpack it.")


def _json_rows(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[Row]:
    """Yield the objects of lines, of an array, or of the one list of an object; or one object on several lines."""
    first = True
    for number, line in enumerate(_lines(path, stream), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        value, error = _json(line)
        if first and (error or isinstance(value, list) or _list_in(value, columns)):
            yield from _document(path, b"\n" * (number - 1) + line + b"".join(_rest(path, stream)), columns)
            return
        first = False
        yield Row(str(path), "line", number, value, error)


def _document(path: Path, content: bytes, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file whose first line is not a row, or may be more than one.

    hh-rlhf's red_team_attempts.jsonl.gz is an array. A row of an array may be a text: it is a prompt.
    """
    whole, error = _json(content)
    if error and not content.lstrip().startswith(b"["):
        for number, line in enumerate(_lines(path, BytesIO(content)), start=1):
            if line.strip():
                yield Row(str(path), "line", number, *_json(line))
        return
    if error:
        raise SnpatchError(f"{path}: {error}")
    items = whole if isinstance(whole, list) else _list_in(whole, columns) or [whole]
    for number, value in enumerate(items, start=1):
        value = {"prompt": value} if isinstance(value, str) else value
        yield Row(str(path), "item", number, value)


def _list_in(value: object, columns: Columns) -> list | None:
    """Return the rows in an object that is none itself, such as {"data": [...]}: its only list of objects or texts."""
    if not isinstance(value, dict) or fault(value, columns) is None:
        return None
    lists = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict | str)]
    return lists[0] if len(lists) == 1 else None


def _json(content: bytes) -> tuple[Any, str | None]:
    """(value, None), or (None, what is wrong)."""
    try:
        return parse_json(content.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error}"
    except ValueError as error:
        return None, f"not JSON: {error}"


def _csv_rows(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the module has one limit for the whole process
    reader = csv.reader(_lines(path, _decoded(stream, newline="")), strict=True)
    header = None
    number = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise SnpatchError(f"{path}: two columns have one name ({', '.join(header)})")
                check_columns(path, header, columns)
            elif cells:
                yield _csv_row(path, number, header, cells)
            number = reader.line_num + 1
    except csv.Error as error:
        raise SnpatchError(f"{path}, line {number}: not CSV: {error}") from error


def _csv_row(path: Path, number: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        return Row(str(path), "line", number, error=f"wanted {len(header)} fields, got {len(cells)}")
    if not all(map(is_unicode, cells)):
        return Row(str(path), "line", number, error="not UTF-8")
    return Row(str(path), "line", number, dict(zip(header, cells, strict=True)))


def _text_rows(path: Path, stream: IO[bytes], columns: Columns) -> Iterator[Row]:
    """A row {"text"} for each line, in the hub's form of Wikitext: with its line end, or empty if the line is blank."""
    check_columns(path, ["text"], columns)
    for number, line in enumerate(_lines(path, _decoded(stream)), start=1):
        if is_unicode(line):
            yield Row(str(path), "line", number, {"text": line if line.strip() else ""})
        else:
            yield Row(str(path), "line", number, error="not UTF-8")


def _decoded(stream: IO[bytes], newline: str | None = None) -> TextIOWrapper:
    """Bytes that are not UTF-8 become lone surrogates, so that the reader can go on and tell which row holds them."""
    return TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
