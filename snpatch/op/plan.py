"""The plan: one row of integers per token that directs the op, and the request table it is filled from.

Why integers only: the plan is rewritten at every step into a tensor that never changes shape, so no name is looked up
and no float is sent while text is generated. Both executors call `fill_plan`, in NumPy on the host: a dozen small
integer operations cost less there than their launches would on a device.

Running example: one layer of 4 neurons with the ranking [2, 0, 3, 1] and a request with the window LO = 0, HI = 2 at
positions [3, inf). At position 2 the plan row has LO = HI = 0, so nothing is patched. At position 3 it has HI = 2, so
neurons 1 (rank 0) and 3 (rank 1) are overwritten, and the receipt grows by 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from snpatch.errors import SnpatchError

INT32_MAX = 2**31 - 1
UNRANKED = INT32_MAX  # rank of a neuron that no window reaches
NO_END = INT32_MAX  # stop of a range of positions without an end
SKIP_EOS_OFFSET = 2**24  # added to a statistics group: tokens that end a completion are not counted


class PlanColumn(IntEnum):
    """Columns of a plan row, int32.

    The columns from RANKING to SOURCE_WEIGHT belong to a patch's first intervention. Each further intervention has a
    block of the same columns after the last one here: see `plan_column`.
    """

    ADAPTER_0 = 0  # row of `scale` for stream 0
    ADAPTER_1 = 1  # row of `scale` for stream 1, if there are two streams
    RECIPIENT_STREAM = 2  # 0 or 1; the other stream is the donor's
    RANKING = 3  # row of `rank`, for the window and for the capture
    LO = 4  # first rank that is patched
    HI = 5  # first rank that is not; LO == HI patches nothing
    SOURCE = 6  # a Source: where the overwriting value comes from
    CONSTANT_ROW = 7  # row of `constant`: the value, or the standard deviation of the noise
    SEED = 8  # key of the noise
    SELF_WEIGHT = 9  # factor of the recipient's own value, a float32's bits (float_bits)
    SOURCE_WEIGHT = 10  # factor of the source's value, likewise; weights 0 and 1 make an exact copy
    POSITION = 11  # token's position in its sequence, from 0; counter of the noise
    GROUP = 12  # statistics group, -1 = none; SKIP_EOS_OFFSET + group until the token is known
    CAPTURE = 13  # row of `capture`, -1 = none
    RECEIPT = 14  # row of `receipt`, -1 = none


class Source(IntEnum):
    """Source of a patched value: a patched neuron becomes self_weight * recipient + source_weight * source."""

    DONOR = 0  # the donor stream's value of the same token
    CONSTANT = 1  # constant[row]
    NOISE = 2  # constant[row] * a standard normal number


class ReceiptColumn(IntEnum):
    """Columns of a row of `receipt`, int64: what the device did for one request."""

    OVERWRITES = 0  # neurons that were overwritten
    NONFINITE = 1  # NaN and infinite values of both streams in the model's dtype, and overflowed rows of logits
    LAYER = 2  # INT32_MAX - (first layer with a non-finite value); 0 = none


class RequestColumn(IntEnum):
    """Columns of the request table, int32. Ranges are half open, in positions.

    The first SHARED_COLUMNS are equal in a plan row. Each further intervention has a block after the last column
    here, with the columns from RANKING to PATCH_STOP: see `request_column`.
    """

    ADAPTER_0 = 0
    ADAPTER_1 = 1
    RECIPIENT_STREAM = 2
    RANKING = 3
    LO = 4
    HI = 5
    SOURCE = 6
    CONSTANT_ROW = 7
    SEED = 8
    SELF_WEIGHT = 9
    SOURCE_WEIGHT = 10
    PATCH_START = 11
    PATCH_STOP = 12
    GROUP = 13
    OBSERVE_START = 14
    OBSERVE_STOP = 15
    CAPTURE = 16  # row for the range's first position; the next position uses the next row
    CAPTURE_START = 17
    CAPTURE_STOP = 18
    RECEIPT = 19
    COMPUTED_STOP = 20  # earlier positions were run before: they are patched again, but not observed or captured


SHARED_COLUMNS = RequestColumn.PATCH_START
PLAN_COLUMNS_PER_INTERVENTION = PlanColumn.SOURCE_WEIGHT + 1 - PlanColumn.RANKING
REQUEST_COLUMNS_PER_INTERVENTION = RequestColumn.PATCH_STOP + 1 - RequestColumn.RANKING


def plan_width(num_interventions: int) -> int:
    """Return the number of columns of a plan row."""
    return len(PlanColumn) + PLAN_COLUMNS_PER_INTERVENTION * (num_interventions - 1)


def request_width(num_interventions: int) -> int:
    """Return the number of columns of the request table."""
    return len(RequestColumn) + REQUEST_COLUMNS_PER_INTERVENTION * (num_interventions - 1)


def num_plan_interventions(width: int) -> int:
    """Return how many interventions fit into a plan row of `width` columns."""
    return 1 + (width - len(PlanColumn)) // PLAN_COLUMNS_PER_INTERVENTION


def num_request_interventions(width: int) -> int:
    """Return how many interventions fit into a request table of `width` columns."""
    return 1 + (width - len(RequestColumn)) // REQUEST_COLUMNS_PER_INTERVENTION


def plan_column(column: PlanColumn, intervention: int) -> int:
    """Return the index of an intervention's column (RANKING to SOURCE_WEIGHT) in a plan row."""
    if intervention == 0:
        return column
    return plan_width(intervention) + column - PlanColumn.RANKING


