"""Uploads: rankings and constants that clients have sent, in a folder that outlives the server.

Files are named by their SHA-256, and an index maps clients' names to them, so that no client's name becomes a path.
Only safetensors are read, because nothing in them can run.

A crash loses no name, and leaves only files that the next start removes: a file is written before the index refers to
it, and removed once the index no longer does. Only DELETE removes the file first, because a full disk has no space for
the index. A name without its file is skipped until a client deletes or replaces it.
"""

import fcntl
import hashlib
import json
import logging
import re
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.patching.patch import Constant
from snpatch.ranking.ranking import Ranking
from snpatch.server.errors import InternalError, NameConflictError, PayloadTooLargeError
from snpatch.server.registry import PatchRegistry, check_served_name, describe, load_ranking
from snpatch.utils.files import atomic_write, check_writable, is_safetensors, open_regular, write_text

LOADERS = {"rankings": load_ranking, "constants": Constant.load}
MAX_UPLOADED_NAMES = 64  # rankings and constants together
BYTES_PER_NEURON, HEADER_BYTES = 96, 1 << 20  # of a ranking's file: rank, scores, moments and statistics take 72 bytes
MAX_INDEX_BYTES = 1 << 20
INDEX_FILE, LOCK_FILE = "index.json", ".lock"
DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
OWN_FILE_PATTERN = re.compile(
    r"(?P<digest>[0-9a-f]{64})\.safetensors|\.([0-9a-f]{64}\.safetensors|index\.json)\.partial\d+"
)

logger = logging.getLogger(__name__)
Index = dict[str, dict[str, str]]  # kind -> name -> digest


