"""Uploads: the rankings and constants that clients have sent, in a folder that outlives the server.

Files go by their content's digest and names by an index beside them, so that no name of a client's becomes a path.
Only safetensors are read: nothing in them can be run.

A crash loses no name, and leaves nothing that the next start does not remove: a file is written before the index names
it, and is removed once no index names it. DELETE alone removes the file first, because a full disk has no room for the
index; a name without its file is left out until a client deletes or replaces it.
"""

import fcntl
import hashlib
import json
import re
import sys
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.files import check_writable, open_regular, whole_file, write_text
from snpatch.patching.patch import Constant
from snpatch.ranking.ranking import Ranking
from snpatch.server.errors import InternalError, NameConflictError, PayloadTooLargeError
from snpatch.server.registry import PatchRegistry, check_name, named_ranking, told_of

KINDS = {"rankings": named_ranking, "constants": Constant.load}
MOST = 64  # names of all kinds
BYTES_A_NEURON, HEADER = 96, 1 << 20  # of a ranking's file: rank, scores, moments and statistics take 72
INDEX_BYTES = 1 << 20
INDEX, LOCK = "index.json", ".lock"
DIGEST = re.compile(r"[0-9a-f]{64}")
OWN_FILE = re.compile(r"(?P<digest>[0-9a-f]{64})\.safetensors|\.([0-9a-f]{64}\.safetensors|index\.json)\.partial\d+")

Names = dict[str, dict[str, str]]  # kind -> name -> digest