def request_column(column: RequestColumn, intervention: int) -> int:
    """Return the index of an intervention's column (RANKING to PATCH_STOP) in the request table."""
    if intervention == 0:
        return column
    return request_width(intervention) + column - RequestColumn.RANKING


@dataclass(frozen=True, eq=False)
class RequestRow:
    """A row of the request table on its way to a worker. ticket: number by which its receipt is fetched."""

    ticket: int
    columns: Sequence[int] | NDArray[np.int32]  # [request_width(num_interventions)]

    def pack(self) -> list[int]:
        """Return plain integers, as a request's parameters carry them."""
        return [self.ticket, *map(int, self.columns)]

    @classmethod
    def unpack(cls, values: Sequence[int], width: int) -> Self:
        """Read what `pack` returned. width: columns of the request table."""
        if len(values) != 1 + width:
            raise SnpatchError(f"request row: expected {1 + width} integers, got {len(values)}")
        return cls(int(values[0]), np.array(values[1:], dtype=np.int32))


def float_bits(weight: float) -> int:
    """Return a float32's bits as an integer, as SELF_WEIGHT and SOURCE_WEIGHT store it."""
    return int(np.float32(weight).view(np.int32))


def encode_skip_eos(group: int) -> int:
    """Return RequestColumn.GROUP of a request whose statistics skip the tokens that end a completion."""
    return group + SKIP_EOS_OFFSET


def decode_group(value: int) -> int:
    """Return the statistics group in a RequestColumn.GROUP, -1 for none."""
    return value - SKIP_EOS_OFFSET if value >= SKIP_EOS_OFFSET else value


def fill_plan(
    table: NDArray[np.int32],  # [R, request_width(num_interventions)]
    request: NDArray[np.int64],  # [T], row of `table`; -1 = padding
    position: NDArray[np.int64],  # [T], position of the token in its sequence
) -> NDArray[np.int32]:
    """Return the plan [T, plan_width(num_interventions)] of one step.

    A padding token has an empty window and no group, capture or receipt.
    """
    if not len(table):
        table = np.zeros((1, table.shape[1]), dtype=np.int32)
    is_token = request >= 0
    row = table[np.maximum(request, 0)]
    num_interventions = num_request_interventions(table.shape[1])
    plan = np.empty((len(request), plan_width(num_interventions)), dtype=np.int32)
    plan[:, :SHARED_COLUMNS] = row[:, :SHARED_COLUMNS] * is_token[:, None]
    plan[:, PlanColumn.POSITION] = position

    def in_range(start: int, stop: int) -> NDArray[np.bool_]:
        return is_token & (row[:, start] <= position) & (position < row[:, stop])

    is_new = position >= row[:, RequestColumn.COMPUTED_STOP]
    is_patched = in_range(RequestColumn.PATCH_START, RequestColumn.PATCH_STOP)
    is_observed = in_range(RequestColumn.OBSERVE_START, RequestColumn.OBSERVE_STOP) & is_new
    is_captured = in_range(RequestColumn.CAPTURE_START, RequestColumn.CAPTURE_STOP) & is_new
    plan[:, PlanColumn.HI] = np.where(is_patched, row[:, RequestColumn.HI], plan[:, PlanColumn.LO])
    plan[:, PlanColumn.GROUP] = np.where(is_observed, row[:, RequestColumn.GROUP], -1)
    capture_row = row[:, RequestColumn.CAPTURE] + (position - row[:, RequestColumn.CAPTURE_START])
    plan[:, PlanColumn.CAPTURE] = np.where(is_captured, capture_row, -1)
    for i in range(1, num_interventions):
        first, last = plan_column(PlanColumn.RANKING, i), plan_column(PlanColumn.SOURCE_WEIGHT, i)
        start = request_column(RequestColumn.RANKING, i)
        plan[:, first : last + 1] = row[:, start : start + PLAN_COLUMNS_PER_INTERVENTION] * is_token[:, None]
        is_patched = in_range(request_column(RequestColumn.PATCH_START, i), request_column(RequestColumn.PATCH_STOP, i))
        lo, hi = plan_column(PlanColumn.LO, i), plan_column(PlanColumn.HI, i)
        plan[:, hi] = np.where(is_patched, row[:, request_column(RequestColumn.HI, i)], plan[:, lo])
    plan[:, PlanColumn.RECEIPT] = np.where(is_token, row[:, RequestColumn.RECEIPT], -1)
    return plan
