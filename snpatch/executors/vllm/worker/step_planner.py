"""Plan of each step: which rows of the op's input are patched, observed and captured.

Why it imports neither scheduler nor model runner: runners.py calls it for both of vLLM's model runners.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from snpatch.executors.vllm.worker.request_tracker import RequestTracker
from snpatch.op.plan import SKIP_EOS_OFFSET, PlanColumn, RequestColumn, fill_plan, plan_width


class StepPlanner:
    """Plans of one worker's steps, written to the device.

    recipient_streams: whether each stream is the recipient's of some token of the step. swapped_rows: rows of the step
    that go through the weights of the other stream; None if there are none.
    """

    def __init__(self, tracker: RequestTracker) -> None:
        self._tracker, self._tables = tracker, tracker.tables
        self.recipient_streams = (True, False)
        self.swapped_rows: NDArray | None = None
        is_gpu = self._tables.device.type == "cuda"
        self._plan_buffers = _PinnedBuffers(self._tables.plan) if is_gpu else None
        self._sampled_buffers = _PinnedBuffers(self._tables.sampled) if is_gpu else None
        self._num_written = 0  # rows of the plan that may hold something
        self._num_sampled: int | None = None  # rows of logits that the step samples from
        self._num_unsettled = 0  # tokens of the step, if some leave their groups when they end a text

    def plan_step(self, request_ids: Sequence[str], start: NDArray, count: NDArray) -> None:
        """Plan a step that runs `count` tokens of each request from position `start` on, in this order."""
        tracker = self._tracker
        self._num_sampled, self._num_unsettled = None, 0
        if not tracker.num_running and not self._num_written:
            self.recipient_streams, self.swapped_rows = (True, False), None
            return
        rows = tracker.table_rows(request_ids)
        start, count = np.asarray(start, dtype=np.int64), np.asarray(count, dtype=np.int64)
        stop = start + count
        if count.max(initial=1) == 1:
            request, position = rows, start
        else:
            request = np.repeat(rows, count)
            position = np.arange(len(request)) + np.repeat(start - (count.cumsum() - count), count)
        is_known = rows >= 0
        self._write_sampled(np.where(is_known, tracker.table[rows, RequestColumn.RECEIPT], -1))
        plan = fill_plan(tracker.table, request, position)
        if self._tables.settings.has_secondary:
            self._route_streams(request, plan[:, PlanColumn.RECIPIENT_STREAM])
        self._write_plan(plan, is_active=bool(is_known.any()))
        if not is_known.all():
            rows, start, stop = rows[is_known], start[is_known], stop[is_known]
        if (tracker.table[rows, RequestColumn.GROUP] >= SKIP_EOS_OFFSET).any():
            self._num_unsettled = len(plan)
        tracker.count_step(rows, start, stop)

    def settle(self, ids: torch.Tensor) -> None:
        """Finish the plan of a step whose token ids [T or more] are now on the device."""
        if self._num_unsettled:
            self._tables.exclude_eos(ids[: self._num_unsettled])

    def clear(self) -> None:
        """Clear the plan for a step without requests."""
        self._num_sampled, self._num_unsettled = None, 0
        self.recipient_streams, self.swapped_rows = (True, False), None
        if self._num_written:
            self._write_plan(
                np.zeros((0, plan_width(self._tables.settings.max_interventions)), dtype=np.int32), is_active=False
            )

    def take_sampled(self) -> torch.Tensor | None:
        """Return the receipts [n] int32 of the rows of the step's logits; None after the first call in a step.

        A step computes the logits that it samples from first, then those of prompts.
        """
        n, self._num_sampled = self._num_sampled, None
        return None if n is None else self._tables.sampled[:n]

    def _route_streams(self, request: NDArray, recipient_stream: NDArray) -> None:
        """Find the streams of recipients, and the donor rows whose donor is on the recipient's set of weights."""
        self.recipient_streams = not recipient_stream.all(), bool(recipient_stream.any())
        is_swapped = self._tracker.same_weights[np.maximum(request, 0)] & (request >= 0)
        token = np.flatnonzero(is_swapped)
        self.swapped_rows = 2 * token + 1 - recipient_stream[token] if len(token) else None

    def _write_plan(self, plan: NDArray[np.int32], is_active: bool) -> None:
        """Copy the rows of this step, and clear later ones of the last step.

        is_active: some row does something.
        """
        n, self._num_written = max(len(plan), self._num_written), len(plan) if is_active else 0
        if n > len(plan):
            blank = np.zeros((n - len(plan), plan.shape[1]), dtype=np.int32)
            blank[:, PlanColumn.GROUP : len(PlanColumn)] = -1
            plan = np.concatenate([plan, blank])
        _copy(plan, self._tables.plan, self._plan_buffers)

    def _write_sampled(self, slots: NDArray[np.int32]) -> None:
        """Write the receipt of each request of the step, in the order of its logits."""
        self._num_sampled = len(slots)
        _copy(slots, self._tables.sampled, self._sampled_buffers)


def _copy(rows: NDArray[np.int32], target: torch.Tensor, buffers: "_PinnedBuffers | None") -> None:
    """Copy rows to the start of a tensor on the device. buffers: for a GPU."""
    if buffers is None:
        target[: len(rows)].numpy()[:] = rows
    else:
        buffers.copy(rows)


class _PinnedBuffers:
    """Pinned host buffers for copies to the device; each is reused only after its copy has finished."""

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
