"""Random controls: neurons that are drawn beside a window's own, to be patched in their place."""

import torch
from torch import Tensor

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.ranking.window import CONTROLS

TAKEN = 2.0  # above every random lot


def draw(own: Tensor, shape: tuple[int, int], *, seed: int, kind: str, disjoint: bool) -> Tensor:
    """As many flat neuron indices as `own` [n] has, in a random order; see Ranking.random_control."""
    if kind not in CONTROLS:
        raise SnpatchError(f"random_control: kind must be one of {', '.join(CONTROLS)}, got {kind!r}")
    n_layers, n_neurons = shape
    # One random number a neuron; the window's own are out of reach where the control is disjoint.
    lot = torch.rand(n_layers * n_neurons, generator=torch.Generator().manual_seed(seed))
    if disjoint:
        lot[own] = TAKEN
    if kind == "last_layer":
        return _draw(lot, (n_layers - 1) * n_neurons, n_neurons, len(own), "the last layer")
    if kind == "everywhere":
        return _draw(lot, 0, n_layers * n_neurons, len(own), "the model")
    chosen = torch.empty_like(own)
    layer_of = own // n_neurons
    for layer in layer_of.unique().tolist():
        places = torch.nonzero(layer_of == layer).flatten()
        chosen[places] = _draw(lot, layer * n_neurons, n_neurons, len(places), f"layer {layer}")
    return chosen


def _draw(lot: Tensor, start: int, size: int, n: int, where: str) -> Tensor:
    """The n neurons of [start, start + size) with the smallest lots."""
    part = lot[start : start + size]
    free = int((part < TAKEN).sum())
    if n > free:
        raise NotEnoughNeuronsError(
            f"random_control: {n} neurons are needed in {where}, which has {free} to draw from; "
            "use a smaller window or disjoint=False"
        )
    return start + torch.argsort(part, stable=True)[:n]
