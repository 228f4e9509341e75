"""Rows for adapters, rankings, constants and statistics: what the workers are sent once, so that requests are integers.

A bank has as many rows as the engine was started with. A row whose content no unfinished request uses is given away,
the one that was unused for longest first. Handles are never used twice, so a stale one is an error in the worker and
never another request's ranking.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.executors.base import Request
from snpatch.executors.request_rows import SlotIndex, collect_resources
from snpatch.executors.vllm.rpc import pack
from snpatch.executors.vllm.settings import DualStreamSettings

Write = tuple[str, int, int, dict[str, Tensor]]  # kind, handle, row, tensors: the arguments of the worker's command


@dataclass(eq=False)
class SlotPool:
    """The rows [first, first + size) of one kind; `limit` is the engine's argument that sets how many."""

    kind: str
    first: int
    size: int
    limit: str
    _entries: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (handle, row), longest unused first
    _users: Counter = field(default_factory=Counter)
    _next: int = 1

    def check_size(self, n: int) -> None:
        """An error for more at once than there are rows: waiting would not help."""
        if n > self.size:
            raise SnpatchError(
                f"a request needs {n} {self.kind}s at once, and there is room for {self.size}: start the engine with "
                f"a larger {self.limit}"
            )

    def has_room(self, wanted: Mapping[str, dict[str, Tensor]]) -> bool:
        """Whether all that is wanted has a row or can get one now."""
        fresh = sum(key not in self._entries for key in wanted)
        return fresh <= self.size - len(self._entries) + len(self._spare(wanted))

    def acquire(self, wanted: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, int], dict[str, Write]]:
        """Key -> handle of everything wanted, and key -> write for what has to be written before it is used.

        Until `release` their rows are not given away. To be called where there is room.
        """
        spare = self._spare(wanted)
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

    def release(self, keys: Iterable[str]) -> None:
        self._users.subtract(list(keys))
        self._users += Counter()  # drops those without users

    def forget(self, keys: Iterable[str]) -> None:
        """Drop what could not be written."""
        for key in keys:
            self._entries.pop(key, None)

    @property
    def in_use(self) -> int:
        """How many of its rows unfinished requests use."""
        return len(self._users)

    def _spare(self, wanted: Mapping) -> list[str]:
        return [key for key in self._entries if key not in self._users and key not in wanted]

    def _free_row(self) -> int:
        used = {row for _, row in self._entries.values()}
        return next(row for row in range(self.first, self.first + self.size) if row not in used)


@dataclass(eq=False)
class SlotLease:
    """What an unfinished request keeps. writes: arguments of each snpatch_write that the workers need before it."""

    places: SlotIndex
    writes: list[tuple]
    _banks: list[tuple[SlotPool, list[str], list[str]]]  # bank, keys, those of them that have to be written
    _is_written: bool = False

    def mark_written(self) -> None:
        """The workers have it all."""
        self._is_written = True

    def release(self) -> None:
        """The request is over; what never reached the workers is forgotten."""
        for bank, keys, fresh in self._banks:
            bank.release(keys)
            if not self._is_written:
                bank.forget(fresh)
        self._banks = []


class SlotAllocator:
    """All rows of one engine."""

    def __init__(self, settings: DualStreamSettings) -> None:
        self._settings = settings
        self._banks = {
            "models": SlotPool("adapter", 1, settings.max_adapters - 1, "max_adapters"),
            "rankings": SlotPool("ranking", 0, settings.max_rankings, "max_rankings"),
            "constants": SlotPool("constant", 1, settings.max_constants, "max_constants"),
        }
        self._free_groups = list(range(settings.max_groups))

    def check_request(self, request: Request) -> None:
        """An error for what this engine has no room for, however long a request waits."""
        if self._settings.streams == 1 and request.streams == 2:
            raise SnpatchError("this engine runs one stream: a donor model needs streams=2")
        if len(request.overwrites) > self._settings.max_clauses:
            raise SnpatchError(
                f"a patch of {len(request.overwrites)} clauses: start the engine with a larger max_clauses "
                f"({self._settings.max_clauses})"
            )
        sets = [model.weights for model in (request.recipient, request.donor) if model is not None]
        is_on_one = self._settings.has_secondary and len(sets) == 2 and sets[0].index == sets[1].index
        if is_on_one and not self._settings.supports_row_routing:
            raise SnpatchError(
                f"both models of this request are on the weights of {sets[0].name}, and an engine with a second set of "
                "weights runs one set in each stream where it is compiled: start it with enforce_eager=True, or start "
                "an engine of these weights alone"
            )
        if request.capture and request.capture.k > self._settings.max_captured:
            raise SnpatchError(
                f"a capture of {request.capture.k} neurons: start the engine with a larger max_captured "
                f"({self._settings.max_captured})"
            )
        named = collect_resources(request)
        for name, bank in self._banks.items():
            bank.check_size(len(getattr(named, name)))

    def acquire(self, request: Request, group: int = -1) -> SlotLease | None:
        """Hold what a request names; None while unfinished requests hold too much. group: of its statistics."""
        named = collect_resources(request)
        wanted = {
            "models": {key: model.scales.vectors for key, model in named.models.items()},
            "rankings": {key: {"rank": ranking.rank} for key, ranking in named.rankings.items()},
            "constants": {key: {"values": values} for key, values in named.constants.items()},
        }
        if not all([bank.has_room(wanted[name]) for name, bank in self._banks.items()]):
            return None
        held, writes, handles = [], [], {}
        for name, bank in self._banks.items():
            handles[name], fresh = bank.acquire(wanted[name])
            held.append((bank, list(wanted[name]), list(fresh)))
            writes += [(*place, {n: pack(t) for n, t in tensors.items()}) for *place, tensors in fresh.values()]
        return SlotLease(SlotIndex(**handles, group=group), writes, held, _is_written=not writes)

    def acquire_group(self) -> int:
        """A statistics group, to be emptied before it is used."""
        if not self._free_groups:
            raise SnpatchError("all statistics groups are in use: start the engine with a larger max_groups")
        return self._free_groups.pop()

    def release_group(self, group: int) -> None:
        self._free_groups.append(group)

    @property
    def in_use(self) -> dict[str, int]:
        """Rows that unfinished requests use, and groups of statistics, by kind."""
        rows = {bank.kind: bank.in_use for bank in self._banks.values()}
        return {**rows, "group": self._settings.max_groups - len(self._free_groups)}
