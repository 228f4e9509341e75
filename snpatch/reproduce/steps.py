"""Steps that are done once: which of them are done is told by the content of what they read and of what they made.

Why what a step reads is noted after it has run: an experiment finds out on its way which models, sets and judges it
needs, and only their change should make it run again. (Their content is the one that was found before; see Inputs.)
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.utils.files import write_text

FILE = "steps.json"
REPLACED = "replaced"  # where what a step had made goes when it is made anew
DIGITS = 16


@dataclass(frozen=True)
class Done:
    """What a step read, by the names that the pipeline has for it, and the files and folders that it made."""

    read: Iterable[str]
    made: Iterable[Path]


@dataclass(frozen=True)
class Step:
    """run: does it. reads: what is known beforehand to be read. folder: what it makes piece by piece, and goes on with
    after a kill if it still reads the same. command: what runs, for people."""

    name: str
    run: Callable[[], Done]
    command: str
    reads: tuple[str, ...] = ()
    folder: Path | None = None


class Steps:
    """The steps of one folder, in their order. digest: name of something that is read -> its content as a text."""

    def __init__(self, out: Path, steps: Sequence[Step], digest: Callable[[str], str]) -> None:
        self.out, self._digest = out, digest
        self.steps = {step.name: step for step in steps}
        self._kept = _read(out / FILE)

    def reason(self, name: str) -> str | None:
        """Why a step has to run; None: it is done."""
        kept = self._kept.get(name)
        if kept is None or "made" not in kept:
            return "begun" if kept else "not run yet"
        for path, digest in kept["made"].items():
            if digest_of(self.out / path) != digest:
                return f"{path} is not what it made"
        for one, digest in kept["read"].items():
            try:
                now = self._digest(one)
            except SnpatchError as error:
                return f"{one}: {error}"
            if now != digest:
                return f"{one} is another"
        return None

    def read_by(self, name: str) -> list[str]:
        """What a step reads, as far as it is known."""
        return [*self.steps[name].reads, *self._kept.get(name, {}).get("read", {})]

    def seconds(self, name: str) -> float | None:
        """How long a step took that is done."""
        return self._kept.get(name, {}).get("seconds")

    def run(self, name: str) -> None:
        """Run a step, done or not, and note what it read and made. What it had made before is put away."""
        step, kept = self.steps[name], self._kept.get(name)
        begun = {one: self._digest(one) for one in step.reads}
        if kept is not None and ("made" in kept or kept["begun"] != begun):
            self.put_away(name)
        self._note(name, {"begun": begun})
        start = time.monotonic()
        done = step.run()
        if other := [one for one in step.reads if self._digest(one) != begun[one]]:
            raise SnpatchError(f"{other[0]} was changed while {name} ran: run it again")
        read = {one: self._digest(one) for one in sorted({*step.reads, *done.read})}
        made = {str(path.relative_to(self.out)): digest_of(path) for path in sorted(done.made)}
        seconds = round(time.monotonic() - start, 1)
        self._note(name, {"begun": begun, "read": read, "made": made, "seconds": seconds})

    @property
    def stale(self) -> list[str]:
        """Steps whose results lie here and are not those that they would have now."""
        return [name for name in self.steps if "made" in self._kept.get(name, {}) and self.reason(name) is not None]

    def put_away(self, name: str, further: Sequence[Path] = ()) -> None:
        """Move what a step made (and further files) to a folder beside, and forget that it was run."""
        paths = [self.out / path for path in self._kept.get(name, {}).get("made", {})]
        folder = self.steps[name].folder if name in self.steps else None
        paths = [path for path in dict.fromkeys([*paths, *further, *([folder] if folder else [])]) if path.exists()]
        if folder is not None:
            paths = [path for path in paths if folder not in path.parents]
        number = 1
        while (to := self.out / REPLACED / f"{name}-{number}").exists():
            number += 1
        for path in paths:
            place = to / path.relative_to(self.out)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        self._kept.pop(name, None)
        self._save()

    @property
    def strangers(self) -> list[str]:
        """Steps that were run in this folder and that there are not now."""
        return [name for name in self._kept if name not in self.steps]

    def _note(self, name: str, kept: dict) -> None:
        self._kept[name] = kept
        self._save()

    def _save(self) -> None:
        write_text(self.out / FILE, json.dumps(self._kept, indent=1) + "\n")


def digest_of(path: Path) -> str:
    """Names a file by its bytes, and a folder by its files'; "" where there is none."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return short([[str(p.relative_to(path)), digest_of(p)] for p in files]) if files else ""


def short(data: object) -> str:
    """Names JSON data by its content."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SnpatchError(f"{path}: not JSON: {error}; remove it, and what is made will be made again") from error
    if not isinstance(kept, dict) or not all(isinstance(one, dict) and "begun" in one for one in kept.values()):
        raise SnpatchError(f"{path}: wanted steps by name; remove it, and what is made will be made again")
    return kept
