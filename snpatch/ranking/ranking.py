"""Ranking: neurons ordered by change score; set operations, random controls, comparison, files.

It stores `rank` and not a list of neurons, because a window is then two integers per token, and requests with different
k share one tensor on the device.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snpatch.config import check_choice
from snpatch.data.file_reader import get_suffix
from snpatch.errors import SnpatchError, error_source
from snpatch.op.plan import UNRANKED
from snpatch.ranking import controls
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.methods import METHODS
from snpatch.ranking.reading import NUMPY, TABLES, TORCH, Neurons, Shape, Size, read_neurons, to_tensor
from snpatch.ranking.window import Window
from snpatch.utils import schema
from snpatch.utils.files import is_safetensors, read_checkpoint, read_tensors, write_tensors
from snpatch.utils.hashing import hash_tensor
from snpatch.utils.optional import require
from snpatch.utils.tensors import FLOATS, check_tensor, check_type, is_finite

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)
MOMENTS = ("recipient_mean", "recipient_std", "donor_mean", "donor_std")
ROUNDING = 1e-6  # relative difference of equal models' activations, whose rows are computed separately


@dataclass(frozen=True, eq=False)
class Ranking:
    """Order of the neurons of a model with L layers of F neurons.

    Attributes:
        rank: [L, F] int32; 0 is the largest change, 2^31 - 1 a neuron that is not ranked.
        scores: [L, F] float32 change scores; None for an order without scores (a random control).
        moments: Name -> [L, F] float32, any of MOMENTS; source of mean ablation and noise.
        meta: JSON data of the file (models, positions, number of tokens, versions).
        statistics: Statistics of the contrast, from which scores and moments were computed, or None.
        half: The part of `statistics` that is of a random half of the prompts, or None; see ranking.reliability.
    """

    rank: Tensor
    scores: Tensor | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
    statistics: Statistics | None = None
    half: Statistics | None = None

    def __post_init__(self) -> None:
        if self.rank.dim() != 2 or self.rank.dtype != torch.int32:
            raise SnpatchError(
                f"ranking: rank: expected [layers, neurons] int32, got {list(self.rank.shape)} {self.rank.dtype}"
            )
        ranked = self.rank[self.rank != UNRANKED]
        if not torch.equal(ranked.sort().values, torch.arange(len(ranked), dtype=torch.int32)):
            raise SnpatchError(f"ranking: rank: expected each of 0..{len(ranked) - 1} once, got other ranks")
        for name, tensor in {"scores": self.scores, **self.moments}.items():
            if tensor is None:
                continue
            check_type(tensor, f"ranking: {name}", torch.float32)
            if tensor.shape != self.rank.shape:
                raise SnpatchError(f"ranking: {name}: expected {list(self.rank.shape)}, got {list(tensor.shape)}")
            if not is_finite(tensor):
                layer, neuron = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
                raise SnpatchError(
                    f"ranking: {name}: expected finite values, got {tensor[layer, neuron].item()} at layer {layer}, "
                    f"neuron {neuron}"
                )
        for name, statistics in {"statistics": self.statistics, "half": self.half}.items():
            if statistics is not None and statistics.shape != self.shape:
                raise SnpatchError(f"ranking: {name}: expected {list(self.shape)}, got {list(statistics.shape)}")
        if self.half is not None and self.statistics is None:
            raise SnpatchError("ranking: half: expected it with statistics, got it alone")

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        method: str = "rms",
        exclude_layers: Sequence[int] = (),
        meta: dict | None = None,
        half: Statistics | None = None,
    ) -> "Ranking":
        """Order neurons by a score of a contrast's statistics.

        Args:
            statistics: Statistics of the contrast.
            method: Name of a score, see METHODS.
            exclude_layers: Layers that are not ranked; negative ones count from the end.
            meta: JSON data of the file.
            half: The part of the statistics that is of a random half of the prompts.

        Raises:
            SnpatchError: Unknown method, or no ranked neuron differs between the two models.
        """
        check_choice("method", method, tuple(METHODS))
        check_excluded(exclude_layers, statistics.shape[0])
        scores, meta = METHODS[method](statistics), {**(meta or {}), "method": method}
        ranking = cls.from_scores(scores, exclude_layers, statistics.moments(), meta)
        if statistics.is_pair and not _differs(statistics, ranking._order):
            raise SnpatchError(
                f"ranking: none of the {len(ranking)} neurons differs between the two models on these texts: they are "
                "one model, or an adapter changes nothing in the layers that are ranked"
            )
        return replace(ranking, statistics=statistics, half=half)

    @classmethod
    def from_scores(
        cls,
        scores: "Tensor | np.ndarray | Sequence[Sequence[float]]",  # [L, F]
        exclude_layers: Sequence[int] = (),
        moments: dict[str, Tensor] | None = None,
        meta: dict | None = None,
    ) -> "Ranking":
        """Order neurons by score, largest first; equal scores by layer, then neuron.

        Args:
            scores: [L, F].
            exclude_layers: Layers that are not ranked; negative ones count from the end.
            moments: Name -> [L, F] float32, any of MOMENTS.
            meta: JSON data of the file. `tied` is added: the number of neurons with the score of the one before them.
        """
        scores = to_tensor(scores, "ranking: scores")
        check_type(scores, "ranking: scores", *FLOATS, torch.float64)
        scores = scores.float()
        if scores.dim() != 2:
            raise SnpatchError(f"ranking: scores: expected [layers, neurons], got {list(scores.shape)}")
        n_layers, n_neurons = scores.shape
        excluded = _layers(exclude_layers, n_layers, "exclude_layers")
        order = torch.sort(scores.flatten(), descending=True, stable=True).indices
        order = order[~torch.isin(order // n_neurons, torch.tensor(excluded, dtype=torch.int64))]
        rank = _build_ranks(order, (n_layers, n_neurons))
        tied = int((scores.flatten()[order].diff() == 0).sum())
        meta = {**(meta or {}), "excluded_layers": excluded, **({"tied": tied} if tied else {})}
        return cls(rank, scores, moments or {}, meta)

    @classmethod
    def from_order(
        cls,
        order: "Tensor | np.ndarray | Sequence[Sequence[int]]",  # [n, 2]
        shape: tuple[int, int],
        meta: dict | None = None,
        **parts,
    ) -> "Ranking":
        """Build a ranking from a list of neurons.

        Args:
            order: [n, 2] of (layer, neuron), the first to patch first.
            shape: (L, F) of the model.
            meta: JSON data of the file.
            parts: scores, moments or statistics.

        Raises:
            SnpatchError: A neuron is outside the model or listed twice.
        """
        shape = schema.check_argument(shape, Size, "ranking: shape")
        order = to_tensor(order, "ranking: order")
        if order.numel():
            check_type(order, "ranking: order", torch.int64, torch.int32, torch.int16)
        order = order.long()
        if order.dim() != 2 or order.shape[1] != 2:
            raise SnpatchError(f"ranking: order: expected [n, 2] of (layer, neuron), got {list(order.shape)}")
        if ((order < 0) | (order >= torch.tensor(shape))).any():
            raise SnpatchError(f"ranking: order: expected neurons of {list(shape)}, got one outside")
        flat = order[:, 0] * shape[1] + order[:, 1]
        if len(flat.unique()) != len(flat):
            raise SnpatchError("ranking: order: expected each neuron once, got one twice")
        return cls(_build_ranks(flat, shape), meta=meta or {}, **parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (layers, neurons of a layer)."""
        n_layers, n_neurons = self.rank.shape
        return n_layers, n_neurons

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        names = [str(self.meta[name]) for name in ("recipient", "donor", "positions") if self.meta.get(name)]
        origin = f", contrast of {', '.join(names)}" if "recipient" in self.meta else ""
        return f"Ranking({len(self)} neurons of {self.shape[0]} x {self.shape[1]}{origin})"

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the order."""
        return hash_tensor(self.rank, self.shape)

    def window_fingerprint(self, window: Window) -> str:
        """Return the content hash of a window's neurons, whatever their order.

        Args:
            window: The window.

        Raises:
            SnpatchError: The window is longer than the ranking.
        """
        neurons = self._first(window.hi)[window.lo :].sort().values
        return hash_tensor(neurons, self.shape)

    def ties(self, border: int) -> int:
        """Return the number of neurons that share a score across a window's border.

        Args:
            border: Rank of the first neuron after the border.

        Returns:
            Number of neurons on both sides; 0 if there is no tie or scores are not known.
        """
        if self.scores is None or not 0 < border < len(self):
            return 0
        scores = self.scores.flatten()[self._order]
        return int((scores == scores[border]).sum()) if scores[border - 1] == scores[border] else 0

    @property
    def provenance(self) -> dict:
        """Return what a table that depends on the ranking reports about it."""
        return self.meta | {"digest": self.fingerprint}

    def top(self, k: int) -> Tensor:
        """Return the first k neurons.

        Args:
            k: Number of neurons, 0 to len(self).

        Returns:
            [k, 2] int64 of (layer, neuron).

        Raises:
            SnpatchError: k is out of range.
        """
        flat = self._first(k)
        return torch.stack([flat // self.shape[1], flat % self.shape[1]], dim=1)

    def layer_counts(self, k: int) -> Tensor:
        """Return the number of the first k neurons in each layer.

        Args:
            k: Number of neurons, 0 to len(self).

        Returns:
            [L] int64.

        Raises:
            SnpatchError: k is out of range.
        """
        return torch.bincount(self._first(k) // self.shape[1], minlength=self.shape[0])

    def intersect(self, other: "Ranking", k: int) -> "Ranking":
        """Return the neurons that are also in the first k of `other`, in this order.

        Args:
            other: Ranking of a model of the same shape.
            k: Number of neurons, 0 to len(other).

        Returns:
            A ranking with the scores and moments of this one.

        Raises:
            SnpatchError: k is out of range, or the shapes differ.
        """
        return self._keep(torch.isin(self._order, self._same_shape(other)._first(k)), "intersect", k)

    def difference(self, other: "Ranking", k: int) -> "Ranking":
        """Return the neurons that are not in the first k of `other`, in this order.

        Args:
            other: Ranking of a model of the same shape.
            k: Number of neurons, 0 to len(other).

        Returns:
            A ranking with the scores and moments of this one.

        Raises:
            SnpatchError: k is out of range, or the shapes differ.
        """
        return self._keep(~torch.isin(self._order, self._same_shape(other)._first(k)), "difference", k)

    def filter_layers(self, layers: Sequence[int]) -> "Ranking":
        """Return the neurons of some layers, in this order.

        Args:
            layers: Layers; negative ones count from the end.

        Returns:
            A ranking with the scores and moments of this one.

        Raises:
            SnpatchError: The model lacks a layer.
        """
        layer_indices = torch.tensor(_layers(layers, self.shape[0], "filter_layers"), dtype=torch.int64)
        is_kept = torch.isin(self._order // self.shape[1], layer_indices)
        return self._of(self._order[is_kept], {"filter_layers": layer_indices.tolist()})

    def top_per_layer(self, k: int) -> "Ranking":
        """Return the first k neurons of each layer, in this order.

        Args:
            k: Maximum number of neurons per layer, at least 1.

        Returns:
            A ranking with the scores and moments of this one.

        Raises:
            SnpatchError: k is less than 1.
        """
        if schema.check_argument(k, int, "top_per_layer: k") < 1:
            raise SnpatchError(f"top_per_layer: k: expected at least 1, got {k}")
        layer = self._order // self.shape[1]
        rank_in_layer = torch.zeros_like(layer)
        for index in layer.unique():
            is_inside = layer == index
            rank_in_layer[is_inside] = torch.arange(int(is_inside.sum()))
        return self._of(self._order[rank_in_layer < k], {"top_per_layer": k})

    def random_control(
        self,
        window: Window | int | tuple[int, int],
        *,
        seed: int,
        kind: str = "per_layer",
        disjoint: bool = True,
        fill_up: bool = False,
    ) -> "Ranking":
        """Return a random control: as many random neurons as a window of this ranking has.

        Args:
            window: Window whose neurons are replaced.
            seed: Seed of the draw.
            kind: "per_layer" (the i-th neuron is in the layer of the window's i-th, so that the number of neurons in
                each layer is the same), "last_layer", or "everywhere" (any neuron, ranked or not).
            disjoint: Draw none of the window's own neurons, as in the paper's text (its code does draw them).
            fill_up: Where a disjoint control has too few neurons to draw from, draw the missing ones from the window
                instead of raising.

        Returns:
            A ranking of len(window) neurons without scores. `meta["overlap"]` is the fraction of them that are the
            window's own.

        Raises:
            SnpatchError: Unknown kind, or the window is longer than the ranking.
            NotEnoughNeuronsError: There are fewer neurons to draw from.
        """
        seed = schema.check_argument(seed, int, "random_control: seed")
        options = {"seed": seed, "kind": kind, "disjoint": disjoint, "fill_up": fill_up}
        meta = {"seed": seed, "disjoint": disjoint}
        return self._of_control(window, kind, lambda own: controls.draw(own, self.shape, **options), meta)

    def magnitude_control(self, window: Window | int | tuple[int, int]) -> "Ranking":
        """Return the neurons with the recipient's largest activations, as many of each layer as a window has.

        It needs no donor: a ranking that finds more than large activations must do better. The neurons may be the
        window's own.

        Args:
            window: Window whose neurons are replaced.

        Returns:
            A ranking of len(window) neurons without scores. `meta["overlap"]` is the fraction of them that are the
            window's own.

        Raises:
            SnpatchError: The ranking has no statistics or moments, or the window is longer than the ranking.
        """
        return self._of_control(window, "magnitude", lambda own: controls.find_largest(own, self.recipient_rms))

    def matched_control(self, window: Window | int | tuple[int, int]) -> "Ranking":
        """Return, for each neuron of a window, another of its layer with the nearest activation size.

        The size is the root mean square of the recipient's activation. Where the window has the largest of its layer,
        the nearest others are smaller.

        Args:
            window: Window whose neurons are replaced; none of its own is chosen.

        Returns:
            A ranking of len(window) neurons without scores.

        Raises:
            SnpatchError: The ranking has no statistics or moments, or the window is longer than the ranking.
            NotEnoughNeuronsError: A layer has fewer other neurons.
        """
        return self._of_control(window, "matched", lambda own: controls.match_magnitude(own, self.recipient_rms))

    @cached_property
    def recipient_rms(self) -> Tensor:
        """Return the root mean square of the recipient's activations, [L, F] float64.

        Raises:
            SnpatchError: The ranking has neither statistics nor the recipient's moments.
        """
        if self.statistics is not None:
            return self.statistics.recipient_rms()
        if not {"recipient_mean", "recipient_std"} <= self.moments.keys():
            raise SnpatchError(
                "ranking: expected statistics or moments of the recipient, got none. Make it with Engine.contrast."
            )
        return (self.moments["recipient_mean"].double() ** 2 + self.moments["recipient_std"].double() ** 2).sqrt()

    def energy(self, neurons: "Ranking", window: Window | int | tuple[int, int]) -> float | None:
        """Return the fraction of the model's squared change, the sum of (r - d)^2, that some neurons carry.

        Args:
            neurons: Ranking that has the neurons: this one, or one of its controls.
            window: Window of `neurons`.

        Returns:
            Fraction, 0 to 1; None if this ranking has no statistics of a pair.

        Raises:
            SnpatchError: The shapes differ, or the window is longer than `neurons`.
        """
        window = Window.of(window)
        chosen = self._same_shape(neurons)._first(window.hi)[window.lo :]
        if self.statistics is None or not self.statistics.is_pair:
            return None
        changes = self.statistics.sums[:, 4].flatten()
        return float(changes[chosen].sum() / changes.sum())

    def overlap(self, other: "Ranking", k: int) -> float:
        """Return the fraction of the first k neurons that both rankings share.

        Args:
            other: Ranking of a model of the same shape.
            k: Number of neurons of each ranking, at least 1.

        Returns:
            Fraction, 0 to 1.

        Raises:
            SnpatchError: k is out of range, or the shapes differ.
        """
        if schema.check_argument(k, int, "overlap: k") < 1:
            raise SnpatchError(f"overlap: k: expected at least 1, got {k}")
        return torch.isin(self._first(k), self._same_shape(other)._first(k)).float().mean().item()

    def spearman(self, other: "Ranking", k: int) -> float:
        """Return the rank correlation of the neurons that both first k contain.

        Neurons are re-ranked among the shared ones (the paper's stability).

        Args:
            other: Ranking of a model of the same shape.
            k: Number of neurons of each ranking.

        Returns:
            Spearman's coefficient, -1 to 1.

        Raises:
            SnpatchError: k is out of range, the shapes differ, or fewer than two neurons are shared.
        """
        from snpatch.statistics import spearman  # importing SciPy takes a second, and engines do not need it

        first = self._first(k)
        common = first[torch.isin(first, self._same_shape(other)._first(k))]
        if len(common) < 2:
            raise SnpatchError(f"spearman: expected 2 or more neurons in the first {k} of both, got {len(common)}")
        return spearman(self.rank.flatten()[common], other.rank.flatten()[common])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with `meta` as JSON, atomically.

        Args:
            path: The file.

        Raises:
            SnpatchError: The file's suffix is that of another format, which `load` would read it as.
        """
        check_ranking_suffix(path)
        tensors = {"rank": self.rank, **self.moments}
        if self.scores is not None:
            tensors["scores"] = self.scores
        if self.statistics is not None:
            tensors |= {"sums": self.statistics.sums, "count": self.statistics.count}
        if self.half is not None:
            tensors |= {"half_sums": self.half.sums, "half_count": self.half.count}
        write_tensors(path, tensors, kind="ranking", meta=self.meta)

    @classmethod
    def load(cls, path: str | Path, shape: Shape = None) -> "Ranking":
        """Read a file that `save` wrote, or other formats: see ranking.reading, and from_published for `.pt`.

        Args:
            path: The file.
            shape: (L, F) of the model, or a function that returns it. Required for lists of neurons; for scores whose
                last layers are missing, these layers are not ranked.

        Raises:
            SnpatchError: The file has no order or more than one, a column that is not used, or another model's shape.
        """
        path = Path(schema.check_argument(path, str | Path, "ranking: path"))
        size: Size | None = schema.check_argument(shape() if callable(shape) else shape, Size | None, f"{path}: shape")
        kind = get_suffix(path)
        if kind not in (*TORCH, *NUMPY, *TABLES) and (kind == ".safetensors" or is_safetensors(path)):
            ranking = cls._load_own(path)
        else:
            found = read_neurons(path)
            if isinstance(found, tuple):
                ranking = cls.from_published(path, size and size[0])
            else:
                with error_source(path):
                    ranking = cls._of_neurons(found, size, {"imported": path.name})
        if size is not None and ranking.shape != size:
            raise SnpatchError(f"{path}: expected a ranking of {list(size)}, the model, got {list(ranking.shape)}")
        return ranking

    @classmethod
    def _of_neurons(cls, found: Neurons, shape: Size | None, meta: dict) -> "Ranking":
        if shape is not None and found.shape not in (None, shape):
            raise SnpatchError(f"shape: expected {list(shape)}, the model's, got {list(found.shape)}")
        shape = shape or found.shape or found.size
        if shape is None:
            raise SnpatchError("expected a shape for a list of neurons. Pass shape=(layers, neurons of a layer).")
        if found.size and (found.size[0] > shape[0] or found.size[1] != shape[1]):
            kind = "ranks" if found.scores is None else "scores"
            raise SnpatchError(f"expected {kind} of {list(shape)}, got {list(found.size)}")
        if found.scores is None:
            return cls.from_order(require(found.order), shape, {**meta, **({"tied": found.tied} if found.tied else {})})
        if len(found.scores) < shape[0]:
            logger.warning(
                f"snpatch: {meta.get('imported', 'scores')}: scores of {len(found.scores)} of {shape[0]} layers; the "
                "others are not ranked"
            )
        padded = torch.nn.functional.pad(found.scores, (0, 0, 0, shape[0] - len(found.scores)))
        return cls.from_scores(padded, range(len(found.scores), shape[0]), meta=meta)

    @classmethod
    def _load_own(cls, path: Path) -> "Ranking":
        tensors, meta = read_tensors(path, kind="ranking")
        unknown = set(tensors) - {"rank", "scores", "sums", "count", "half_sums", "half_count", *MOMENTS}
        if "rank" not in tensors or unknown:
            raise SnpatchError(f"{path}: expected a ranking, got a file of {', '.join(sorted(tensors)) or 'nothing'}")
        with error_source(path):
            statistics, half = (_pop_statistics(tensors, prefix) for prefix in ("", "half_"))
        rank, scores, moments = tensors.pop("rank"), tensors.pop("scores", None), tensors
        if statistics is not None and not moments:
            moments = statistics.moments()
        with error_source(path):
            return cls(rank, scores, moments, meta, statistics, half)

    @classmethod
    def from_published(cls, path: str | Path, n_layers: int | None = None) -> "Ranking":
        """Import a `.pt` file of the published code.

        It contains (scores, ranks, first mean, first std, second mean, second std). "first" is the donor and "second"
        the recipient, which generates. The published code leaves out layers with '31' in their name.

        Args:
            path: The file.
            n_layers: Number of layers of the model; missing trailing layers are added, unranked.

        Raises:
            SnpatchError: The file does not contain these six tensors, or it has more than `n_layers` layers.
        """
        published = read_checkpoint(path)
        if not isinstance(published, list | tuple) or len(published) != 6:
            raise SnpatchError(f"{path}: expected the published 6-tuple, got {type(published).__name__}")
        types, (scores, order, *moments) = (*FLOATS, torch.float64), published
        scores, *moments = (
            check_tensor(tensor, f"{path}: tensor {i}", *types, used=torch.float32)
            for i, tensor in zip((0, 2, 3, 4, 5), (scores, *moments), strict=True)
        )
        if scores.dim() != 2 or any(moment.shape != scores.shape for moment in moments):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (scores, *moments))
            raise SnpatchError(f"{path}: expected scores and moments of one shape [layers, neurons], got {shapes}")
        missing = (n_layers or len(scores)) - len(scores)
        if missing < 0:
            raise SnpatchError(f"{path}: expected at most the model's {n_layers} layers, got {len(scores)}")
        padded = [torch.nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (scores, *moments)]
        names = ("donor_mean", "donor_std", "recipient_mean", "recipient_std")
        rows, columns = padded[0].shape
        with error_source(path):
            return cls.from_order(
                order,
                (rows, columns),
                scores=padded[0],
                moments=dict(zip(names, padded[1:], strict=True)),
                meta={"imported": Path(path).name, "positions": "completion"},
            )

    @cached_property
    def _order(self) -> Tensor:
        """Return flat neuron indices [n] int64 in order of rank."""
        order = torch.argsort(self.rank.flatten().long(), stable=True)
        return order[: int((self.rank != UNRANKED).sum())]

    def _first(self, k: int) -> Tensor:
        if not 0 <= schema.check_argument(k, int, "k") <= len(self):
            raise SnpatchError(f"k: expected 0..{len(self)} (number of ranked neurons), got {k}")
        return self._order[:k]

    def _same_shape(self, other: "Ranking") -> "Ranking":
        if other.shape != self.shape:
            raise SnpatchError(f"ranking: expected another ranking of {list(self.shape)}, got {list(other.shape)}")
        return other

    def _of_control(
        self,
        window: Window | int | tuple[int, int],
        kind: str,
        choose: Callable[[Tensor], Tensor],  # the window's neurons [n] to those of its control [n], as flat indices
        meta: dict | None = None,
    ) -> "Ranking":
        neurons = self._first((window := Window.of(window)).hi)[window.lo :]
        chosen = choose(neurons)
        overlap = int(torch.isin(chosen, neurons).sum()) / len(neurons) if len(neurons) else 0.0
        origin = {"control": kind, "of": self.fingerprint, "window": [window.lo, window.hi]}
        return Ranking(_build_ranks(chosen, self.shape), meta={**origin, **(meta or {}), "overlap": overlap})

    def _keep(self, mask: Tensor, operation: str, k: int) -> "Ranking":
        return self._of(self._order[mask], {"set_operation": operation, "set_k": k})

    def _of(self, order: Tensor, meta: dict) -> "Ranking":
        """Return a ranking of some of the neurons."""
        rank = _build_ranks(order, self.shape)
        return Ranking(rank, self.scores, self.moments, {**self.meta, **meta}, self.statistics, self.half)