class Uploads:
    """Uploads in one folder, which one server uses at a time. Names in it from earlier servers are registered again."""

    def __init__(self, folder: str | Path, registry: PatchRegistry) -> None:
        self._folder, self._registry = Path(folder).absolute(), registry
        self._index_path = self._folder / INDEX_FILE
        check_writable(self._index_path)
        self._lock_file = self._lock_folder()
        self._reserved = {kind: frozenset(getattr(registry, kind)) for kind in LOADERS}  # names of the server's config
        self._index, is_complete = self._read_index()
        if is_complete:
            self._remove_strays()
        for kind, digests in self._index.items():
            for name, digest in digests.items():
                self._register(kind, name, digest)

    @property
    def max_file_bytes(self) -> int:
        """Maximum size of an uploaded file."""
        geometry = self._registry.engine.geometry
        return BYTES_PER_NEURON * geometry.n_layers * geometry.n_neurons + HEADER_BYTES

    def check_name(self, kind: str, name: str) -> None:
        """Raise for a name that cannot be uploaded to."""
        check_served_name(name, f"one of the {kind}")
        if name in self._reserved[kind]:
            raise NameConflictError(f"{kind}: {name} is set by the server's config. Choose another name.", field="name")
        if name not in self._index[kind] and sum(map(len, self._index.values())) >= MAX_UPLOADED_NAMES:
            raise PayloadTooLargeError(
                f"uploads: expected at most {MAX_UPLOADED_NAMES} rankings and constants, got one more. Delete some "
                "first."
            )

    def upload(self, kind: str, name: str, body: bytes) -> dict:
        """Store a file's content under a name and return its description. A refused upload leaves no file."""
        self.check_name(kind, name)  # again, because other uploads may have finished since the route checked it
        return self.assign_name(kind, name, *self.store_file(kind, name, body))

    def store_file(self, kind: str, name: str, body: bytes) -> tuple[str, Ranking | Constant]:
        """Check and write a file's content, without a name in the index.

        Return its digest and the value it holds.
        """
        digest = hashlib.sha256(body).hexdigest()
        try:
            with atomic_write(self._file(digest)) as partial:
                partial.write_bytes(body)
                value = self._load(kind, name, partial)  # before the file gets its final path
        except SnpatchError as error:
            self._remove_file(digest)  # if the file got its path but may not be on the disk
            if error.field is None:
                raise InternalError(f"upload: cannot be stored: {self._without_folder(error)}") from error
            raise
        describe(value)  # computes and caches the value's fingerprint
        return digest, value

    def assign_name(self, kind: str, name: str, digest: str, value: Ranking | Constant) -> dict:
        """Let a name refer to a stored file and return its description.

        The file it referred to before is removed.
        """
        old_digest = self._index[kind].get(name)
        try:
            self.check_name(kind, name)
            self._write_index({**self._index, kind: {**self._index[kind], name: digest}})
        except SnpatchError:
            self._remove_file(digest)
            raise
        self._registry.add(kind, name, value)
        self._remove_file(old_digest)
        return {"name": name, **describe(value)}

    def delete(self, kind: str, name: str) -> bool:
        """Delete a name and return whether it existed. Running requests keep what it named."""
        if name in self._reserved[kind]:
            raise NameConflictError(f"{kind}: {name} is set by the server's config; it cannot be deleted", field="name")
        if name not in self._index[kind]:
            return False
        if name in getattr(self._registry, kind):
            self._registry.remove(kind, name)
        index = {**self._index, kind: {n: digest for n, digest in self._index[kind].items() if n != name}}
        self._remove_file(self._index[kind][name], index)
        self._write_index(index)
        return True

    def _register(self, kind: str, name: str, digest: str) -> None:
        """Register a name of the index; skip it if its file is not as it was stored."""
        path = self._file(digest)
        try:
            if name in self._reserved[kind]:
                raise SnpatchError(f"{name} is also set by the server's config")
            content = _read_content(path, self.max_file_bytes)
            if hashlib.sha256(content).hexdigest() != digest:
                raise SnpatchError(f"expected content with this SHA-256, got {len(content)} other bytes")
            self._registry.add(kind, name, self._load(kind, name, path))
        except (SnpatchError, OSError) as error:
            logger.warning(f"snpatch: {path}: {kind}: {name} is skipped: {_reason(error)}")

    def _load(self, kind: str, name: str, path: Path) -> Ranking | Constant:
        try:
            if not is_safetensors(path):
                raise SnpatchError(f"{path}: expected a safetensors file that {kind[:-1].title()}.save wrote")
            value = LOADERS[kind](path)
            self._registry.check_value(kind, name, value)
        except SnpatchError as error:  # the client knows the file by its name only
            raise SnpatchError(str(error).replace(str(path), name), field="body") from error
        except Exception as error:  # because a file may hold tensors of any type and shape
            message = f"{name}: expected the tensors of a {kind[:-1]}, got {first_line(error)}"
            raise SnpatchError(message, field="body") from error
        return value

    def _remove_file(self, digest: str | None, index: Index | None = None) -> None:
        """Remove the file of a digest that no name refers to. index: default is the current one."""
        digests_by_kind = (self._index if index is None else index).values()
        if digest is not None and not any(digest in digests.values() for digests in digests_by_kind):
            try:
                self._file(digest).unlink(missing_ok=True)
            except OSError as error:
                raise InternalError(f"upload: cannot be removed: {_reason(error)}") from error

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _write_index(self, index: Index) -> None:
        try:
            write_text(self._index_path, json.dumps(index, indent=1) + "\n")
        except SnpatchError as error:
            message = f"uploads: the index cannot be written: {self._without_folder(error)}"
            raise InternalError(message) from error
        self._index = index

    def _without_folder(self, error: SnpatchError) -> str:
        """Return a message that does not name the folder, which is not for clients."""
        return str(error).replace(f"{self._folder}/", "")

    def _read_index(self) -> tuple[Index, bool]:
        """Return the index, and whether every entry of its file was valid."""
        index: Index = {kind: {} for kind in LOADERS}
        try:
            table = json.loads(_read_content(self._index_path, MAX_INDEX_BYTES))
            if not isinstance(table, dict):
                raise SnpatchError(f"a {type(table).__name__}")
        except FileNotFoundError:
            return index, True
        except (OSError, ValueError, RecursionError, SnpatchError) as error:
            message = f"expected the names of uploads as JSON, got {_reason(error)}. No upload is served."
            logger.warning(f"snpatch: {self._index_path}: {message}")
            return index, False
        is_complete = True
        for kind in LOADERS:
            entries = table.get(kind, {})
            for name, digest in entries.items() if isinstance(entries, dict) else [("", entries)]:
                try:
                    check_served_name(name, f"one of the {kind}")
                    if not isinstance(digest, str) or not DIGEST_PATTERN.fullmatch(digest):
                        raise SnpatchError(f"expected a SHA-256 of 64 digits, got {str(digest)[:80]!r}")
                    index[kind][name] = digest
                except SnpatchError as error:
                    is_complete = False
                    logger.warning(f"snpatch: {self._index_path}: {kind}: {name[:80]!r} is skipped: {error}")
        return index, is_complete

    def _remove_strays(self) -> None:
        """Remove the files of interrupted uploads and of servers that were killed."""
        digests = {digest for entries in self._index.values() for digest in entries.values()}
        for path in self._folder.iterdir():
            match = OWN_FILE_PATTERN.fullmatch(path.name)
            if match and match["digest"] not in digests:
                try:
                    path.unlink()
                except OSError as error:
                    logger.warning(
                        f"snpatch: {path}: no upload refers to this file, and it cannot be removed: {_reason(error)}"
                    )

    def _lock_folder(self):
        """Return the locked file that keeps other servers out, because they would remove this server's files."""
        path = self._folder / LOCK_FILE
        try:
            file = path.open("a")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            message = f"{self._folder}: expected an upload folder of this server alone, got one of another server"
            raise SnpatchError(f"{message}. Stop the other server, or choose another folder.") from error
        except OSError as error:
            raise SnpatchError(f"{path}: cannot be locked: {_reason(error)}") from error
        return file


def _read_content(path: Path, max_bytes: int) -> bytes:
    with open(path, "rb", opener=open_regular) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise SnpatchError(f"expected at most {max_bytes} bytes, got more")
    return content


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
