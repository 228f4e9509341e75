"""Ids for adapters, rankings and constants: what is sent to the workers once so that requests carry integers only.

A bank has as many rows as the engine was started with. A row whose content no unfinished request uses is given away,
the one that was unused for longest first. Handles are never used twice, so a stale one is an error in the worker and
never another request's ranking.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError

Write = tuple[str, int, int, dict[str, Tensor]]  # kind, handle, row, tensors: the arguments of the worker's command


@dataclass(eq=False)
class Bank:
    """The rows [first, first + size) of one kind; `limit` is the engine's argument that sets how many."""

    kind: str
    first: int
    size: int
    limit: str
    _entries: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (handle, row), longest unused first
    _users: Counter = field(default_factory=Counter)
    _next: int = 1

    def take(self, wanted: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, int], dict[str, Write]]:
        """Key -> handle of everything wanted, and key -> write for what has to be written before it is used.

        Until `give_back` their rows are not given away. More than the bank has room for is an error that takes
        nothing.
        """
        fresh = [key for key in wanted if key not in self._entries]
        spare = [key for key in self._entries if key not in self._users and key not in wanted]
        if len(fresh) > self.size - len(self._entries) + len(spare):
            raise SnpatchError(
                f"more than {self.size} {self.kind}s are in use at once: start the engine with a larger {self.limit}, "
                "or run fewer of them in one call"
            )
        self._users.update(wanted.keys())
        writes = {}
        for key, tensors in wanted.items():
            if key in self._entries:
                self._entries[key] = self._entries.pop(key)  # the last that would be given away
                continue
            row = self._free_row() if len(self._entries) < self.size else self._entries.pop(spare.pop(0))[1]
            self._entries[key] = self._next, row
            writes[key] = self.kind, self._next, row, tensors
            self._next += 1
        return {key: self._entries[key][0] for key in wanted}, writes

    def give_back(self, keys: Iterable[str]) -> None:
        self._users.subtract(list(keys))
        self._users += Counter()  # drops those without users

    def forget(self, keys: Iterable[str]) -> None:
        """Drop what could not be written."""
        for key in keys:
            self._entries.pop(key, None)

    def _free_row(self) -> int:
        used = {row for _, row in self._entries.values()}
        return next(row for row in range(self.first, self.first + self.size) if row not in used)
