"""Requests of one worker: their rows of the request table, their slots on the device, and their records.

A request brings a `ticket` and its row of the request table as integers (`SamplingParams.extra_args`). Records outlive
their requests until the client process fetches them, because receipts are compared only then.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from snpatch.errors import SnpatchError
from snpatch.executors.vllm.engine_settings import KEY, SAME_WEIGHTS
from snpatch.executors.vllm.worker.op_tables import OpTables
from snpatch.op.plan import (
    ReceiptColumn,
    RequestColumn,
    RequestRow,
    decode_group,
    num_request_interventions,
    request_column,
    request_width,
)

MAX_UNFETCHED = 65536  # records of ended requests; beyond it the oldest are dropped, for a client that never fetches
NUM_ROWS = 256  # of the request table at first; it doubles when it is full
# Columns of each intervention that hold a handle, and the handle's kind.
HANDLE_COLUMNS = {RequestColumn.RANKING: "ranking", RequestColumn.CONSTANT_ROW: "constant"}


@dataclass(eq=False)
class Record:
    """Row and results of one request.

    computed_stop: end of the computed positions. planned: overwrites that its patch implies for every position that was
    run, repetitions included. skipped: the same for positions that came from the prefix cache.
    """

    ticket: int
    entries: NDArray[np.int32]
    row: int = -1  # of the request table; -1 while the request does not run
    computed_stop: int = 0
    planned: int = 0
    skipped: int = 0
    is_fetched: bool = False
    receipt: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(ReceiptColumn), dtype=np.int64))
    captured: np.ndarray | None = None  # like the receipt, complete after the record's slots are released

    @property
    def num_captures(self) -> int:
        """Return the number of positions to capture, each of which takes a row of `OpTables.capture`."""
        return int(self.entries[RequestColumn.CAPTURE_STOP] - self.entries[RequestColumn.CAPTURE_START])

    def to_dict(self) -> dict:
        """Return the data for the client process."""
        return {
            "computed_stop": self.computed_stop,
            "planned": self.planned,
            "skipped": self.skipped,
            **{f.name.lower(): int(value) for f, value in zip(ReceiptColumn, self.receipt, strict=True)},
            "captured": self.captured,
        }


class RequestTracker:
    """Requests of one worker.

    table: [rows, columns] int32, the request table. same_weights: [rows] bool, whether recipient and donor use the same
    one of two sets of weights. handles: kind -> handle -> row of its table on the device; handles are never reused.
    """

    def __init__(self, tables: OpTables) -> None:
        settings = tables.settings
        self.tables = tables
        self.handles: dict[str, dict[int, int]] = {"adapter": {0: 0}, "ranking": {0: 0}, "constant": {0: 0}}
        num_columns = request_width(settings.max_interventions)
        self.table = np.zeros((NUM_ROWS, num_columns), dtype=np.int32)
        self.same_weights = np.zeros(NUM_ROWS, dtype=bool)
        self._records: dict[str, Record] = {}  # request id -> record, running or not
        self._rows: dict[str, int] = {}  # request id -> row of the table, of running requests
        self._tickets: dict[int, list[str]] = {}
        self._ended: dict[str, None] = {}  # ids of requests that no longer run, in the order of their end
        self._planned, self._skipped = np.zeros((2, NUM_ROWS), dtype=np.int64)
        self._may_skip = np.zeros(NUM_ROWS, dtype=bool)  # rows whose next step may start after cached positions
        self._free_rows = list(range(NUM_ROWS - 1, -1, -1))
        self._free_receipts = list(range(settings.max_receipts - 1, -1, -1))
        self._capture_used = np.zeros(settings.max_captures, dtype=bool)
        self._handle_kinds = {RequestColumn.ADAPTER_0: "adapter", RequestColumn.ADAPTER_1: "adapter"}
        for i in range(settings.max_interventions):
            self._handle_kinds |= {request_column(column, i): kind for column, kind in HANDLE_COLUMNS.items()}
        self._starts, self._stops = _columns(num_columns, RequestColumn.PATCH_START, RequestColumn.PATCH_STOP)
        self._los, self._his = _columns(num_columns, RequestColumn.LO, RequestColumn.HI)

    @property
    def num_running(self) -> int:
        """Return the number of requests that have a row of the table; ended ones have only a record."""
        return len(self._rows)

    @property
    def num_receipts(self) -> int:
        """Number of receipts in use on the device."""
        return self.tables.settings.max_receipts - len(self._free_receipts)

    def add(self, request_id: str, extra_args: dict | None) -> None:
        """Start a request, or continue it after a preemption; ignore requests without snpatch's key."""
        if extra_args is None or (ints := extra_args.get(KEY)) is None:
            return
        record = self._records.get(request_id)
        if record is None:
            record = self._new_record(request_id, ints)
        elif record.row >= 0:
            return
        elif not self._has_slots(record):
            self._take_slots(record)  # they were released while it was preempted
        self._ended.pop(request_id, None)
        if not self._free_rows:
            self._grow()
        record.row = row = self._rows[request_id] = self._free_rows.pop()
        self.table[row] = record.entries
        self.table[row, RequestColumn.COMPUTED_STOP] = record.computed_stop
        self._planned[row], self._skipped[row] = record.planned, record.skipped
        self._may_skip[row] = True
        self.same_weights[row] = bool(extra_args.get(SAME_WEIGHTS))

    def resume(self, request_id: str) -> None:
        """Continue a preempted request that kept its row: its computed positions may be in the prefix cache."""
        if request_id in self._rows:
            self._may_skip[self._rows[request_id]] = True

    def remove(self, request_id: str) -> None:
        """End or preempt a request; its record stays."""
        record = self._records.get(request_id)
        if record is None or record.row < 0:
            return
        self._read_row(record)
        self._free_rows.append(self._rows.pop(request_id))
        record.row = -1
        self._ended[request_id] = None
        if record.is_fetched:
            self._forget(request_id)
        elif len(self._ended) > MAX_UNFETCHED:
            self._release([next(iter(self._ended))])
            self._forget(next(iter(self._ended)))

    def table_rows(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the table row of each request, -1 for requests that are not snpatch's."""
        return np.fromiter(map(self._rows.get, request_ids, repeat(-1)), dtype=np.int64, count=len(request_ids))

    def count_step(self, rows: NDArray, start: NDArray, stop: NDArray) -> None:
        """Count the overwrites implied by running positions [start, stop) of the requests in `rows`."""
        requests, computed_stop = self.table[rows], self.table[rows, RequestColumn.COMPUTED_STOP]
        width = requests[:, self._his] - requests[:, self._los]
        patch_start, patch_stop = requests[:, self._starts], requests[:, self._stops]

        def implied(first: NDArray, last: NDArray) -> NDArray:
            """Return the overwrites of each request at positions [first, last), of all its interventions."""
            num_positions = np.minimum(last[:, None], patch_stop) - np.maximum(first[:, None], patch_start)
            return (np.maximum(num_positions, 0) * width).sum(axis=1)

        self._planned[rows] += implied(start, stop)
        if self._may_skip[rows].any():
            self._skipped[rows] += np.where(self._may_skip[rows], implied(computed_stop, start), 0)
            self._may_skip[rows] = False
        self.table[rows, RequestColumn.COMPUTED_STOP] = np.maximum(computed_stop, stop)

    def fetch(self, tickets: Iterable[int]) -> list[list[dict]]:
        """Return the records of each ticket's requests as data, and release their slots.

        A request that still runs (a step may have been scheduled before its end was known) keeps its row until its end,
        so that what it writes into the KV cache follows its own patch, but it is no longer counted.
        """
        ids = [self._tickets.pop(ticket, []) for ticket in tickets]
        for record in (self._records[i] for group in ids for i in group):
            if record.row >= 0:
                self._read_row(record)
                self.table[record.row, RequestColumn.RECEIPT] = -1
                self.table[record.row, [RequestColumn.OBSERVE_STOP, RequestColumn.CAPTURE_STOP]] = 0
        self._release([i for group in ids for i in group])
        records = [[self._records[i].to_dict() for i in group] for group in ids]
        for request_id in (i for group in ids for i in group):
            self._records[request_id].is_fetched = True
            if self._records[request_id].row < 0:
                self._forget(request_id)
        return records

    def _new_record(self, request_id: str, ints: Sequence[int]) -> Record:
        try:
            row = RequestRow.unpack(ints, self.table.shape[1])
        except SnpatchError as error:
            raise SnpatchError(f"request {request_id}: {error}") from None
        record = Record(row.ticket, cast("NDArray[np.int32]", row.columns))
        for column, kind in self._handle_kinds.items():
            handle = int(record.entries[column])
            if handle not in self.handles[kind]:
                raise SnpatchError(f"request {request_id}: no {kind} is registered under {handle} (any more)")
            record.entries[column] = self.handles[kind][handle]
        group = decode_group(int(record.entries[RequestColumn.GROUP]))
        if not -1 <= group < self.tables.settings.max_groups:
            raise SnpatchError(f"request {request_id}: no statistics group {group}")
        self._take_slots(record)
        self._records[request_id] = record
        self._tickets.setdefault(record.ticket, []).append(request_id)
        return record

    def _grow(self) -> None:
        """Double the number of rows."""
        n = len(self.table)
        self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        self.same_weights = np.concatenate([self.same_weights, np.zeros_like(self.same_weights)])
        self._planned, self._skipped = (np.concatenate([a, np.zeros_like(a)]) for a in (self._planned, self._skipped))
        self._may_skip = np.concatenate([self._may_skip, np.zeros_like(self._may_skip)])
        self._free_rows = list(range(2 * n - 1, n - 1, -1))

    def _read_row(self, record: Record) -> None:
        record.planned, record.skipped = int(self._planned[record.row]), int(self._skipped[record.row])
        record.computed_stop = int(self.table[record.row, RequestColumn.COMPUTED_STOP])

    def _release(self, request_ids: Sequence[str]) -> None:
        """Read receipts and captures off the device, in one copy each, and release their slots."""
        records = [self._records[i] for i in request_ids]
        self._release_receipts([r for r in records if r.entries[RequestColumn.RECEIPT] >= 0])
        self._release_captures([r for r in records if r.num_captures and r.entries[RequestColumn.CAPTURE] >= 0])

    def _release_receipts(self, records: list[Record]) -> None:
        if not records:
            return
        slots = [int(r.entries[RequestColumn.RECEIPT]) for r in records]
        for record, receipt in zip(records, self.tables.receipt[slots].cpu().numpy(), strict=True):
            record.receipt[:2] += receipt[:2]
            record.receipt[ReceiptColumn.LAYER] = max(record.receipt[ReceiptColumn.LAYER], receipt[ReceiptColumn.LAYER])
            record.entries[RequestColumn.RECEIPT] = -1
        self.tables.receipt[slots] = 0
        self._free_receipts += slots

    def _release_captures(self, records: list[Record]) -> None:
        if not records:
            return
        spans = [(int(r.entries[RequestColumn.CAPTURE]), r.num_captures) for r in records]
        slots = [slot for first, n in spans for slot in range(first, first + n)]
        values = self.tables.capture[slots].cpu().numpy()
        parts = np.split(values, np.cumsum([n for _, n in spans])[:-1])
        for record, part in zip(records, parts, strict=True):
            earlier = record.captured
            record.captured = part if earlier is None else np.where(np.isnan(earlier), part, earlier)
            record.entries[RequestColumn.CAPTURE] = -1
        self.tables.capture[slots] = torch.nan
        self._capture_used[slots] = False

    def _forget(self, request_id: str) -> None:
        record = self._records.pop(request_id)
        self._ended.pop(request_id, None)
        ids = self._tickets.get(record.ticket, [])
        if request_id in ids:
            ids.remove(request_id)
        if not ids:
            self._tickets.pop(record.ticket, None)

    def _has_slots(self, record: Record) -> bool:
        """Return whether a record has the receipt and capture slots that it needs."""
        entries = record.entries
        has_captures = not record.num_captures or bool(entries[RequestColumn.CAPTURE] >= 0)
        return bool(entries[RequestColumn.RECEIPT] >= 0) and has_captures

    def _take_slots(self, record: Record) -> None:
        record.entries[RequestColumn.RECEIPT] = self._take_receipt()
        record.entries[RequestColumn.CAPTURE] = self._take_captures(record.num_captures) if record.num_captures else -1

    def _take_receipt(self) -> int:
        if not self._free_receipts:
            self._release(list(self._ended))
        if not self._free_receipts:
            raise SnpatchError(f"more than {self.tables.settings.max_receipts} requests: raise max_receipts")
        return self._free_receipts.pop()

    def _take_captures(self, n: int) -> int:
        """Reserve n consecutive capture slots and return the first."""
        for _ in range(2):
            free = np.flatnonzero(~self._capture_used)
            if n <= len(free):
                runs = np.flatnonzero(free[n - 1 :] - free[: len(free) - n + 1] == n - 1)
                if len(runs):
                    first = int(free[runs[0]])
                    self._capture_used[first : first + n] = True
                    return first
            self._release(list(self._ended))
        raise SnpatchError(f"no slots to capture {n} more positions: raise max_captures ({len(self._capture_used)})")


def _columns(num_columns: int, first: RequestColumn, second: RequestColumn) -> tuple[list[int], list[int]]:
    """Return the table columns of two request columns for each intervention."""
    interventions = range(num_request_interventions(num_columns))
    return [request_column(first, i) for i in interventions], [request_column(second, i) for i in interventions]
