"""Receipts: the check, shared by all executors, that the device did what a request implies.

Why a receipt and not a check of the text: a patch that was applied to fewer neurons or positions gives another
completion that looks as good.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snpatch.errors import OverflowedError, ReceiptError
from snpatch.executors.base import Capture, Output, Request
from snpatch.executors.request_rows import implied_overwrites
from snpatch.models.geometry import Geometry
from snpatch.op.plan import INT32_MAX
from snpatch.utils.hashing import REQUEST_DIGITS, hash_json
from snpatch.utils.optional import require


@dataclass(frozen=True, eq=False)
class WorkerReceipt:
    """One worker's counts for a request.

    computed_stop: one past the last position that was run.
    planned: overwrites that the patch implied; a position that was run twice counts twice.
    skipped: overwrites at positions that came from the prefix cache, done when they were cached.
    overwrites, nonfinite, layer: the device's counts, see `plan.ReceiptColumn`.
    captured: [positions, K] float32, NaN where another worker has the neuron.
    """

    computed_stop: int
    planned: int
    skipped: int
    overwrites: int
    nonfinite: int
    layer: int
    captured: Tensor | None = None


def confirm(request: Request, output: Output, shards: Sequence[WorkerReceipt], geometry: Geometry) -> None:
    """Check a request's receipts, then add the overwrite count and the captures to its output.

    Args:
        request: The request that was run.
        output: Completed in place. Positions that were run twice count once.
        shards: One receipt per worker; each worker has its shard of the neurons.
        geometry: The model's sizes.

    Raises:
        OverflowedError: Values of the completion are not finite. Only this completion is affected.
        ReceiptError: The device did not do what the patch implies.
    """
    if error := _overflow(request, shards, geometry):
        raise error
    num_positions = len(request.prompt_ids) + max(len(output.token_ids) - 1, 0)
    output.overwrites = _count_overwrites(request, shards, num_positions)
    if request.capture:
        output.captured = _merge_captures(request.capture, [require(shard.captured) for shard in shards])


def _overflow(request: Request, shards: Sequence[WorkerReceipt], geometry: Geometry) -> OverflowedError | None:
    """Return the error of a completion with non-finite values, or None."""
    count = sum(shard.nonfinite for shard in shards)
    if count == 0:
        return None
    layer = INT32_MAX - max(shard.layer for shard in shards)
    location = "in the logits" if layer == geometry.n_layers else f"at layer {layer}"
    unpatched = None
    if not request.overwrites:
        unpatched = hash_json([request.recipient.fingerprint, list(request.prompt_ids)], REQUEST_DIGITS)
    cause = "under its patch" if unpatched is None else "without a patch"
    remedy = ". Lower its strength or scale." if unpatched is None else ""
    return OverflowedError(
        f"the completion overflowed in {geometry.dtype} {location} {cause}: {count} of its values are not "
        f"finite{remedy}",
        unpatched=unpatched,
    )


def _count_overwrites(request: Request, shards: Sequence[WorkerReceipt], num_positions: int) -> int:
    first, overwrites = shards[0], sum(shard.overwrites for shard in shards)
    if overwrites != first.planned:
        raise ReceiptError(
            f"a patch was not applied in full: expected {first.planned} overwrites, the device did {overwrites}"
        )
    expected = implied_overwrites(request, num_positions) - first.skipped
    if first.computed_stop < num_positions or first.planned < expected:
        raise ReceiptError(
            f"a patch was not applied in full: expected {num_positions} positions and {expected} overwrites, got "
            f"{first.computed_stop} and {first.planned}"
        )
    return expected


def _merge_captures(capture: Capture, parts: Sequence[Tensor]) -> Tensor:
    """Return [positions, k] float32; each neuron comes from the one worker that has it."""
    merged, *others = (part[:, : capture.k] for part in parts)
    for part in others:
        merged = torch.where(merged.isnan(), part, merged)
    if merged.shape != (capture.stop - capture.start, capture.k) or merged.isnan().any():
        raise ReceiptError("a capture is incomplete: some of its neurons were not written")
    return merged
