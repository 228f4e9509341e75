"""Random controls: random neurons that are patched in place of a window's own."""

import torch
from torch import Tensor

from snpatch.config import check_choice
from snpatch.errors import NotEnoughNeuronsError
from snpatch.ranking.window import CONTROLS

FREE_KEYS_END = 1.0  # random keys are smaller; those of the window's own neurons, in a disjoint draw, are not


def draw(own: Tensor, shape: tuple[int, int], *, seed: int, kind: str, disjoint: bool, fill_up: bool) -> Tensor:
    """Draw as many flat neuron indices as `own` [n] has; see Ranking.random_control."""
    check_choice("random_control: kind", kind, CONTROLS)
    n_layers, n_neurons = shape
    # The neurons with the smallest random keys are drawn. A disjoint control has the window's own after all others.
    keys = torch.rand(n_layers * n_neurons, generator=torch.Generator().manual_seed(seed))
    if disjoint:
        keys[own] += FREE_KEYS_END
    if kind == "last_layer":
        return _draw(keys, (n_layers - 1) * n_neurons, n_neurons, len(own), "the last layer", fill_up)
    if kind == "everywhere":
        return _draw(keys, 0, n_layers * n_neurons, len(own), "the model", fill_up)
    chosen = torch.empty_like(own)
    layers = own // n_neurons
    for layer in layers.unique().tolist():
        indices = torch.nonzero(layers == layer).flatten()
        chosen[indices] = _draw(keys, layer * n_neurons, n_neurons, len(indices), f"layer {layer}", fill_up)
    return chosen


def _draw(keys: Tensor, start: int, size: int, n: int, source: str, fill_up: bool) -> Tensor:
    """Return the n neurons of [start, start + size) with the smallest keys."""
    part = keys[start : start + size]
    num_free = size if fill_up else int((part < FREE_KEYS_END).sum())
    if n > num_free:
        overlap = ", or disjoint=False (command line: --overlapping-controls)" if n <= size else ""
        raise NotEnoughNeuronsError(
            f"random_control: expected {n} neurons to draw from in {source}, got {num_free}. "
            f"Use a smaller window{overlap}."
        )
    return start + torch.argsort(part, stable=True)[:n]
