"""Steps that run once: a step is done while the content hashes of its inputs and outputs are unchanged.

Inputs are recorded after a step has run, because an experiment finds out while it runs which models, datasets and
judges it needs, and only a change of those should make it run again. Their hashes are those from before the run.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.utils.files import write_text
from snpatch.utils.hashing import hash_file, hash_json

STEPS_FILE = "steps.json"
ARCHIVE = "replaced"  # folder of outputs that were replaced


@dataclass(frozen=True)
class StepResult:
    """Names of the inputs that a step has read, and the files and folders that it has written."""

    inputs: Iterable[str]
    outputs: Iterable[Path]


@dataclass(frozen=True)
class Step:
    """A named part of a reproduction.

    Args:
        name: Unique name.
        run: Does the work.
        command: Equivalent command, for display.
        inputs: Names of inputs that are known before the run.
        folder: Folder that is written piece by piece; an interrupted run resumes in it if its inputs are the same.
    """

    name: str
    run: Callable[[], StepResult]
    command: str
    inputs: tuple[str, ...] = ()
    folder: Path | None = None


class Steps:
    """The steps of one folder in order, and the record of their runs.

    Args:
        out: Folder of the reproduction.
        steps: Steps in the order in which they run.
        fingerprint: Returns the content hash of an input by its name.
    """

    def __init__(self, out: Path, steps: Sequence[Step], fingerprint: Callable[[str], str]) -> None:
        self.out, self._fingerprint = out, fingerprint
        self.steps = {step.name: step for step in steps}
        self._records = _read_records(out / STEPS_FILE)

    def reason(self, name: str) -> str | None:
        """Return why a step has to run; None if it is done."""
        record = self._records.get(name)
        if record is None:
            return "not run yet"
        if "outputs" not in record:
            return "interrupted"
        for path, fingerprint in record["outputs"].items():
            if fingerprint_path(self.out / path) != fingerprint:
                return f"output {path} was modified"
        for input_name, fingerprint in record["inputs"].items():
            try:
                current = self._fingerprint(input_name)
            except SnpatchError as error:
                return f"input {input_name}: {error}"
            if current != fingerprint:
                return f"input {input_name} changed"
        return None

    def known_inputs(self, name: str) -> list[str]:
        """Return the inputs of a step, as far as they are known."""
        return [*self.steps[name].inputs, *self._records.get(name, {}).get("inputs", {})]

    def seconds(self, name: str) -> float | None:
        """Return how long the last run of a step took."""
        return self._records.get(name, {}).get("seconds")

    def run(self, name: str) -> None:
        """Run a step, done or not, and record its inputs and outputs. Archive its previous outputs."""
        step, record = self.steps[name], self._records.get(name)
        started_with = {input_name: self._fingerprint(input_name) for input_name in step.inputs}
        if record is not None and ("outputs" in record or record["started_with"] != started_with):
            self.archive(name)
        self._store(name, {"started_with": started_with})
        start = time.monotonic()
        result = step.run()
        if changed := [key for key in step.inputs if self._fingerprint(key) != started_with[key]]:
            raise SnpatchError(f"input {changed[0]} changed while {name} ran. Run it again")
        inputs = {input_name: self._fingerprint(input_name) for input_name in sorted({*step.inputs, *result.inputs})}
        outputs = {str(path.relative_to(self.out)): fingerprint_path(path) for path in sorted(result.outputs)}
        seconds = round(time.monotonic() - start, 1)
        self._store(name, {"started_with": started_with, "inputs": inputs, "outputs": outputs, "seconds": seconds})

    @property
    def outdated_steps(self) -> list[str]:
        """Return the steps whose outputs exist but would be different now."""
        finished = [name for name in self.steps if "outputs" in self._records.get(name, {})]
        return [name for name in finished if self.reason(name) is not None]

    @property
    def orphaned_steps(self) -> list[str]:
        """Return the steps that have run in this folder and are not part of the preset any more."""
        return [name for name in self._records if name not in self.steps]

    def archive(self, name: str, extra: Sequence[Path] = ()) -> None:
        """Move a step's outputs (and extra files) to `replaced/NAME-N`, and forget its run."""
        outputs = [self.out / path for path in self._records.get(name, {}).get("outputs", {})]
        folder = self.steps[name].folder if name in self.steps else None
        candidates: list[Path] = [*outputs, *extra, *([folder] if folder else [])]
        paths = [path for path in dict.fromkeys(candidates) if path.exists()]
        if folder is not None:
            paths = [path for path in paths if folder not in path.parents]
        number = 1
        while (archive := self.out / ARCHIVE / f"{name}-{number}").exists():
            number += 1
        for path in paths:
            target = archive / path.relative_to(self.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        self._records.pop(name, None)
        self._save()

    def _store(self, name: str, record: dict) -> None:
        self._records[name] = record
        self._save()

    def _save(self) -> None:
        write_text(self.out / STEPS_FILE, json.dumps(self._records, indent=1) + "\n")


def fingerprint_path(path: Path) -> str:
    """Return the content hash of a file, or of a folder's files; "" if there is none."""
    if path.is_file():
        return hash_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return hash_json([[str(p.relative_to(path)), fingerprint_path(p)] for p in files]) if files else ""


def _read_records(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SnpatchError(f"{path}: expected JSON: {error}. Remove it to run all steps again") from error
    is_valid = isinstance(records, dict) and all(
        isinstance(record, dict) and "started_with" in record for record in records.values()
    )
    if not is_valid:
        raise SnpatchError(f"{path}: expected an object of steps by name. Remove it to run all steps again")
    return records
