"""The plan: one row of integers a token that tells the op what to do with it, and the table it is filled from.

Why integers only: a plan is rewritten at every step from tensors that never change shape, so that nothing is
formatted, looked up by name or sent as floats while text is generated. Both executors call `fill_plan`, in numpy on
the host: a dozen small operations on integers cost less there than their launches would on a device.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

NEVER = 2**31 - 1  # a rank that no window reaches; also "without end" for a position
UNLESS_END = 2**24  # added to a statistics group: the position counts unless its token ends a text


class Column(IntEnum):
    """Columns of a plan row, int32; of two streams unless there is only one.

    Those from RANKING to TAKE are a patch's first clause. Each further clause has a block of the same columns after
    the last one here: `column_of`.
    """

    FIRST = 0  # row of `scale` for stream 0
    SECOND = 1  # row of `scale` for stream 1
    SPEAKER = 2  # the recipient's stream, 0 or 1; the other one is the donor's
    RANKING = 3  # row of `rank`, for the window and for the capture
    LO = 4  # first rank that is patched
    HI = 5  # first rank that is not; LO == HI patches nothing
    SOURCE = 6  # where the overwriting value comes from: Source
    ROW = 7  # row of `constant`: the value, or the standard deviation of the noise
    SEED = 8  # key of the noise
    KEEP = 9  # factor of the recipient's own value, as the bits of a float32 (bits_of)
    TAKE = 10  # factor of the source's value, likewise; 0 and 1: an exact copy
    POSITION = 11  # token's position in its sequence, 0 is the first; counter of the noise
    GROUP = 12  # statistics group, -1 for none (on its way to the device perhaps UNLESS_END + group)
    CAPTURE = 13  # row of `capture`, -1 for none
    RECEIPT = 14  # row of `receipt`, -1 for none


class Source(IntEnum):
    """Whose value a patched neuron takes: keep * the recipient's own + take * the source's."""

    DONOR = 0  # the donor stream's value of the same token
    CONSTANT = 1  # constant[row]
    NOISE = 2  # constant[row] * a standard normal number


class Receipt(IntEnum):
    """Columns of a row of `receipt`, int64: what the device did for one request."""

    OVERWRITES = 0  # neurons that were overwritten
    NONFINITE = 1  # values of either stream that are NaN or infinite in the model's dtype, and rows of logits
    LAYER = 2  # NEVER minus the first layer that holds such a value; 0 if there is none


class Entry(IntEnum):
    """Columns of the request table, int32. Ranges are half open, in positions.

    The first COPIED of them are a plan row's, too, in the same places. Each further clause has a block after the last
    one here: the columns from RANKING to PATCH_STOP, `entry_of`.
    """

    FIRST = 0
    SECOND = 1
    SPEAKER = 2
    RANKING = 3
    LO = 4
    HI = 5
    SOURCE = 6
    ROW = 7
    SEED = 8
    KEEP = 9
    TAKE = 10
    PATCH_START = 11
    PATCH_STOP = 12
    GROUP = 13
    OBSERVE_START = 14
    OBSERVE_STOP = 15
    CAPTURE = 16  # row of the range's first position; the next position has the next row
    CAPTURE_START = 17
    CAPTURE_STOP = 18
    RECEIPT = 19
    SEEN = 20  # positions before this one were run already: they are patched again, but not observed or captured again


COPIED = Entry.PATCH_START
BLOCK = Column.TAKE + 1 - Column.RANKING  # columns of a further clause in a plan row
ENTRIES = Entry.PATCH_STOP + 1 - Entry.RANKING  # and in the request table


def width_of(clauses: int) -> int:
    """Columns of a plan row of so many clauses."""
    return len(Column) + BLOCK * (clauses - 1)


def entries_of(clauses: int) -> int:
    """Columns of the request table for so many clauses."""
    return len(Entry) + ENTRIES * (clauses - 1)


def clauses_of(width: int) -> int:
    """How many clauses a plan row of this width has."""
    return 1 + (width - len(Column)) // BLOCK


def clauses_in(entries: int) -> int:
    """How many clauses a request table of so many columns has."""
    return 1 + (entries - len(Entry)) // ENTRIES


def column_of(column: Column, clause: int) -> int:
    """Where a plan row has a column, from RANKING to TAKE, of a clause."""
    return column if clause == 0 else len(Column) + BLOCK * (clause - 1) + column - Column.RANKING


def entry_of(entry: Entry, clause: int) -> int:
    """Where the request table has an entry, from RANKING to PATCH_STOP, of a clause."""
    return entry if clause == 0 else len(Entry) + ENTRIES * (clause - 1) + entry - Entry.RANKING


def bits_of(factor: float) -> int:
    """A factor as Column.KEEP and Column.TAKE hold it."""
    return int(np.float32(factor).view(np.int32))


def unless_end(group: int) -> int:
    """Entry.GROUP of a request whose tokens that end a text do not count."""
    return group + UNLESS_END


def group_of(entry: int) -> int:
    """The statistics group of an Entry.GROUP, -1 for none."""
    return entry - UNLESS_END if entry >= UNLESS_END else entry


def fill_plan(
    table: NDArray[np.int32],  # [R, entries_of(clauses)]
    request: NDArray[np.int64],  # [T]: row of `table`; -1 = padding
    position: NDArray[np.int64],  # [T]: position of the token in its sequence
) -> NDArray[np.int32]:
    """The plan rows [T, width_of(clauses)] of one step. Padding asks for nothing: empty window, no group."""
    if not len(table):
        table = np.zeros((1, table.shape[1]), dtype=np.int32)
    real = request >= 0
    row = table[np.maximum(request, 0)]
    clauses = clauses_in(table.shape[1])
    plan = np.empty((len(request), width_of(clauses)), dtype=np.int32)
    plan[:, :COPIED] = row[:, :COPIED] * real[:, None]
    plan[:, Column.POSITION] = position

    def within(start: int, stop: int) -> NDArray[np.bool_]:
        return real & (row[:, start] <= position) & (position < row[:, stop])

    new = position >= row[:, Entry.SEEN]
    is_patched = within(Entry.PATCH_START, Entry.PATCH_STOP)
    observed = within(Entry.OBSERVE_START, Entry.OBSERVE_STOP) & new
    captured = within(Entry.CAPTURE_START, Entry.CAPTURE_STOP) & new
    plan[:, Column.HI] = np.where(is_patched, row[:, Entry.HI], plan[:, Column.LO])
    plan[:, Column.GROUP] = np.where(observed, row[:, Entry.GROUP], -1)
    slot = row[:, Entry.CAPTURE] + (position - row[:, Entry.CAPTURE_START])
    plan[:, Column.CAPTURE] = np.where(captured, slot, -1)
    for clause in range(1, clauses):
        first, last = column_of(Column.RANKING, clause), column_of(Column.TAKE, clause)
        own = row[:, entry_of(Entry.RANKING, clause) : entry_of(Entry.TAKE, clause) + 1]
        plan[:, first : last + 1] = own * real[:, None]
        here = within(entry_of(Entry.PATCH_START, clause), entry_of(Entry.PATCH_STOP, clause))
        lo, hi = column_of(Column.LO, clause), column_of(Column.HI, clause)
        plan[:, hi] = np.where(here, row[:, entry_of(Entry.HI, clause)], plan[:, lo])
    plan[:, Column.RECEIPT] = np.where(real, row[:, Entry.RECEIPT], -1)
    return plan
