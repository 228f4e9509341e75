"""Provenance: what a table hangs on: the models, sets, judges and rankings that were used for it, each by content.

Why it is noted at every use and not where something is opened: experiments share what is open, and a table must say the
same whatever ran before it.
"""

import time
from collections.abc import Mapping

from snpatch.data import Dataset
from snpatch.engine import Engine
from snpatch.op import ops
from snpatch.ranking.ranking import Ranking
from snpatch.utils.environment import describe_environment


class Provenance:
    """Of one run, which begins with it and notes here whatever it uses. facts: what holds for all of it."""

    def __init__(self, **facts: object) -> None:
        self._started, self._facts = time.monotonic(), facts
        self._backend: str | None = None
        self._used: dict[str, dict] = {"adapters": {}, "models": {}, "sets": {}, "judges": {}, "rankings": {}}

    def model(self, engine: Engine, name: str, adapters: object = ()) -> None:
        """A recipient, a donor or a model that is read. adapters: where they come from, as the user wrote it."""
        self._backend = engine.backend
        self._used["models"][name] = engine.fingerprint(name)
        self._used["adapters"][name] = adapters

    def set(self, name: str, data: Dataset) -> None:
        """A set of prompts, or a text."""
        self._used["sets"][name] = data.provenance

    def judge(self, name: str, arguments: Mapping[str, object]) -> None:
        """arguments: what it was opened with, its source among them."""
        self._used["judges"][name] = dict(arguments)

    def ranking(self, name: str, ranking: Ranking) -> None:
        """A ranking, with what it was made of."""
        self._used["rankings"][name] = ranking.provenance

    def told(self, settings: Mapping[str, object]) -> dict:
        """All of it as JSON data, sorted by name; seconds: since it began."""
        used = {kind: dict(sorted(entries.items())) for kind, entries in self._used.items()}
        seconds = round(time.monotonic() - self._started, 1)
        told = {
            "settings": dict(settings),
            **self._facts,
            "backend": self._backend,
            **used,
            **describe_environment(ops.implementations()),
        }
        return told | {"seconds": seconds}
