"""Files: safetensors with JSON metadata, and writing that never leaves half a file behind."""

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
# What torch.load raises for a file that is damaged or made up.
DAMAGED = (
    UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError,
    AssertionError, MemoryError, OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` when the block ends well, and vanishes when it does not.

    File and folder are on the disk before this returns: after a power cut `path` is the old file or the new one.
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
    """Open a file as an `opener` of `open`; a link, a pipe or a device is an OSError, and nothing is waited for."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def sync(path: str | Path) -> None:
    """Write a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; halves of surrogate pairs, as names of files that are no UTF-8 have them, as JSON escapes them."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=ESCAPE)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], *, kind: str, meta: dict) -> None:
    """A safetensors file of one `kind` with `meta` as JSON; no pickle."""
    header = {"kind": kind, "snpatch": __version__, "meta": json.dumps(meta)}
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        partial.write_bytes(save(contiguous, metadata=header))


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and meta of a file that `write_tensors` wrote; an error for any other kind of file."""
    if not Path(path).is_file():
        raise SnpatchError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != kind:
                raise SnpatchError(f"{path}: wanted a snpatch {kind}, got {header.get('kind', 'another file')}")
            return {name: file.get_tensor(name) for name in file.keys()}, _meta(path, header)  # noqa: SIM118
    except SafetensorError as error:
        raise SnpatchError(f"{path}: not a safetensors file: {error}") from error


def _meta(path: str | Path, header: dict[str, str]) -> dict:
    try:
        meta = parse_json(header["meta"])
    except (KeyError, ValueError):
        meta = None
    if not isinstance(meta, dict):
        raise SnpatchError(f"{path}: damaged: its header holds no JSON object under `meta`; make the file anew")
    return meta


def read_checkpoint(path: str | Path) -> Any:
    """Return what a safetensors file or, by any other suffix, a torch file holds; of a pickle only plain tensors.

    A torch file whose tensors would take more room than the file is an error: made up, it could ask for any.
    """
    if not Path(path).is_file():
        raise SnpatchError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        _check_stored(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise SnpatchError(f"{path}: not a safetensors file, cannot be read: {error}") from error
    except DAMAGED as error:
        reason = type(error).__name__
        raise SnpatchError(f"{path}: not a torch file of plain tensors, cannot be read ({reason})") from error
    for tensor in _tensors_in(found):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise SnpatchError(f"{path}: expected plain tensors, got one of {tensor.layout} on {tensor.device}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise SnpatchError(f"{path}: a tensor of {list(tensor.shape)} is larger than what the file holds of it")
    return found


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file by their names."""
    found = read_checkpoint(path)
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise SnpatchError(f"{path}: expected tensors by name, got another {type(found).__name__}")
    return found


def _check_stored(path: str | Path) -> None:
    """Raise BadZipFile for a zip file that would grow when it is read: torch stores its entries as they are."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise zipfile.BadZipFile("its entries are compressed or overlap")


def _tensors_in(found: object) -> Iterator[Tensor]:
    """Yield each tensor of nested containers once."""
    left, seen = [found], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one


def file_stem(name: str) -> str:
    """Return a name as part of a file's name in its folder: slashes, control characters and a first dot are escaped."""
    return _NOT_IN_STEM.sub(lambda match: f"%{ord(match[0]):02X}", name)


def check_writable(path: str | Path) -> None:
    """Find out before long work whether a file could be written at its end."""
    path = Path(path)
    if path.is_dir():
        raise SnpatchError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SnpatchError(f"cannot write {path}: {error.strerror or error}") from error
