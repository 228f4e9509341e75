"""Receipts: whether the device did what a request implies. One rule for every executor.

Why a receipt and not a check of the text: a patch that was applied to fewer neurons or positions gives another
text that looks as good.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snpatch.errors import OverflowedError, ReceiptError
from snpatch.executors.base import Geometry, Output, Request
from snpatch.executors.rows import implied_overwrites
from snpatch.op.plan import NEVER
from snpatch.patching.patch import digest_of


@dataclass(frozen=True, eq=False)
class Record:
    """One worker's record of a request.

    seen: one past the last position that was run. planned: overwrites that its patch implied, each run of a position
    counted; skipped: those of positions that were not run as the prefix cache had them, done when they were put there.
    overwrites, nonfinite, layer: the device's own counts, see plan.Receipt. captured: [positions, K] float32, NaN where
    another worker has the neuron.
    """

    seen: int
    planned: int
    skipped: int
    overwrites: int
    nonfinite: int
    layer: int
    captured: Tensor | None = None


def confirm(request: Request, output: Output, shards: Sequence[Record], geometry: Geometry) -> None:
    """Complete an output with its receipt and captures.

    shards: a record from each worker, which holds its part of the neurons. Positions that were run twice count once.

    Raises:
        OverflowedError: values of the text are not finite. Only this text is affected.
        ReceiptError: the device did not do what the patch implies.
    """
    if error := _overflow(request, shards, geometry):
        raise error
    fed = len(request.prompt_ids) + max(len(output.token_ids) - 1, 0)
    output.overwrites = _overwrites(request, shards, fed)
    if request.capture:
        output.captured = _captured(request, [shard.captured for shard in shards])


def _overflow(request: Request, shards: Sequence[Record], geometry: Geometry) -> OverflowedError | None:
    """Return the error of a text with non-finite values, or None."""
    count = sum(shard.nonfinite for shard in shards)
    if count == 0:
        return None
    layer = NEVER - max(shard.layer for shard in shards)
    place = "in the logits" if layer == geometry.n_layers else f"at layer {layer}"
    unpatched = None
    if not request.overwrites:
        unpatched = digest_of([request.recipient.fingerprint, list(request.prompt_ids)])
    cause = "under its patch" if unpatched is None else "without a patch"
    return OverflowedError(
        f"the text overflowed in {geometry.dtype} {place} {cause}: {count} of its values are not finite",
        unpatched=unpatched,
    )


def _overwrites(request: Request, shards: Sequence[Record], fed: int) -> int:
    first, done = shards[0], sum(shard.overwrites for shard in shards)
    if done != first.planned:
        raise ReceiptError(
            f"a patch was not applied in full: {first.planned} overwrites were planned, the device did {done}"
        )
    wanted = implied_overwrites(request, fed) - first.skipped
    if first.seen < fed or first.planned < wanted:
        raise ReceiptError(
            f"a patch was not applied in full: {fed} positions were to be run, {first.seen} were, and {first.planned} "
            f"neurons of them patched instead of {wanted}"
        )
    return wanted


def _captured(request: Request, parts: Sequence[Tensor]) -> Tensor:
    """[positions, k] float32: each neuron comes from the one worker that holds it."""
    capture = request.capture
    whole, *others = (part[:, : capture.k] for part in parts)
    for part in others:
        whole = torch.where(whole.isnan(), part, whole)
    if whole.shape != (capture.stop - capture.start, capture.k) or whole.isnan().any():
        raise ReceiptError("a capture is incomplete: some of its neurons were not written")
    return whole