class Uploads:
    """Of one folder, which one server uses at a time. What lies there from before can be named again."""

    def __init__(self, folder: str | Path, catalogue: PatchRegistry) -> None:
        self._folder, self._catalogue = Path(folder).absolute(), catalogue
        self._index = self._folder / INDEX
        check_writable(self._index)
        self._lock = self._locked()
        self._own = {kind: frozenset(getattr(catalogue, kind)) for kind in KINDS}  # not to be replaced
        self._names, is_whole = self._read()
        if is_whole:
            self._remove_strays()
        for kind, named in self._names.items():
            for name, digest in named.items():
                self._open(kind, name, digest)

    @property
    def limit(self) -> int:
        """Most bytes of a file."""
        geometry = self._catalogue.engine.geometry
        return BYTES_A_NEURON * geometry.n_layers * geometry.n_neurons + HEADER

    def check(self, kind: str, name: str) -> None:
        """An error for a name that cannot be uploaded to."""
        check_name(name, f"one of the {kind}")
        if name in self._own[kind]:
            raise NameConflictError(f"{kind}: {name} is the server's own", field="name")
        if name not in self._names[kind] and sum(map(len, self._names.values())) >= MOST:
            raise PayloadTooLargeError(f"{MOST} rankings and constants are kept: delete some first")

    def keep(self, kind: str, name: str, body: bytes) -> dict:
        """Store a file's content under a name, and return what it is. A refused one leaves nothing."""
        self.check(kind, name)  # others may have been kept since the name was checked first
        return self.put(kind, name, *self.store(kind, name, body))

    def store(self, kind: str, name: str, body: bytes) -> tuple[str, Ranking | Constant]:
        """Write a file's content, read and checked: its digest, and what it holds. Nothing names it yet."""
        digest = hashlib.sha256(body).hexdigest()
        try:
            with whole_file(self._file(digest)) as partial:
                partial.write_bytes(body)
                one = self._loaded(kind, name, partial)  # before it has its place
        except SnpatchError as error:
            self._forget(digest)  # where its place was taken, but is not on the disk for sure
            if error.field is None:
                raise InternalError(f"the upload cannot be kept: {self._without_folder(error)}") from error
            raise
        told_of(one)  # which hashes it
        return digest, one

    def put(self, kind: str, name: str, digest: str, one: Ranking | Constant) -> dict:
        """Name what was stored, and tell it; what had the name before goes."""
        before = self._names[kind].get(name)
        try:
            self.check(kind, name)
            self._write({**self._names, kind: {**self._names[kind], name: digest}})
        except SnpatchError:
            self._forget(digest)
            raise
        self._catalogue.add(kind, name, one)
        self._forget(before)
        return {"name": name, **told_of(one)}

    def delete(self, kind: str, name: str) -> bool:
        """Whether there was one. What runs goes on with it."""
        if name in self._own[kind]:
            raise NameConflictError(f"{kind}: {name} is the server's own", field="name")
        if name not in self._names[kind]:
            return False
        if name in getattr(self._catalogue, kind):
            self._catalogue.remove(kind, name)
        names = {**self._names, kind: {n: digest for n, digest in self._names[kind].items() if n != name}}
        self._forget(self._names[kind][name], names)
        self._write(names)
        return True

    def _open(self, kind: str, name: str, digest: str) -> None:
        """Let clients name a file of the index; one that is not as it was stored is left out."""
        path = self._file(digest)
        try:
            if name in self._own[kind]:
                raise SnpatchError(f"{name} is also among the server's own")
            content = _content(path, self.limit)
            if hashlib.sha256(content).hexdigest() != digest:
                raise SnpatchError(f"expected the content of this digest, got {len(content)} bytes of another")
            self._catalogue.add(kind, name, self._loaded(kind, name, path))
        except (SnpatchError, OSError) as error:
            _warn(f"{path}: {kind}: {name} is left out: {_reason(error)}")

    def _loaded(self, kind: str, name: str, path: Path) -> Ranking | Constant:
        try:
            one = KINDS[kind](path)
            self._catalogue.check(kind, name, one)
        except SnpatchError as error:  # the client knows it by another name
            raise SnpatchError(str(error).replace(str(path), name), field="body") from error
        except Exception as error:  # a file may hold tensors of any type and shape
            raise SnpatchError(f"{name}: holds what no {kind[:-1]} does: {first_line(error)}", field="body") from error
        return one

    def _forget(self, digest: str | None, names: Names | None = None) -> None:
        """Remove the file of a digest that no name has. names: of the index, or of the next one."""
        named = (self._names if names is None else names).values()
        if digest is not None and not any(digest in one.values() for one in named):
            try:
                self._file(digest).unlink(missing_ok=True)
            except OSError as error:
                raise InternalError(f"the upload cannot be removed: {_reason(error)}") from error

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _write(self, names: Names) -> None:
        try:
            write_text(self._index, json.dumps(names, indent=1) + "\n")
        except SnpatchError as error:
            message = f"the names of uploads cannot be kept: {self._without_folder(error)}"
            raise InternalError(message) from error
        self._names = names

    def _without_folder(self, error: SnpatchError) -> str:
        """Return a message for clients, who need not know where the folder is."""
        return str(error).replace(f"{self._folder}/", "")

    def _read(self) -> tuple[Names, bool]:
        """Return the names of the index, and whether that is all that it holds."""
        names: Names = {kind: {} for kind in KINDS}
        try:
            table = json.loads(_content(self._index, INDEX_BYTES))
            if not isinstance(table, dict):
                raise SnpatchError(f"a {type(table).__name__}")
        except FileNotFoundError:
            return names, True
        except (OSError, ValueError, RecursionError, SnpatchError) as error:
            _warn(f"{self._index}: expected the names of uploads as JSON, got {_reason(error)}; none is served")
            return names, False
        is_whole = True
        for kind in KINDS:
            entries = table.get(kind, {})
            for name, digest in entries.items() if isinstance(entries, dict) else [("", entries)]:
                try:
                    check_name(name, f"one of the {kind}")
                    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                        raise SnpatchError(f"expected a digest of 64 letters, got {str(digest)[:80]!r}")
                    names[kind][name] = digest
                except SnpatchError as error:
                    is_whole = False
                    _warn(f"{self._index}: {kind}: {name[:80]!r} is left out: {error}")
        return names, is_whole

    def _remove_strays(self) -> None:
        """Remove what uploads that were interrupted, and a server that was killed, have left."""
        named = {digest for digests in self._names.values() for digest in digests.values()}
        for path in self._folder.iterdir():
            found = OWN_FILE.fullmatch(path.name)
            if found and found["digest"] not in named:
                try:
                    path.unlink()
                except OSError as error:
                    _warn(f"{path}: no upload has this name, and it cannot be removed: {_reason(error)}")

    def _locked(self):
        """Return the file that keeps other servers off the folder: they would remove what this one stores."""
        path = self._folder / LOCK
        try:
            file = path.open("a")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            message = f"{self._folder}: expected a folder of uploads of this server alone, got one that another uses"
            raise SnpatchError(f"{message}. Stop the other server, or choose another folder.") from error
        except OSError as error:
            raise SnpatchError(f"{path}: cannot be locked: {_reason(error)}") from error
        return file


def _content(path: Path, limit: int) -> bytes:
    with open(path, "rb", opener=open_regular) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise SnpatchError(f"expected at most {limit} bytes, got more")
    return content


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def _warn(message: str) -> None:
    print(f"snpatch: {message}", file=sys.stderr, flush=True)
