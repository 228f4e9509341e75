"""From requests to the plan of each step, and the record of what was planned and done for each of them.

A request brings a `ticket` and the row of the request table, both plain integers (`SamplingParams.extra_args`). The
feed knows neither scheduler nor model runner: runners.py tells it which requests came and went and what each step
runs. Records outlive their requests until the user's process fetches them: only then are receipts compared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray

from snpatch.errors import SnpatchError
from snpatch.executors.vllm.settings import KEY, SAME_WEIGHTS
from snpatch.executors.vllm.worker.banks import Banks
from snpatch.op.plan import (
    SKIP_EOS_OFFSET,
    PlanColumn,
    Receipt,
    RequestColumn,
    RequestRow,
    decode_group,
    fill_plan,
    num_request_interventions,
    plan_width,
    request_column,
    request_width,
)

UNFETCHED = 65536  # records kept for a user who never fetches them; the oldest are dropped beyond
OF_CLAUSE = {RequestColumn.RANKING: "ranking", RequestColumn.CONSTANT_ROW: "constant"}


@dataclass(eq=False)
class Record:
    """One request: its table row and what happened to it. seen: one past the last position that was run; planned:
    overwrites that its patch implied, each run counted; skipped: those of positions that came from the prefix cache."""

    ticket: int
    entries: NDArray[np.int32]
    row: int = -1  # of the table; -1 while it does not run
    computed_stop: int = 0
    planned: int = 0
    skipped: int = 0
    is_fetched: bool = False
    receipt: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Receipt), dtype=np.int64))
    captured: np.ndarray | None = None  # like the receipt: complete once their places were given back

    @property
    def captures(self) -> int:
        return int(self.entries[RequestColumn.CAPTURE_STOP] - self.entries[RequestColumn.CAPTURE_START])


@dataclass(eq=False)
class Feed:
    """The requests of one worker."""

    banks: Banks
    handles: dict[str, dict[int, int]] = field(
        default_factory=lambda: {"adapter": {0: 0}, "ranking": {0: 0}, "constant": {0: 0}}
    )  # kind -> handle -> row of its bank; a handle is never used twice

    def __post_init__(self) -> None:
        settings = self.banks.settings
        self._records: dict[str, Record] = {}  # by request id, running or not
        self._rows: dict[str, int] = {}  # request id -> row of the table, of those that run
        self._tickets: dict[int, list[str]] = {}
        self._ended: dict[str, None] = {}  # request ids that no longer run, in the order of their end
        entries = request_width(settings.max_clauses)
        self._table = np.zeros((256, entries), dtype=np.int32)
        self._kinds = {RequestColumn.ADAPTER_0: "adapter", RequestColumn.ADAPTER_1: "adapter"}
        for clause in range(settings.max_clauses):
            self._kinds |= {request_column(entry, clause): kind for entry, kind in OF_CLAUSE.items()}
        self._starts, self._stops = _places(entries)
        self._los, self._his = _places(entries, RequestColumn.LO, RequestColumn.HI)
        self._planned, self._skipped = np.zeros((2, 256), dtype=np.int64)
        self._may_skip = np.zeros(256, dtype=bool)  # rows whose next step may start behind the prefix cache
        self._free_rows = list(range(255, -1, -1))
        self._free_receipts = list(range(settings.max_receipts - 1, -1, -1))
        self._capture_used = np.zeros(settings.max_captures, dtype=bool)
        device = self.banks.device
        self._filled = 0  # rows of the plan that may hold something
        self.speaks = (True, False)  # whether each stream is the recipient's of some token of this step
        self.flipped: NDArray | None = None  # rows of this step that go through the other stream's set of weights
        self._on_one_set = np.zeros(256, dtype=bool)  # rows of the table whose two models are on one set of weights
        self._stage = _Stage(self.banks.plan) if device.type == "cuda" else None
        self._sampled_stage = _Stage(self.banks.sampled) if device.type == "cuda" else None
        self._sampled: int | None = None  # rows of the logits that this step samples from
        self._settles = 0  # tokens of this step, where some of them leave their groups if they end a text

    def add(self, request_id: str, extra_args: dict | None) -> None:
        """Start a request, or continue it after a preemption. Without our key it is not snpatch's."""
        ints = (extra_args or {}).get(KEY)
        if ints is None:
            return
        record = self._records.get(request_id)
        if record is None:
            record = self._new_record(request_id, ints)
        elif record.row >= 0:
            return
        elif not self._holds(record):
            self._take_places(record)  # they were given back while it was preempted
        self._ended.pop(request_id, None)
        if not self._free_rows:
            self._grow()
        record.row = row = self._rows[request_id] = self._free_rows.pop()
        self._table[row] = record.entries
        self._table[row, RequestColumn.COMPUTED_STOP] = record.computed_stop
        self._planned[row], self._skipped[row] = record.planned, record.skipped
        self._may_skip[row] = True
        self._on_one_set[row] = bool(extra_args.get(SAME_WEIGHTS))

    def resume(self, request_id: str) -> None:
        """A request that kept its row goes on after a preemption: what it had computed may be in the prefix cache."""
        if request_id in self._rows:
            self._may_skip[self._rows[request_id]] = True

    def remove(self, request_id: str) -> None:
        """A request ended or was preempted; its record stays."""
        record = self._records.get(request_id)
        if record is None or record.row < 0:
            return
        self._read_row(record)
        self._free_rows.append(self._rows.pop(request_id))
        record.row = -1
        self._ended[request_id] = None
        if record.is_fetched:
            self._forget(request_id)
        elif len(self._ended) > UNFETCHED:
            self._release([next(iter(self._ended))])
            self._forget(next(iter(self._ended)))

    def _new_record(self, request_id: str, ints: Sequence[int]) -> Record:
        try:
            row = RequestRow.unpack(ints, self._table.shape[1])
        except SnpatchError as error:
            raise SnpatchError(f"request {request_id}: {error}") from None
        record = Record(row.ticket, row.columns)
        for entry, kind in self._kinds.items():
            handle = int(record.entries[entry])
            if handle not in self.handles[kind]:
                raise SnpatchError(f"request {request_id}: no {kind} is registered under {handle} (any more)")
            record.entries[entry] = self.handles[kind][handle]
        group = decode_group(int(record.entries[RequestColumn.GROUP]))
        if not -1 <= group < self.banks.settings.max_groups:
            raise SnpatchError(f"request {request_id}: no statistics group {group}")
        self._take_places(record)
        self._records[request_id] = record
        self._tickets.setdefault(record.ticket, []).append(request_id)
        return record

    def _grow(self) -> None:
        n = len(self._table)
        self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        self._planned, self._skipped = (np.concatenate([a, np.zeros_like(a)]) for a in (self._planned, self._skipped))
        self._may_skip = np.concatenate([self._may_skip, np.zeros_like(self._may_skip)])
        self._on_one_set = np.concatenate([self._on_one_set, np.zeros_like(self._on_one_set)])
        self._free_rows = list(range(2 * n - 1, n - 1, -1))

    def _read_row(self, record: Record) -> None:
        record.planned, record.skipped = int(self._planned[record.row]), int(self._skipped[record.row])
        record.computed_stop = int(self._table[record.row, RequestColumn.COMPUTED_STOP])

    def step(self, request_ids: Sequence[str], start: NDArray, count: NDArray) -> None:
        """The plan of a step that runs `count` tokens of each request from position `start` on, in this order."""
        self._sampled, self._settles = None, 0
        if not self._rows and not self._filled:
            self.speaks, self.flipped = (True, False), None
            return
        rows = np.fromiter(map(self._rows.get, request_ids, repeat(-1)), dtype=np.int64, count=len(request_ids))
        start, count = np.asarray(start, dtype=np.int64), np.asarray(count, dtype=np.int64)
        stop = start + count
        if count.max(initial=1) == 1:
            request, position = rows, start
        else:
            request = np.repeat(rows, count)
            position = np.arange(len(request)) + np.repeat(start - (count.cumsum() - count), count)
        known = rows >= 0
        self._write_sampled(np.where(known, self._table[rows, RequestColumn.RECEIPT], -1))
        plan = fill_plan(self._table, request, position)
        if self.banks.settings.has_secondary:
            self._flip(request, plan[:, PlanColumn.RECIPIENT_STREAM])
            self.speaks = (
                not plan[:, PlanColumn.RECIPIENT_STREAM].all(),
                bool(plan[:, PlanColumn.RECIPIENT_STREAM].any()),
            )
        self._write(plan, bool(known.any()))
        if not known.all():
            rows, start, stop = rows[known], start[known], stop[known]
        own, seen = self._table[rows], self._table[rows, RequestColumn.COMPUTED_STOP]
        if (own[:, RequestColumn.GROUP] >= SKIP_EOS_OFFSET).any():
            self._settles = len(plan)
        width = own[:, self._his] - own[:, self._los]
        patch_start, patch_stop = own[:, self._starts], own[:, self._stops]

        def implied(first: NDArray, last: NDArray) -> NDArray:
            """Overwrites of each request at positions [first, last), of all its clauses."""
            here = np.minimum(last[:, None], patch_stop) - np.maximum(first[:, None], patch_start)
            return (np.maximum(here, 0) * width).sum(axis=1)

        self._planned[rows] += implied(start, stop)
        if self._may_skip[rows].any():
            self._skipped[rows] += np.where(self._may_skip[rows], implied(seen, start), 0)
            self._may_skip[rows] = False
        self._table[rows, RequestColumn.COMPUTED_STOP] = np.maximum(seen, stop)

    def settle(self, ids: torch.Tensor) -> None:
        """Finish the plan of a step whose tokens [T or more] are on the device now."""
        if self._settles:
            self.banks.settle_groups(ids[: self._settles])

    def _flip(self, request: NDArray, speaker: NDArray) -> None:
        """The donors' rows of this step's tokens whose donor is on the recipient's set of weights."""
        flips = self._on_one_set[np.maximum(request, 0)] & (request >= 0)
        token = np.flatnonzero(flips)
        self.flipped = 2 * token + 1 - speaker[token] if len(token) else None

    def clear(self) -> None:
        """Run a step without requests: nothing of the last one may be left in the plan."""
        self._sampled, self._settles = None, 0
        self.speaks, self.flipped = (True, False), None
        if self._filled:
            self._write(np.zeros((0, plan_width(self.banks.settings.max_clauses)), dtype=np.int32), False)

    def _write(self, plan: NDArray[np.int32], asks: bool) -> None:
        """Copy the rows of this step, and clear what the last one left behind them. asks: for anything at all."""
        n, self._filled = max(len(plan), self._filled), len(plan) if asks else 0
        if n > len(plan):
            rest = np.zeros((n - len(plan), plan.shape[1]), dtype=np.int32)
            rest[:, PlanColumn.GROUP : len(PlanColumn)] = -1
            plan = np.concatenate([plan, rest])
        _copy(plan, self.banks.plan, self._stage)

    def _write_sampled(self, slots: NDArray[np.int32]) -> None:
        """Note the receipt of each request of this step, in the order of its logits."""
        self._sampled = len(slots)
        _copy(slots, self.banks.sampled, self._sampled_stage)

    def take_sampled(self) -> torch.Tensor | None:
        """Return the receipts [n] int32 of the rows of this step's logits; None once they were taken.

        A step computes the logits that it samples from first, then those of prompts.
        """
        n, self._sampled = self._sampled, None
        return None if n is None else self.banks.sampled[:n]

    def fetch(self, tickets: Iterable[int]) -> list[list[dict]]:
        """For each ticket its requests' records as data; their places are free afterwards.

        A request that still runs (a step may have been scheduled before its end was known) keeps its row to its end,
        so that what it writes into the KV cache is of its own patch; it only counts no more.
        """
        ids = [self._tickets.pop(ticket, []) for ticket in tickets]
        for record in (self._records[i] for group in ids for i in group):
            if record.row >= 0:
                self._read_row(record)
                self._table[record.row, RequestColumn.RECEIPT] = -1
                self._table[record.row, [RequestColumn.OBSERVE_STOP, RequestColumn.CAPTURE_STOP]] = 0
        self._release([i for group in ids for i in group])
        found = [[_as_data(self._records[i]) for i in group] for group in ids]
        for request_id in (i for group in ids for i in group):
            self._records[request_id].is_fetched = True
            if self._records[request_id].row < 0:
                self._forget(request_id)
        return found

    def _release(self, request_ids: Sequence[str]) -> None:
        """Read receipts and captures off the device, in two copies for all, and give their places back."""
        records = [self._records[i] for i in request_ids]
        receipts = [r for r in records if r.entries[RequestColumn.RECEIPT] >= 0]
        if receipts:
            places = [int(r.entries[RequestColumn.RECEIPT]) for r in receipts]
            for record, receipt in zip(receipts, self.banks.receipt[places].cpu().numpy(), strict=True):
                record.receipt[:2] += receipt[:2]
                record.receipt[Receipt.LAYER] = max(record.receipt[Receipt.LAYER], receipt[Receipt.LAYER])
                record.entries[RequestColumn.RECEIPT] = -1
            self.banks.receipt[places] = 0
            self._free_receipts += places
        captures = [r for r in records if r.captures and r.entries[RequestColumn.CAPTURE] >= 0]
        if captures:
            spans = [(int(r.entries[RequestColumn.CAPTURE]), r.captures) for r in captures]
            places = [row for first, n in spans for row in range(first, first + n)]
            values = self.banks.capture[places].cpu().numpy()
            for record, part in zip(captures, np.split(values, np.cumsum([n for _, n in spans])[:-1]), strict=True):
                earlier = record.captured
                record.captured = part if earlier is None else np.where(np.isnan(earlier), part, earlier)
                record.entries[RequestColumn.CAPTURE] = -1
            self.banks.capture[places] = torch.nan
            self._capture_used[places] = False

    def _forget(self, request_id: str) -> None:
        record = self._records.pop(request_id)
        self._ended.pop(request_id, None)
        ids = self._tickets.get(record.ticket, [])
        if request_id in ids:
            ids.remove(request_id)
        if not ids:
            self._tickets.pop(record.ticket, None)

    def _holds(self, record: Record) -> bool:
        """Return whether it has the places that it needs on the device."""
        entries = record.entries
        return entries[RequestColumn.RECEIPT] >= 0 and (not record.captures or entries[RequestColumn.CAPTURE] >= 0)

    def _take_places(self, record: Record) -> None:
        record.entries[RequestColumn.RECEIPT] = self._take_receipt()
        record.entries[RequestColumn.CAPTURE] = self._take_captures(record.captures) if record.captures else -1

    def _take_receipt(self) -> int:
        if not self._free_receipts:
            self._release(list(self._ended))
        if not self._free_receipts:
            raise SnpatchError(f"more than {self.banks.settings.max_receipts} requests: raise max_receipts")
        return self._free_receipts.pop()

    def _take_captures(self, n: int) -> int:
        for _ in range(2):
            free = np.flatnonzero(~self._capture_used)
            if n <= len(free):
                runs = np.flatnonzero(free[n - 1 :] - free[: len(free) - n + 1] == n - 1)
                if len(runs):
                    first = int(free[runs[0]])
                    self._capture_used[first : first + n] = True
                    return first
            self._release(list(self._ended))
        raise SnpatchError(f"no room to capture {n} more positions: raise max_captures ({len(self._capture_used)})")


