"""Window: the ranks that are patched. The module does not import torch, because the command line reads it."""

import operator
from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.utils import schema

RANDOM_CONTROLS = ("per_layer", "last_layer", "everywhere")  # kinds of Ranking.random_control
MAGNITUDE, MATCHED, EQUAL_ENERGY = EXTRA_CONTROLS = ("magnitude", "matched", "equal_energy")


@dataclass(frozen=True)
class Window:
    """Range [lo, hi) of ranks: neuron n is patched iff lo <= rank[n] < hi.

    Attributes:
        lo: First patched rank.
        hi: Rank after the last patched one.
    """

    lo: int
    hi: int

    def __post_init__(self) -> None:
        schema.validate(self, "window: ")
        if not 0 <= self.lo <= self.hi:
            raise SnpatchError(f"window: expected 0 <= lo <= hi, got [{self.lo}, {self.hi})")

    def __len__(self) -> int:
        return self.hi - self.lo

    @classmethod
    def of(cls, window: "Window | int | tuple[int, int]") -> "Window":
        """Convert to a Window.

        Args:
            window: A Window, k for the top k, or (lo, hi).

        Raises:
            SnpatchError: The argument has another form, or lo > hi.
        """
        if isinstance(window, Window):
            return window
        pair = window if isinstance(window, tuple | list) else (0, window)
        if len(pair) != 2 or any(isinstance(end, bool) or not hasattr(end, "__index__") for end in pair):
            raise SnpatchError(f"window: expected k, (lo, hi) or a Window, got {window!r}")
        return cls(*map(operator.index, pair))
