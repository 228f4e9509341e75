"""Slots on the device for adapters, rankings, constants and statistics, so that a request names them by integers.

Each kind has as many slots as the engine was started with. A slot is reassigned when no unfinished request uses it,
least recently used first. Handles are never reused, so a stale handle is an error in the worker and never another
request's ranking.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.executors.base import Request
from snpatch.executors.request_rows import SlotIndex, collect_resources
from snpatch.executors.vllm.engine_settings import DualStreamSettings
from snpatch.executors.vllm.rpc import pack

Write = tuple[str, int, int, dict[str, Tensor]]  # kind, handle, slot, tensors: the arguments of snpatch_write


@dataclass(eq=False)
class SlotPool:
    """Slots [first, first + size) of one kind. limit: the engine argument that sets `size`."""

    kind: str
    first: int
    size: int
    limit: str
    _entries: dict[str, tuple[int, int]] = field(default_factory=dict)  # key -> (handle, slot), least recent first
    _users: Counter = field(default_factory=Counter)
    _next_handle: int = 1

    def check_size(self, n: int) -> None:
        """Raise if a request needs more slots at once than there are, because waiting would not help."""
        if n > self.size:
            raise SnpatchError(
                f"a request needs {n} {self.kind}s at once, and the engine has slots for {self.size}: start the engine "
                f"with a larger {self.limit}"
            )

    def has_room(self, requested: Mapping[str, dict[str, Tensor]]) -> bool:
        """Return whether every requested key has a slot or can get one now."""
        num_new = sum(key not in self._entries for key in requested)
        return num_new <= self.size - len(self._entries) + len(self._unused(requested))

    def acquire(self, requested: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, int], dict[str, Write]]:
        """Reserve slots until `release`; call only if `has_room`.

        Returns:
            Key -> handle of everything requested, and key -> write that has to be done before its first use.
        """
        unused = self._unused(requested)
        self._users.update(requested.keys())
        writes = {}
        for key, tensors in requested.items():
            if key in self._entries:
                self._entries[key] = self._entries.pop(key)  # now the most recently used
                continue
            slot = self._free_slot() if len(self._entries) < self.size else self._entries.pop(unused.pop(0))[1]
            self._entries[key] = self._next_handle, slot
            writes[key] = self.kind, self._next_handle, slot, tensors
            self._next_handle += 1
        return {key: self._entries[key][0] for key in requested}, writes

    def release(self, keys: Iterable[str]) -> None:
        """End one use of each key."""
        self._users.subtract(list(keys))
        self._users += Counter()  # drops keys without users

    def forget(self, keys: Iterable[str]) -> None:
        """Drop keys that the workers were not sent."""
        for key in keys:
            self._entries.pop(key, None)

    @property
    def num_in_use(self) -> int:
        """Number of slots that unfinished requests use."""
        return len(self._users)

    def _unused(self, requested: Mapping) -> list[str]:
        return [key for key in self._entries if key not in self._users and key not in requested]

    def _free_slot(self) -> int:
        used = {slot for _, slot in self._entries.values()}
        return next(slot for slot in range(self.first, self.first + self.size) if slot not in used)


@dataclass(eq=False)
class SlotLease:
    """Slots that an unfinished request uses. writes: arguments of each snpatch_write that must precede the request."""

    slots: SlotIndex
    writes: list[tuple]
    _uses: list[tuple[SlotPool, list[str], list[str]]]  # pool, keys, those of them that have to be written
    _is_written: bool = False

    def mark_written(self) -> None:
        """Note that all writes have reached the workers."""
        self._is_written = True

    def release(self) -> None:
        """Release the slots, and forget what never reached the workers."""
        for pool, keys, unwritten in self._uses:
            pool.release(keys)
            if not self._is_written:
                pool.forget(unwritten)
        self._uses = []


class SlotAllocator:
    """All slots of one engine."""

    def __init__(self, settings: DualStreamSettings) -> None:
        self._settings = settings
        self._pools = {
            "models": SlotPool("adapter", 1, settings.max_adapters - 1, "max_adapters"),
            "rankings": SlotPool("ranking", 0, settings.max_rankings, "max_rankings"),
            "constants": SlotPool("constant", 1, settings.max_constants, "max_constants"),
        }
        self._free_groups = list(range(settings.max_groups))

    def check_request(self, request: Request) -> None:
        """Raise for a request that this engine can never run, however long it waits."""
        if self._settings.streams == 1 and request.streams == 2:
            raise SnpatchError("this engine runs one stream: a donor model needs streams=2")
        if len(request.overwrites) > self._settings.max_interventions:
            raise SnpatchError(
                f"a patch of {len(request.overwrites)} interventions: start the engine with a larger max_interventions "
                f"({self._settings.max_interventions})"
            )
        weights = [model.weights for model in (request.recipient, request.donor) if model is not None]
        is_on_one = self._settings.has_secondary and len(weights) == 2 and weights[0].index == weights[1].index
        if is_on_one and not self._settings.supports_row_routing:
            raise SnpatchError(
                f"recipient and donor of this request both use the weights of {weights[0].name}, and a compiled engine "
                "with secondary weights runs one set of weights in each stream: start it with enforce_eager=True, or "
                "start an engine of these weights alone"
            )
        if request.capture and request.capture.k > self._settings.max_captured:
            raise SnpatchError(
                f"a capture of {request.capture.k} neurons: start the engine with a larger max_captured "
                f"({self._settings.max_captured})"
            )
        resources = collect_resources(request)
        for name, pool in self._pools.items():
            pool.check_size(len(getattr(resources, name)))

    def acquire(self, request: Request, group: int = -1) -> SlotLease | None:
        """Reserve slots for what a request names; None while unfinished requests use too many.

        group: statistics group of the request, -1 for none.
        """
        resources = collect_resources(request)
        requested = {
            "models": {key: model.scales.vectors for key, model in resources.models.items()},
            "rankings": {key: {"rank": ranking.rank} for key, ranking in resources.rankings.items()},
            "constants": {key: {"values": values} for key, values in resources.constants.items()},
        }
        if not all([pool.has_room(requested[name]) for name, pool in self._pools.items()]):
            return None
        uses, writes, handles = [], [], {}
        for name, pool in self._pools.items():
            handles[name], new_writes = pool.acquire(requested[name])
            uses.append((pool, list(requested[name]), list(new_writes)))
            writes += [(*head, {n: pack(t) for n, t in tensors.items()}) for *head, tensors in new_writes.values()]
        return SlotLease(SlotIndex(**handles, group=group), writes, uses, _is_written=not writes)

    def acquire_group(self) -> int:
        """Reserve a statistics group, which the caller clears before its use."""
        if not self._free_groups:
            raise SnpatchError("all statistics groups are in use: start the engine with a larger max_groups")
        return self._free_groups.pop()

    def release_group(self, group: int) -> None:
        """Free a statistics group; its sums remain on the device until the next user clears them."""
        self._free_groups.append(group)

    @property
    def num_in_use(self) -> dict[str, int]:
        """Number of slots that unfinished requests use, by kind, and of statistics groups."""
        used = {pool.kind: pool.num_in_use for pool in self._pools.values()}
        return {**used, "group": self._settings.max_groups - len(self._free_groups)}