def check_excluded(layers: Sequence[int], n_layers: int) -> None:
    """Raise SnpatchError if a layer does not exist, or if none is left to rank."""
    if len(_layers(layers, n_layers, "exclude_layers")) == n_layers:
        raise SnpatchError(f"exclude_layers: expected a layer to rank, got all {n_layers} excluded. Exclude fewer.")


def _layers(layers: Sequence[int], n_layers: int, name: str) -> list[int]:
    """Return layers counted from the start, each once."""
    layers = schema.check_ints(layers, name)
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise SnpatchError(f"{name}: expected a layer in {-n_layers}..{n_layers - 1}, got {layer}")
    return sorted({layer % n_layers for layer in layers})


def _build_ranks(order: Tensor, shape: tuple[int, int]) -> Tensor:
    rank = torch.full((shape[0] * shape[1],), UNRANKED, dtype=torch.int32)
    rank[order] = torch.arange(len(order), dtype=torch.int32)
    return rank.view(shape)


def _pop_statistics(tensors: dict[str, Tensor], prefix: str) -> Statistics | None:
    """Remove sums and count of this prefix from a file's tensors and return their statistics, or None."""
    sums, count = (tensors.pop(f"{prefix}{name}", None) for name in ("sums", "count"))
    if (sums is None) != (count is None):
        raise SnpatchError(f"expected both {prefix}sums and {prefix}count or neither, got one of them")
    return None if sums is None or count is None else Statistics(sums, count)


def _differs(statistics: Statistics, neurons: Tensor) -> bool:
    """Return whether activations of the two models differ by more than rounding."""
    sums = statistics.sums.transpose(0, 1).flatten(1)[:, neurons]  # [5, n]
    return not len(neurons) or bool(sums[4].max() > (sums[1] + sums[3]).max() * ROUNDING**2)


def check_ranking_suffix(path: str | Path) -> None:
    """Raise for a file that `Ranking.save` would write and `Ranking.load` would read in another format."""
    if (suffix := get_suffix(Path(path))) in (*TABLES, *NUMPY, *TORCH):
        raise SnpatchError(f"{path}: expected a name that ends in .safetensors, got {suffix}. Rename it.")
