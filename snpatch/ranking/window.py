"""Window: which part of a ranking is patched, and what kinds of random controls there are of it. Free of torch."""

import operator
from dataclasses import dataclass

from snpatch.errors import SnpatchError

CONTROLS = ("per_layer", "last_layer", "everywhere")  # see Ranking.random_control


@dataclass(frozen=True)
class Window:
    """[lo, hi) over a ranking: neuron n is patched iff lo <= rank[n] < hi."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise SnpatchError(f"window: wanted 0 <= lo <= hi, got [{self.lo}, {self.hi})")

    def __len__(self) -> int:
        return self.hi - self.lo

    @classmethod
    def of(cls, window: "Window | int | tuple[int, int]") -> "Window":
        """A window as it is, k for the top k, or (lo, hi)."""
        if isinstance(window, Window):
            return window
        try:
            lo, hi = window if isinstance(window, tuple | list) else (0, window)
            return cls(operator.index(lo), operator.index(hi))
        except (TypeError, ValueError):
            raise SnpatchError(f"window: wanted k, (lo, hi) or a Window, got {window!r}") from None
