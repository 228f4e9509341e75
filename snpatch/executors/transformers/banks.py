"""From requests to tensors: the banks that hold adapters, rankings and constants, and the request table's rows.

Why banks are gathered anew for each call: they hold just what its requests name, so nothing has a capacity and
no state is left behind that could reach a later request.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors.base import Geometry, Output, Request, Statistics
from snpatch.models.adapters import Scales
from snpatch.op.bank import LayerBank
from snpatch.op.plan import NEVER, Entry, Source
from snpatch.op.reference import SUMS
from snpatch.patching.patch import Constant, Noise
from snpatch.ranking.ranking import Ranking


class Tables:
    """The banks of one `execute`, the rows that requests have in them, and what is read back from them."""

    def __init__(
        self,
        requests: Sequence[Request],
        scales: dict[str, Scales],
        groups: int,
        geometry: Geometry,
        device: torch.device,
    ) -> None:
        self._device = device
        self._adapters, self._rankings, self._constants = {"base": 0}, {}, {}
        rank_rows: list[Tensor] = []
        constant_rows = [torch.zeros(geometry.n_layers, geometry.n_neurons)]
        for request in requests:
            for name in models_of(request):
                self._adapters.setdefault(name, len(self._adapters))
            for ranking in rankings_of(request):
                if ranking.digest not in self._rankings:
                    self._rankings[ranking.digest] = len(rank_rows)
                    rank_rows.append(ranking.rank)
            for donor in constants_of(request):
                if donor.digest not in self._constants:
                    self._constants[donor.digest] = len(constant_rows)
                    constant_rows.append(values_of(donor))
        if not rank_rows:
            rank_rows = [torch.full((geometry.n_layers, geometry.n_neurons), NEVER, dtype=torch.int32)]
        used = [scales[name].scale for name in self._adapters]
        scaled = [m for m in geometry.widths if m != "down_proj" and any((scale[m] != 1).any() for scale in used)]

        def of_layer(rows: Sequence[Tensor], layer: int) -> Tensor:
            return torch.stack([row[layer] for row in rows]).to(device)

        self.banks = [
            LayerBank(
                scale=of_layer([scale["down_proj"] for scale in used], layer),
                rank=of_layer(rank_rows, layer),
                constant=of_layer(constant_rows, layer),
                stats=torch.zeros(groups, SUMS, geometry.n_neurons, dtype=torch.float64, device=device),
                count=torch.zeros(groups, dtype=torch.int64, device=device),
                attention_scale={m: of_layer([scale[m] for scale in used], layer) for m in scaled},
            )
            for layer in range(geometry.n_layers)
        ]

    def for_batch(self, requests: Sequence[Request]) -> tuple[NDArray[np.int32], Tensor, Tensor]:
        """Table [R, len(Entry)], empty captures [slots, K] and empty receipts [R] of one batch."""
        slots, columns = 0, max((r.capture[1] for r in requests if r.capture), default=0)
        rows = []
        for number, request in enumerate(requests):
            row = request_row(request, self._adapters, self._rankings, self._constants)
            row[Entry.RECEIPT] = number
            if request.capture:
                row[Entry.CAPTURE] = slots
            rows.append(row)
            slots += request.capture[3] - request.capture[2] if request.capture else 0
        table = np.array(rows, dtype=np.int32)
        capture = torch.full((slots, columns), torch.nan, device=self._device)
        return table, capture, torch.zeros(len(requests), dtype=torch.int64, device=self._device)

    def receipts(
        self, requests: Sequence[Request], outputs: list[Output], patched: Sequence[int], step
    ) -> list[Output]:
        """Complete a batch's outputs with captures and receipts; a receipt that differs from the plan is an error."""
        done, slot = step.receipt.tolist(), 0
        for request, output, positions, overwrites in zip(requests, outputs, patched, done, strict=True):
            expected = positions * (len(request.window) if request.window else 0)
            if overwrites != expected:
                raise ReceiptError(
                    f"a patch was not applied in full: {expected} overwrites were planned, the device did {overwrites}"
                )
            output.overwrites = overwrites
            if request.capture:
                _, k, start, stop = request.capture
                output.captured = step.capture[slot : slot + stop - start, :k].cpu()
                slot += stop - start
                if output.captured.isnan().any():
                    raise ReceiptError("a capture is incomplete: some of its neurons were not written")
        return outputs

    def statistics(self) -> list[Statistics]:
        """What each group gathered."""
        sums = torch.stack([bank.stats for bank in self.banks], dim=1).cpu()
        count = torch.stack([bank.count for bank in self.banks], dim=1).cpu()
        return [Statistics(s, c) for s, c in zip(sums, count, strict=True)]


def request_row(
    request: Request, adapters: Mapping[str, int], rankings: Mapping[str, int], constants: Mapping[str, int]
) -> list[int]:
    """The request table's row [len(Entry)], without a receipt and a row for captures.

    adapters: name -> id; rankings, constants: digest -> id, of all that the request names.
    """
    row = [0] * len(Entry)
    row[Entry.RECIPIENT] = row[Entry.DONOR] = adapters[request.recipient]
    row[Entry.GROUP] = row[Entry.CAPTURE] = row[Entry.RECEIPT] = -1
    named = rankings_of(request)
    if len({ranking.digest for ranking in named}) > 1:
        raise SnpatchError("a request cannot capture by one ranking while it is patched by another")
    if named:
        row[Entry.RANKING] = rankings[named[0].digest]
    if isinstance(request.donor, str):
        row[Entry.DONOR] = adapters[request.donor]
    elif request.donor is not None:
        is_noise = isinstance(request.donor, Noise)
        row[Entry.SOURCE] = Source.NOISE if is_noise else Source.CONSTANT
        row[Entry.SEED] = request.donor.seed if is_noise else 0
        row[Entry.ROW] = constants[request.donor.digest]
    if request.window:
        row[Entry.LO], row[Entry.HI] = request.window.lo, request.window.hi
        row[Entry.PATCH_START], row[Entry.PATCH_STOP] = request.patch_range
    if request.observe:
        row[Entry.GROUP : Entry.CAPTURE] = request.observe
    if request.capture:
        row[Entry.CAPTURE_START : Entry.RECEIPT] = request.capture[2:]
    return row


def patched_positions(request: Request, fed: int) -> int:
    """How many of the first `fed` positions the request's patch covers."""
    start, stop = request.patch_range
    return max(0, min(stop, fed) - start)


def models_of(request: Request) -> list[str]:
    """Names of the models that a request runs."""
    return [name for name in (request.recipient, request.donor) if isinstance(name, str)]


def rankings_of(request: Request) -> list[Ranking]:
    """The rankings that a request names."""
    captured = [request.capture[0]] if request.capture else []
    return ([request.ranking] if request.ranking is not None else []) + captured


def constants_of(request: Request) -> list[Constant | Noise]:
    """The constant or noise that overwrites, if that is what the request's donor is."""
    return [request.donor] if isinstance(request.donor, Constant | Noise) else []


def values_of(donor: Constant | Noise) -> Tensor:
    """What a constant or a noise has in the bank of constants: values or deviations, [L, F] float32."""
    return (donor.values if isinstance(donor, Constant) else donor.deviation).float()
