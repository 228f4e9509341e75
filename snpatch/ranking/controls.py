"""Controls: other neurons that are patched in place of a window's own, drawn at random or by their activations."""

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from snpatch.config import check_choice
from snpatch.errors import NotEnoughNeuronsError
from snpatch.ranking.window import RANDOM_CONTROLS

FREE_KEYS_END = 1.0  # random keys are smaller; those of the window's own neurons, in a disjoint draw, are not


def draw(own: Tensor, shape: tuple[int, int], *, seed: int, kind: str, disjoint: bool, fill_up: bool) -> Tensor:
    """Draw as many flat neuron indices as `own` [n] has; see Ranking.random_control."""
    check_choice("random_control: kind", kind, RANDOM_CONTROLS)
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
    for start, indices in _by_layer(own, n_neurons):
        chosen[indices] = _draw(keys, start, n_neurons, len(indices), f"layer {start // n_neurons}", fill_up)
    return chosen


def find_largest(own: Tensor, magnitude: Tensor) -> Tensor:
    """Return the neurons with the largest magnitude [L, F]: in each layer as many as `own` [n] has there.

    They may be the window's own.
    """
    chosen = torch.empty_like(own)
    for start, indices in _by_layer(own, magnitude.shape[1]):
        layer = magnitude[start // magnitude.shape[1]]
        chosen[indices] = start + torch.sort(layer, descending=True, stable=True).indices[: len(indices)]
    return chosen


def match_magnitude(own: Tensor, magnitude: Tensor) -> Tensor:
    """Return, for each neuron of `own` [n], another of its layer with the nearest magnitude [L, F].

    None is the window's own, and none is taken twice. Neurons choose by falling magnitude, because the largest have
    the fewest neighbors.
    """
    n_neurons = magnitude.shape[1]
    chosen = torch.empty_like(own)
    for start, indices in _by_layer(own, n_neurons):
        layer, own_in_layer = magnitude[start // n_neurons], own[indices] - start
        is_free = torch.ones(n_neurons, dtype=torch.bool)
        is_free[own_in_layer] = False
        if len(indices) > int(is_free.sum()):
            raise NotEnoughNeuronsError(
                f"matched_control: expected {len(indices)} other neurons in layer {start // n_neurons}, got "
                f"{int(is_free.sum())}. Use a smaller window."
            )
        free = torch.nonzero(is_free).flatten()
        free = free[torch.sort(layer[free], stable=True).indices].tolist()  # by rising magnitude
        values = layer[free].tolist()
        for i in torch.sort(layer[own_in_layer], descending=True, stable=True).indices.tolist():
            value = layer[own_in_layer[i]].item()
            place = bisect_left(values, value)
            neighbors = [p for p in (place - 1, place) if 0 <= p < len(values)]
            nearest = min(neighbors, key=lambda p: abs(values[p] - value))
            chosen[indices[i]] = start + free.pop(nearest)
            values.pop(nearest)
    return chosen


def _by_layer(own: Tensor, n_neurons: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first flat index of a layer, indices into `own` of its neurons) of each layer that has any."""
    layers = own // n_neurons
    for layer in layers.unique().tolist():
        yield layer * n_neurons, torch.nonzero(layers == layer).flatten()


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
