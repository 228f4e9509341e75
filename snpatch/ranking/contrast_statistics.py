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

SQUARES = [1, 3, 4]  # sums that cannot be negative


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

    def plus(self, other: Self) -> Self:
        """Return the statistics of both sets of tokens."""
        return type(self)(self.sums + other.sums, self.count + other.count)

    def without(self, part: Self) -> Self:
        """Return the statistics of the tokens that are not in a part of them."""
        sums = self.sums - part.sums
        sums[:, SQUARES] = sums[:, SQUARES].clamp(min=0)  # rounding of a difference of sums
        return type(self)(sums, self.count - part.count)

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

    def recipient_rms(self) -> Tensor:
        """Return the root mean square of the recipient's activations, [L, F] float64."""
        return (self.sums[:, 1] / self.tokens).sqrt()

    def mean_changes(self) -> Tensor:
        """Return mean d - mean r, [L, F] float64."""
        return (self.sums[:, 2] - self.sums[:, 0]) / self.tokens

    def own_factor_changes(self) -> Tensor:
        """Return the part of the squared change that is each neuron's own factor, summed over tokens.

        With d = b r + e and the least-squares factor b = sum(r d) / sum(r^2), sum (r - d)^2 is
        (1 - b)^2 sum(r^2) + sum(e^2). The first part is what a factor per neuron, such as IA3's, does by itself.

        Returns:
            (1 - b)^2 sum(r^2), [L, F] float64; 0 for a neuron that is never active.
        """
        _, rr, _, dd, changes = self.sums.unbind(1)
        products = (rr + dd - changes) / 2  # sum(r d)
        factors = torch.where(rr > 0, products / rr, 1.0)
        return (1 - factors).square() * rr

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
