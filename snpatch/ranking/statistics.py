from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Statistics:
    sums: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, n_layers, n_neurons):
        return cls(torch.zeros(n_layers, 5, n_neurons, dtype=torch.float64), torch.zeros(n_layers, dtype=torch.int64))

    def add(self, sums, count):
        self.sums += sums
        self.count += count

    def moments(self):
        n = int(self.count[0])
        r, rr, d, dd, _ = self.sums.unbind(1)
        moments = {"recipient_mean": r / n, "donor_mean": d / n}
        if n > 1:
            for name, total, squares in (("recipient_std", r, rr), ("donor_std", d, dd)):
                moments[name] = ((squares - total * total / n).clamp(min=0) / (n - 1)).sqrt()
        return {name: moment.float() for name, moment in moments.items()}
