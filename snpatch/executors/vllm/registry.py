"""Ids for adapters, rankings and constants: what is sent to the workers once so that requests carry integers only.

A bank has as many rows as the engine was started with. A row whose content no unfinished request uses is given away,
the one that was unused for longest first. Handles are never used twice, so a stale one is an error in the worker and
never another request's ranking.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError

Write = Callable[[str, int, int, dict[str, Tensor]], None]  # kind, handle, row, tensors


@dataclass(eq=False)
class Bank:
    """The rows [first, first + size) of one kind; `limit` is the engine's argument that sets how many."""

    kind: str
    first: int
    size: int
    limit: str
    write: Write
    _entries: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (handle, row), longest unused first
    _users: Counter = field(default_factory=Counter)
    _next: int = 1

    @contextmanager
    def holding(self, wanted: Mapping[str, dict[str, Tensor]]) -> Iterable[dict[str, int]]:
        """key -> handle of everything wanted; while the context lasts their rows are not given away."""
        self._users.update(wanted.keys())
        try:
            yield {key: self._handle(key, tensors) for key, tensors in wanted.items()}
        finally:
            self._users.subtract(wanted.keys())
            self._users += Counter()  # drops those without users

    def _handle(self, key: str, tensors: dict[str, Tensor]) -> int:
        if key in self._entries:
            self._entries[key] = self._entries.pop(key)  # now the last that would be given away
            return self._entries[key][0]
        handle, self._next = self._next, self._next + 1
        row = self._free_row()
        self.write(self.kind, handle, row, tensors)
        self._entries[key] = handle, row
        return handle

    def _free_row(self) -> int:
        if len(self._entries) < self.size:
            used = {row for _, row in self._entries.values()}
            return next(row for row in range(self.first, self.first + self.size) if row not in used)
        unused = next((key for key in self._entries if key not in self._users), None)
        if unused is None:
            raise SnpatchError(
                f"more than {self.size} {self.kind}s are in use at once: start the engine with a larger {self.limit}, "
                "or run fewer of them in one call"
            )
        return self._entries.pop(unused)[1]
