"""Uploads: the rankings and constants that clients have sent, in a folder that outlives the server.

Files go by their content's digest and names by an index beside them, so that no name of a client's becomes a path.
Only safetensors are read: nothing in them can be run.
"""

import hashlib
import json
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.files import check_writable, whole_file, write_text
from snpatch.patching.patch import Constant
from snpatch.ranking.ranking import Ranking
from snpatch.server.catalogue import Catalogue, check_name
from snpatch.server.errors import TakenError, TooMuchError

KINDS = {"rankings": Ranking, "constants": Constant}
MOST = 256  # names of all kinds
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
                catalogue.add(kind, name, KINDS[kind].load(self._file(digest)))

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

    def put(self, kind: str, name: str, body: bytes) -> dict:
        """Keep a file's content under a name, and tell it; one of the same name goes."""
        self.check(kind, name)
        digest = hashlib.sha256(body).hexdigest()
        with whole_file(self._file(digest)) as partial:
            partial.write_bytes(body)
            self._catalogue.add(kind, name, self._loaded(kind, name, partial))  # before it has its place
        before = self._names[kind].get(name)
        self._names[kind][name] = digest
        self._write()
        if before is not None:
            self._forget(before)
        return {"name": name, **self._catalogue.told_of(kind, name)}

    def delete(self, kind: str, name: str) -> bool:
        """Whether there was one. What runs goes on with it."""
        if name in self._own[kind]:
            raise TakenError(f"{kind}: {name} is the server's own", field="name")
        digest = self._names[kind].pop(name, None)
        if digest is None:
            return False
        self._catalogue.remove(kind, name)
        self._write()
        self._forget(digest)
        return True

    def _loaded(self, kind: str, name: str, path: Path) -> Ranking | Constant:
        try:
            return KINDS[kind].load(path)
        except SnpatchError as error:  # the client knows it by another name
            raise SnpatchError(str(error).replace(str(path), name), field="body") from error

    def _forget(self, digest: str) -> None:
        """Remove what no name has any more."""
        if not any(digest in named.values() for named in self._names.values()):
            self._file(digest).unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _write(self) -> None:
        write_text(self._index, json.dumps(self._names, indent=1) + "\n")

    def _read(self) -> dict[str, dict[str, str]]:
        if not self._index.is_file():
            return {kind: {} for kind in KINDS}
        try:
            return {kind: dict(json.loads(self._index.read_text(encoding="utf-8"))[kind]) for kind in KINDS}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SnpatchError(f"{self._index}: cannot be read: {error}") from error