def _places(
    entries: int, first: RequestColumn = RequestColumn.PATCH_START, second: RequestColumn = RequestColumn.PATCH_STOP
) -> tuple[list, list]:
    """Where each clause has two entries, in a table of so many columns."""
    clauses = range(num_request_interventions(entries))
    return [request_column(first, clause) for clause in clauses], [request_column(second, clause) for clause in clauses]


def _copy(rows: NDArray[np.int32], target: torch.Tensor, stage: "_Stage | None") -> None:
    """Copy rows to the first ones of a tensor on the device. stage: of a GPU."""
    if stage is None:
        target[: len(rows)].numpy()[:] = rows
    else:
        stage.copy(rows)


class _Stage:
    """Pinned host buffers that a step's integers are copied from: one is used again only when its copy is over."""

    def __init__(self, target: torch.Tensor, depth: int = 4) -> None:
        self._target, self._next = target, 0
        self._buffers = [torch.empty_like(target, device="cpu", pin_memory=True) for _ in range(depth)]
        self._events = [torch.cuda.Event() for _ in range(depth)]

    def copy(self, rows: NDArray[np.int32]) -> None:
        buffer, event = self._buffers[self._next], self._events[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        event.synchronize()
        buffer.numpy()[: len(rows)] = rows
        self._target[: len(rows)].copy_(buffer[: len(rows)], non_blocking=True)
        event.record()


def _as_data(record: Record) -> dict:
    return {
        "computed_stop": record.computed_stop,
        "planned": record.planned,
        "skipped": record.skipped,
        **{f.name.lower(): int(value) for f, value in zip(Receipt, record.receipt, strict=True)},
        "captured": record.captured,
    }
