"""Statistics of a contrast, from which scores of neurons are computed (methods/).

Sums are stored and not activations, because they need five numbers per neuron for any number of tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.op.reference import SUMS
from snpatch.utils.tensors import is_finite


@dataclass(eq=False)
class Statistics:
    """Sums over tokens; r is the recipient's activation, d the donor's (0 if no donor was observed).

    Attributes:
        sums: [L, 5, F] float64: r, r^2, d, d^2, (r - d)^2.
        count: [L] int64, number of tokens.
    """

    sums: Tensor
    count: Tensor

    def __post_init__(self) -> None:
        n_layers = self.count.numel()
        if not n_layers or self.count.dim() != 1 or self.sums.dim() != 3 or self.sums.shape[:2] != (n_layers, SUMS):
            got = f"{list(self.sums.shape)} and {list(self.count.shape)}"
            raise SnpatchError(f"statistics: expected sums [layers, {SUMS}, neurons] and count [layers], got {got}")
        if self.sums.dtype != torch.float64 or self.count.dtype != torch.int64:
            got = f"{self.sums.dtype} and {self.count.dtype}"
            raise SnpatchError(f"statistics: expected float64 sums and int64 counts, got {got}")
        if not is_finite(self.sums):
            raise SnpatchError("statistics: a sum is NaN or infinite: an activation overflowed in this dtype")
        if (self.count < 0).any():
            raise SnpatchError(f"statistics: count: expected numbers of tokens, got {self.count.min().item()}")

    @classmethod
    def zeros(cls, n_layers: int, n_neurons: int) -> Self:
        """Return the statistics of no tokens."""
        sums = torch.zeros(n_layers, SUMS, n_neurons, dtype=torch.float64)
        return cls(sums, torch.zeros(n_layers, dtype=torch.int64))

    def add(self, sums: Tensor, count: Tensor) -> None:
        """Add sums and counts of further tokens."""
        self.sums += sums
        self.count += count

    def recipient_only(self) -> Self:
        """Return the statistics of the recipient, with 0 as the donor's activations."""
        sums = torch.zeros_like(self.sums)
        sums[:, :2], sums[:, 4] = self.sums[:, :2], self.sums[:, 1]
        return type(self)(sums, self.count)

    @property
    def is_pair(self) -> bool:
        """Return whether a donor was observed."""
        return bool(self.sums[:, 2:4].any())

    @property
    def shape(self) -> tuple[int, int]:
        """Return (layers, neurons of a layer)."""
        return self.sums.shape[0], self.sums.shape[2]

    @property
    def tokens(self) -> int:
        """Return the number of tokens. Raise if layers have different numbers."""
        (n, *others) = self.count.unique().tolist()
        if others or n < 1:
            raise SnpatchError(f"statistics: layers have seen different numbers of tokens: {self.count.tolist()}")
        return n

    def moments(self) -> dict[str, Tensor]:
        """Return mean and unbiased standard deviation of each model, [L, F] float32 by name.

        The deviation needs two or more tokens.
        """
        n, moments = self.tokens, {}
        r, rr, d, dd, _ = self.sums.unbind(1)
        for name, total, squares in (("recipient", r, rr), ("donor", d, dd))[: 1 + self.is_pair]:
            moments[f"{name}_mean"] = total / n
            if n > 1:
                moments[f"{name}_std"] = ((squares - total * total / n).clamp(min=0) / (n - 1)).sqrt()
        return {name: moment.float() for name, moment in moments.items()}
