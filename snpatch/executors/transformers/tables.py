"""Adapters, rankings and constants of one call as tensors, and the request table that refers to their rows.

Why they are built for each call: they contain just what its requests use, so nothing has a fixed capacity and no state
is left that could reach a later request.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snpatch.executors.base import Request
from snpatch.executors.receipts import WorkerReceipt
from snpatch.executors.request_rows import (
    RequestResources,
    SlotIndex,
    build_request_row,
    collect_resources,
    implied_overwrites,
    observed_statistics,
)
from snpatch.models.geometry import Geometry
from snpatch.op.layer_tables import LayerTables
from snpatch.op.plan import UNRANKED, ReceiptColumn, RequestColumn
from snpatch.op.reference import SUMS


class BatchTables:
    """The op's tensors for all requests of a call, and the slots of their resources."""

    def __init__(self, requests: Sequence[Request], geometry: Geometry, device: torch.device) -> None:
        self._device = device
        self._statistics = observed_statistics(requests)
        resources = RequestResources()
        for request in requests:
            used = collect_resources(request)
            resources.models.update(used.models)
            resources.rankings.update(used.rankings)
            resources.constants.update(used.constants)
        self._slots = SlotIndex(
            {fingerprint: slot for slot, fingerprint in enumerate(resources.models, start=1)},
            {fingerprint: slot for slot, fingerprint in enumerate(resources.rankings)},
            {fingerprint: slot for slot, fingerprint in enumerate(resources.constants, start=1)},
        )
        self.layers = _build_layers(resources, len(self._statistics), geometry, device)

    def build_batch(self, requests: Sequence[Request]) -> tuple[NDArray[np.int32], Tensor, Tensor]:
        """Return one batch's request table [R, columns] and its empty captures [slots, K] and receipts [R, 3]."""
        num_captures, max_k = 0, max((r.capture.k for r in requests if r.capture), default=0)
        num_interventions = max(1, *(len(r.overwrites) for r in requests))
        rows = []
        for index, request in enumerate(requests):
            slots = replace(self._slots, group=self._statistics_group(request))
            row = build_request_row(request, slots, num_interventions)
            row[RequestColumn.RECEIPT] = index
            if request.capture:
                row[RequestColumn.CAPTURE] = num_captures
                num_captures += request.capture.stop - request.capture.start
            rows.append(row)
        capture = torch.full((num_captures, max_k), torch.nan, device=self._device)
        receipt = torch.zeros(len(rows), len(ReceiptColumn), dtype=torch.int64, device=self._device)
        return np.array(rows, dtype=np.int32), capture, receipt

    def add_statistics(self) -> None:
        """Add the observed sums to the requests' statistics."""
        if self._statistics:
            sums = torch.stack([layer.stats for layer in self.layers], dim=1).cpu()
            counts = torch.stack([layer.count for layer in self.layers], dim=1).cpu()
            for statistics, group_sums, group_counts in zip(self._statistics, sums, counts, strict=True):
                statistics.add(group_sums, group_counts)

    def _statistics_group(self, request: Request) -> int:
        if request.observe is None:
            return -1
        return next(i for i, statistics in enumerate(self._statistics) if statistics is request.observe.statistics)


def _build_layers(
    resources: RequestResources, num_groups: int, geometry: Geometry, device: torch.device
) -> list[LayerTables]:
    shape = geometry.n_layers, geometry.n_neurons
    ranks = [ranking.rank for ranking in resources.rankings.values()]
    ranks = ranks or [torch.full(shape, UNRANKED, dtype=torch.int32)]
    constants = [torch.zeros(shape), *resources.constants.values()]
    ones = {module: torch.ones(geometry.n_layers, width) for module, width in geometry.widths.items()}
    scales = [ones, *(model.scales.vectors for model in resources.models.values())]
    scaled = [m for m in geometry.widths if m != "down_proj" and any((scale[m] != 1).any() for scale in scales)]

    def stack(tables: Sequence[Tensor], layer: int) -> Tensor:
        return torch.stack([table[layer] for table in tables]).to(device)

    return [
        LayerTables(
            scale=stack([scale["down_proj"] for scale in scales], layer),
            rank=stack(ranks, layer),
            constant=stack(constants, layer),
            stats=torch.zeros(num_groups, SUMS, geometry.n_neurons, dtype=torch.float64, device=device),
            count=torch.zeros(num_groups, dtype=torch.int64, device=device),
            attention_scale={m: stack([scale[m] for scale in scales], layer) for m in scaled},
        )
        for layer in range(geometry.n_layers)
    ]


def build_receipts(
    requests: Sequence[Request], num_positions: Sequence[int], capture: Tensor, receipt: Tensor
) -> list[WorkerReceipt]:
    """Build each request's receipt.

    num_positions: how many were run. capture, receipt: from `build_batch`, written by the op.
    """
    receipts, start = [], 0
    for request, positions, counts in zip(requests, num_positions, receipt.tolist(), strict=True):
        overwrites, nonfinite, layer = counts
        captured = None
        if request.capture:
            stop = start + request.capture.stop - request.capture.start
            captured, start = capture[start:stop].cpu(), stop
        planned = implied_overwrites(request, positions)
        receipts.append(WorkerReceipt(positions, planned, 0, overwrites, nonfinite, layer, captured))
    return receipts
