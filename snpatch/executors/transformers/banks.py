"""The tensors that hold adapters, rankings and constants for one run, and the rows that its requests have in them.

Why banks are gathered anew for each run: they hold just what its requests name, so nothing has a capacity and no state
is left behind that could reach a later request.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snpatch.executors.base import Geometry, Request
from snpatch.executors.receipts import WorkerReceipt
from snpatch.executors.request_rows import (
    RequestResources,
    SlotIndex,
    build_request_row,
    collect_resources,
    implied_overwrites,
    observed_statistics,
)
from snpatch.op.layer_tables import LayerTables
from snpatch.op.plan import UNRANKED, Receipt, RequestColumn
from snpatch.op.reference import SUMS


class Banks:
    """What all requests of a run name, and the rows that they have in it."""

    def __init__(self, requests: Sequence[Request], geometry: Geometry, device: torch.device) -> None:
        self._device = device
        self._statistics = observed_statistics(requests)
        named = RequestResources()
        for request in requests:
            own = collect_resources(request)
            named.models.update(own.models)
            named.rankings.update(own.rankings)
            named.constants.update(own.constants)
        self._places = SlotIndex(
            {fingerprint: place for place, fingerprint in enumerate(named.models, start=1)},
            {fingerprint: place for place, fingerprint in enumerate(named.rankings)},
            {fingerprint: place for place, fingerprint in enumerate(named.constants, start=1)},
        )
        shape = geometry.n_layers, geometry.n_neurons
        ranks = [ranking.rank for ranking in named.rankings.values()] or [
            torch.full(shape, UNRANKED, dtype=torch.int32)
        ]
        constants = [torch.zeros(shape), *named.constants.values()]
        plain = {module: torch.ones(geometry.n_layers, width) for module, width in geometry.widths.items()}
        used = [plain, *(model.scales.vectors for model in named.models.values())]
        scaled = [m for m in geometry.widths if m != "down_proj" and any((scale[m] != 1).any() for scale in used)]

        def of_layer(rows: Sequence[Tensor], layer: int) -> Tensor:
            return torch.stack([row[layer] for row in rows]).to(device)

        groups = len(self._statistics)
        self.layers = [
            LayerTables(
                scale=of_layer([scale["down_proj"] for scale in used], layer),
                rank=of_layer(ranks, layer),
                constant=of_layer(constants, layer),
                stats=torch.zeros(groups, SUMS, geometry.n_neurons, dtype=torch.float64, device=device),
                count=torch.zeros(groups, dtype=torch.int64, device=device),
                attention_scale={m: of_layer([scale[m] for scale in used], layer) for m in scaled},
            )
            for layer in range(geometry.n_layers)
        ]

    def for_batch(self, requests: Sequence[Request]) -> tuple[NDArray[np.int32], Tensor, Tensor]:
        """Table [R, request_width(clauses)], empty captures [slots, K] and empty receipts [R, 3] of one batch."""
        slots, columns = 0, max((r.capture.k for r in requests if r.capture), default=0)
        clauses = max(1, *(len(r.overwrites) for r in requests))
        rows = []
        for number, request in enumerate(requests):
            row = build_request_row(request, replace(self._places, group=self._group(request)), clauses)
            row[RequestColumn.RECEIPT] = number
            if request.capture:
                row[RequestColumn.CAPTURE] = slots
                slots += request.capture.stop - request.capture.start
            rows.append(row)
        capture = torch.full((slots, columns), torch.nan, device=self._device)
        receipt = torch.zeros(len(rows), len(Receipt), dtype=torch.int64, device=self._device)
        return np.array(rows, dtype=np.int32), capture, receipt

    def gather(self) -> None:
        """Add what was observed to the requests' statistics."""
        if self._statistics:
            sums = torch.stack([bank.stats for bank in self.layers], dim=1).cpu()
            counts = torch.stack([bank.count for bank in self.layers], dim=1).cpu()
            for statistics, *own in zip(self._statistics, sums, counts, strict=True):
                statistics.add(*own)

    def _group(self, request: Request) -> int:
        if request.observe is None:
            return -1
        return next(i for i, statistics in enumerate(self._statistics) if statistics is request.observe.statistics)


def records_of(
    requests: Sequence[Request], fed: Sequence[int], capture: Tensor, receipt: Tensor
) -> list[WorkerReceipt]:
    """What a batch did for each of its requests. fed: positions that were run; capture, receipt: from `for_batch`."""
    records, slot = [], 0
    for request, n, own_receipt in zip(requests, fed, receipt.tolist(), strict=True):
        own = None
        if request.capture:
            stop = slot + request.capture.stop - request.capture.start
            own, slot = capture[slot:stop].cpu(), stop
        records.append(WorkerReceipt(n, implied_overwrites(request, n), 0, *own_receipt, own))
    return records
