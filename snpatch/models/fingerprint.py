"""Content hashes of checkpoints, adapters and tokenizers; file hashes are cached with path, size, time and inode.

Why files are hashed and not sums of the weights: floating-point sums differ between devices, so equal weights would
get different fingerprints, and weights that an engine has packed cannot be summed at all.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.models.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    TOKENIZER_PATTERNS,
    WEIGHT_PATTERNS,
    find_adapter_weights,
    find_weight_files,
)
from snpatch.models.hub import resolve_adapter_folder, resolve_model_folder
from snpatch.utils.files import write_text
from snpatch.utils.hashing import hash_bytes, hash_file, hash_json

CACHE_FILE = "digests.json"
SHA256_DIGITS = 64


def fingerprint_checkpoint(model: str | Path, has_weights: bool = True) -> str:
    """Return the content hash of a checkpoint: of its weight files and its config.

    It does not depend on the folder's path or on the files' times. Files are read in parallel, as fast as the disk and
    SHA-256 allow (1.8 GB/s and core where the CPU has instructions for it). A file with the same path, size and time as
    a hashed one is not read again (3 ms).

    Args:
        model: Folder or hub name.
        has_weights: False hashes the config alone, for weights that are drawn at random.
    """
    folder = resolve_model_folder(model, has_weights)
    files = [*(_require_weight_files(folder) if has_weights else ()), folder / CONFIG_FILE]
    cache = _FileHashCache()
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        hashes = list(pool.map(cache.hash_file, files))
    cache.save()
    return _hash_lines(sorted(f"{file.name} {content_hash}" for file, content_hash in zip(files, hashes, strict=True)))


def fingerprint_adapter(adapter: str | Path) -> str:
    """Return the content hash of a PEFT adapter: of its tensors' file and its config."""
    folder = resolve_adapter_folder(adapter)
    cache = _FileHashCache()
    return _hash_lines([cache.hash_file(file) for file in (find_adapter_weights(folder), folder / ADAPTER_CONFIG_FILE)])


def fingerprint_tokenizer(tokenizer) -> str:
    """Return the content hash of everything that determines a tokenizer's ids.

    Its chat template does not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [type(tokenizer).__name__, tokenizer.all_special_tokens]
    parts += [backend.to_str()] if backend is not None else [sorted(tokenizer.get_vocab().items())]
    return hash_json(parts)


def fingerprint_tokenizer_files(folder: str | Path) -> str:
    """Return the content hash of the files of a folder's tokenizer and chat template."""
    files = sorted(path for pattern in TOKENIZER_PATTERNS for path in Path(folder).glob(pattern))
    cache = _FileHashCache()
    lines = [f"{file.name} {cache.hash_file(file)}" for file in files]
    cache.save()
    return _hash_lines(lines)


def _hash_lines(lines: list[str]) -> str:
    return hash_bytes("\n".join(lines).encode(errors="surrogateescape"))


def _require_weight_files(folder: Path) -> list[Path]:
    if files := find_weight_files(folder)[1]:
        return files
    raise SnpatchError(f"cannot load {folder}: it holds no weights ({', '.join(WEIGHT_PATTERNS)})")


class _FileHashCache:
    """SHA-256 of files, stored in the user's cache folder. A cache that cannot be read or written only costs time."""

    def __init__(self) -> None:
        self._path = _cache_path()
        self._new: dict[str, list] = {}
        try:
            stored = None if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            stored = None
        self._stored: dict[str, list] = stored if isinstance(stored, dict) else {}

    def hash_file(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file, from the cache if its path, size, time and inode are the same."""
        try:
            key, status = str(path.resolve(strict=True)), path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            entry = self._stored.get(key)
            if not isinstance(entry, list) or entry[:-1] != stamp or not isinstance(entry[-1], str):
                entry = self._new[key] = [*stamp, hash_file(path, SHA256_DIGITS)]
        except OSError as error:
            raise SnpatchError(f"cannot read {path}: {error.strerror or error}") from error
        return entry[-1]

    def save(self) -> None:
        """Write the new hashes, and drop those of files that no longer exist."""
        if not self._new or self._path is None:
            return
        entries = {key: entry for key, entry in (self._stored | self._new).items() if Path(key).exists()}
        try:
            write_text(self._path, json.dumps(entries, indent=0))
        except SnpatchError:
            return  # the next start reads the weights again


def _cache_path() -> Path | None:
    """Return the path of the cache; None for a user without a home folder, as in some containers."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "snpatch" / CACHE_FILE
    try:
        return Path.home() / ".cache" / "snpatch" / CACHE_FILE
    except RuntimeError:
        return None
