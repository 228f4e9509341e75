"""Files: atomic writes, safetensors with JSON metadata, and checked reading of checkpoints."""

import errno
import json
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from snpatch import __version__
from snpatch.errors import ESCAPE, SnpatchError
from snpatch.utils.schema import parse_json

_NOT_IN_STEM = re.compile(r"[/\\\x00-\x1f\x7f]|^\.")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Exceptions of torch.load for damaged or malicious files.
_LOAD_ERRORS = (
    UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError,
    AssertionError, MemoryError, OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds, and is removed if it fails.

    File and folder are synced, so that `path` is either the old or the new file after a power cut.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise SnpatchError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file, as an `opener` of `open`.

    Links, pipes and devices raise OSError without blocking.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def sync(path: str | Path) -> None:
    """Sync a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8. Halves of surrogate pairs, from file names that are not UTF-8, are escaped as in JSON."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=ESCAPE)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], *, kind: str, meta: dict) -> None:
    """Write a safetensors file of a `kind`, with `meta` as JSON in its header."""
    header = {"kind": kind, "snpatch": __version__, "meta": json.dumps(meta)}
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        partial.write_bytes(save(contiguous, metadata=header))


def check_no_lfs_pointer(path: str | Path) -> None:
    """Raise for a file that Git LFS has not downloaded: it is a pointer to its content."""
    with Path(path).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise SnpatchError(f"{path}: a pointer of Git LFS, not the data. Fetch them with `git lfs pull`.")


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and meta of a file that `write_tensors` wrote. Raise for any other kind of file."""
    if not Path(path).is_file():
        raise SnpatchError(f"{path}: no such file")
    check_no_lfs_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != kind:
                raise SnpatchError(f"{path}: expected a snpatch {kind}, got {header.get('kind', 'another file')}")
            return {name: file.get_tensor(name) for name in file.keys()}, _meta(path, header)  # noqa: SIM118
    except SafetensorError as error:
        raise SnpatchError(f"{path}: not a safetensors file: {error}") from error


def is_safetensors(path: str | Path) -> bool:
    """Return whether a file begins as safetensors files do (length, then JSON), or does not exist."""
    path = Path(path)
    if not path.is_file():
        return not path.exists()
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _meta(path: str | Path, header: dict[str, str]) -> dict:
    try:
        meta = parse_json(header["meta"])
    except (KeyError, ValueError):
        meta = None
    if not isinstance(meta, dict):
        raise SnpatchError(f"{path}: damaged: its header holds no JSON object under `meta`; make the file again")
    return meta


def read_checkpoint(path: str | Path) -> Any:
    """Return the content of a safetensors file, or of a torch file (any other suffix) of plain tensors.

    A torch file whose tensors need more memory than the file has bytes raises, because a malicious one could ask for
    any amount.
    """
    if not Path(path).is_file():
        raise SnpatchError(f"{path}: no such file")
    check_no_lfs_pointer(path)
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        _check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise SnpatchError(f"{path}: not a safetensors file, cannot be read: {error}") from error
    except _LOAD_ERRORS as error:
        reason = type(error).__name__
        raise SnpatchError(f"{path}: not a torch file of plain tensors, cannot be read ({reason})") from error
    for tensor in _tensors_in(content):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise SnpatchError(f"{path}: expected plain tensors, got one of {tensor.layout} on {tensor.device}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise SnpatchError(f"{path}: a tensor of {list(tensor.shape)} is larger than what the file holds of it")
    return content


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name."""
    content = read_checkpoint(path)
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise SnpatchError(f"{path}: expected tensors by name, got another {type(content).__name__}")
    return content


def _check_stored(path: str | Path) -> None:
    """Raise BadZipFile for compressed or overlapping entries; torch stores entries uncompressed."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise zipfile.BadZipFile("its entries are compressed or overlap")


def _tensors_in(content: object) -> Iterator[Tensor]:
    """Yield each tensor of nested containers once."""
    pending, seen = [content], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item


def file_stem(name: str) -> str:
    """Return a name as part of a file name; slashes, control characters and a leading dot are escaped."""
    return _NOT_IN_STEM.sub(lambda match: f"%{ord(match[0]):02X}", name)


def check_writable(path: str | Path) -> None:
    """Raise before long work if a file could not be written at its end."""
    path = Path(path)
    if path.is_dir():
        raise SnpatchError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SnpatchError(f"cannot write {path}: {error.strerror or error}") from error
