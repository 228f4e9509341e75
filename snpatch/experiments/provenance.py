"""Provenance: what a table depends on: fingerprints of the models, prompt sets, judges and rankings that were used.

Why each use is recorded, and not each opening: experiments share what is open, and a table must say the same whatever
ran before it.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from snpatch.data import Dataset
from snpatch.experiments.seen_prompts import SetOverlap
from snpatch.op import ops
from snpatch.ranking.ranking import Ranking
from snpatch.report.report import Report
from snpatch.utils.environment import describe_environment


class FingerprintSource(Protocol):
    """An engine, or the properties that a replica reported about its own engine."""

    @property
    def backend(self) -> str:
        """Name of the backend."""
        ...

    def fingerprint(self, model: str, /) -> str:
        """Return the fingerprint of a model."""
        ...


class Provenance:
    """Provenance of one run, from its start on. `facts` hold for all of it."""

    def __init__(self, **facts: object) -> None:
        self._started, self._facts = time.monotonic(), facts
        self._backend: str | None = None
        self._used: dict[str, dict] = {"adapters": {}, "models": {}, "sets": {}, "judges": {}, "rankings": {}}
        self._overlaps: dict[str, SetOverlap] = {}

    def model(self, engine: FingerprintSource, name: str, adapters: object = ()) -> None:
        """Record a model. adapters: their sources, as the user wrote them."""
        self._backend = engine.backend
        self._used["models"][name] = engine.fingerprint(name)
        self._used["adapters"][name] = adapters

    def set(self, name: str, data: Dataset) -> None:
        """Record a prompt set, or a text."""
        self._used["sets"][name] = data.provenance

    def overlap(self, overlap: SetOverlap) -> None:
        """Record the overlap of an evaluation set with seen prompts."""
        self._overlaps[overlap.name] = overlap

    def judge(self, name: str, arguments: Mapping[str, object]) -> None:
        """Record a judge with the arguments that it was opened with."""
        self._used["judges"][name] = dict(arguments)

    def ranking(self, name: str, ranking: Ranking) -> None:
        """Record a ranking with its own provenance."""
        self._used["rankings"][name] = ranking.provenance

    def complete(self, report: Report, settings: Mapping[str, object]) -> Report:
        """Return a report with this provenance, and with notes about prompts that overlap with seen ones."""
        notes = [note for overlap in self._overlaps.values() for note in overlap.notes]
        return replace(report, provenance=self.to_dict(settings), notes=[*report.notes, *notes])

    def to_dict(self, settings: Mapping[str, object]) -> dict:
        """Return everything as JSON data, sorted by name, with the seconds since the start."""
        used = {kind: dict(sorted(entries.items())) for kind, entries in self._used.items()}
        seconds = round(time.monotonic() - self._started, 1)
        return {
            "settings": dict(settings),
            **self._facts,
            "backend": self._backend,
            **used,
            "overlaps": {name: overlap.to_dict() for name, overlap in sorted(self._overlaps.items())},
            **describe_environment(ops.implementations()),
            "seconds": seconds,
        }
