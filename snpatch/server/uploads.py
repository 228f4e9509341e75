"""Uploads: the rankings and constants that clients have sent, in a folder that outlives the server.

Files go by their content's digest and names by an index beside them, so that no name of a client's becomes a path.
Only safetensors are read: nothing in them can be run.
"""

import hashlib
import json
from pathlib import Path

from snpatch.errors import SnpatchError, first_line
from snpatch.files import check_writable, whole_file, write_text
from snpatch.patching.patch import Constant
from snpatch.ranking.ranking import Ranking
from snpatch.server.catalogue import Catalogue, check_name, named_ranking, told_of
from snpatch.server.errors import FaultError, TakenError, TooMuchError

KINDS = {"rankings": named_ranking, "constants": Constant.load}
MOST = 64  # names of all kinds
BYTES_A_NEURON, HEADER = 96, 1 << 20  # of a ranking's file: rank, scores, moments and statistics take 72


class Uploads:
    """Of one folder. What lies there from before can be named again."""

    def __init__(self, folder: str | Path, catalogue: Catalogue) -> None:
        self._folder, self._catalogue = Path(folder), catalogue
        self._index = self._folder / "index.json"
        check_writable(self._index)
        self._own = {kind: frozenset(getattr(catalogue, kind)) for kind in KINDS}  # not to be replaced
        self._names: dict[str, dict[str, str]] = self._read()
        for kind, named in self._names.items():
            for name, digest in named.items():
                if name in self._own[kind]:
                    raise SnpatchError(f"{self._index}: {kind}: {name} is also among the server's own")
                catalogue.add(kind, name, KINDS[kind](self._file(digest)))

    @property
    def limit(self) -> int:
        """Most bytes of a file."""
        geometry = self._catalogue.engine.geometry
        return BYTES_A_NEURON * geometry.n_layers * geometry.n_neurons + HEADER

    def check(self, kind: str, name: str) -> None:
        """An error for a name that cannot be uploaded to."""
        check_name(name, f"one of the {kind}")
        if name in self._own[kind]:
            raise TakenError(f"{kind}: {name} is the server's own", field="name")
        if name not in self._names[kind] and sum(map(len, self._names.values())) >= MOST:
            raise TooMuchError(f"{MOST} rankings and constants are kept: delete some first")

    def store(self, kind: str, name: str, body: bytes) -> tuple[str, Ranking | Constant]:
        """Write a file's content, read and checked: its digest, and what it holds. Nothing names it yet."""
        digest = hashlib.sha256(body).hexdigest()
        try:
            with whole_file(self._file(digest)) as partial:
                partial.write_bytes(body)
                one = self._loaded(kind, name, partial)  # before it has its place
        except SnpatchError as error:
            if error.field is None:
                raise FaultError(f"the upload cannot be kept: {error}") from error
            raise
        told_of(one)  # which hashes it
        return digest, one

    def put(self, kind: str, name: str, digest: str, one: Ranking | Constant) -> dict:
        """Name what was stored, and tell it; what had the name before goes."""
        self.check(kind, name)
        before = self._names[kind].get(name)
        self._write({**self._names, kind: {**self._names[kind], name: digest}})
        self._catalogue.add(kind, name, one)
        self._forget(before)
        return {"name": name, **told_of(one)}

    def delete(self, kind: str, name: str) -> bool:
        """Whether there was one. What runs goes on with it."""
        if name in self._own[kind]:
            raise TakenError(f"{kind}: {name} is the server's own", field="name")
        before = self._names[kind].get(name)
        if before is None:
            return False
        self._write({**self._names, kind: {n: one for n, one in self._names[kind].items() if n != name}})
        self._catalogue.remove(kind, name)
        self._forget(before)
        return True

    def _loaded(self, kind: str, name: str, path: Path) -> Ranking | Constant:
        try:
            one = KINDS[kind](path)
            self._catalogue.check(kind, name, one)
        except SnpatchError as error:  # the client knows it by another name
            raise SnpatchError(str(error).replace(str(path), name), field="body") from error
        except Exception as error:  # a file may hold tensors of any type and shape
            raise SnpatchError(f"{name}: holds what no {kind[:-1]} does: {first_line(error)}", field="body") from error
        return one

    def _forget(self, digest: str | None) -> None:
        """Remove what no name has any more."""
        if digest is not None and not any(digest in named.values() for named in self._names.values()):
            self._file(digest).unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _write(self, names: dict[str, dict[str, str]]) -> None:
        try:
            write_text(self._index, json.dumps(names, indent=1) + "\n")
        except SnpatchError as error:
            raise FaultError(f"the names of uploads cannot be kept: {error}") from error
        self._names = names

    def _read(self) -> dict[str, dict[str, str]]:
        if not self._index.is_file():
            return {kind: {} for kind in KINDS}
        try:
            return {kind: dict(json.loads(self._index.read_text(encoding="utf-8"))[kind]) for kind in KINDS}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SnpatchError(f"{self._index}: cannot be read: {error}") from error
