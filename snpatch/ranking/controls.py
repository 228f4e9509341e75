"""Random controls: random neurons that are patched in place of a window's own."""

import torch
from torch import Tensor

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.ranking.window import CONTROLS

EXCLUDED_KEY = 2.0  # larger than every random key


def draw(own: Tensor, shape: tuple[int, int], *, seed: int, kind: str, disjoint: bool) -> Tensor:
    """Draw as many flat neuron indices as `own` [n] has; see Ranking.random_control."""
    if kind not in CONTROLS:
        raise SnpatchError(f"random_control: kind: expected one of {', '.join(CONTROLS)}, got {kind!r}")
    n_layers, n_neurons = shape
    # The neurons with the smallest random keys are drawn. The window's own cannot be, if the control is disjoint.
    keys = torch.rand(n_layers * n_neurons, generator=torch.Generator().manual_seed(seed))
    if disjoint:
        keys[own] = EXCLUDED_KEY
    if kind == "last_layer":
        return _draw(keys, (n_layers - 1) * n_neurons, n_neurons, len(own), "the last layer")
    if kind == "everywhere":
        return _draw(keys, 0, n_layers * n_neurons, len(own), "the model")
    chosen = torch.empty_like(own)
    layers = own // n_neurons
    for layer in layers.unique().tolist():
        indices = torch.nonzero(layers == layer).flatten()
        chosen[indices] = _draw(keys, layer * n_neurons, n_neurons, len(indices), f"layer {layer}")
    return chosen


def _draw(keys: Tensor, start: int, size: int, n: int, source: str) -> Tensor:
    """Return the n neurons of [start, start + size) with the smallest keys."""
    part = keys[start : start + size]
    num_free = int((part < EXCLUDED_KEY).sum())
    if n > num_free:
        raise NotEnoughNeuronsError(
            f"random_control: expected {n} neurons to draw from in {source}, got {num_free}. Use a smaller window, or "
            "disjoint=False (command line: --overlapping-controls)."
        )
    return start + torch.argsort(part, stable=True)[:n]
