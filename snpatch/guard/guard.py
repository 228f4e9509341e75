"""Guard: a fitted classifier with its neurons, scaler, coefficients and refusal.

Why it stores arrays instead of scikit-learn objects: a file of tensors needs no pickle, and gives the same bits with
every version of scikit-learn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit
from torch import Tensor

from snpatch.engine import Engine
from snpatch.engine.base import BaseEngine
from snpatch.engine.requests import Prompt
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.guard import fitting
from snpatch.guard.config import GuardConfig
from snpatch.guard.labels import digest_prompt, require_unseen
from snpatch.ranking.ranking import Ranking
from snpatch.utils import schema
from snpatch.utils.files import read_tensors, write_tensors
from snpatch.utils.tensors import is_finite

VECTORS = ("mean", "scale", "coefficients")
MAX_NEURONS = 2**28  # of all layers; a hundred times those of the largest model
PACKAGES = ("snpatch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class _Metadata:
    """The fields of a guard's file that are not tensors."""

    model: str
    fingerprint: str
    shape: tuple[int, ...]
    threshold: float = field(metadata={"above": 0, "below": 1})
    refusal: str
    meta: dict

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or math.prod(self.shape) > MAX_NEURONS:
            raise SnpatchError(f"guard: shape: expected (layers, neurons), got {self.shape}")
        schema.validate(self, "guard: ")
        if not self.refusal.strip():
            raise SnpatchError("guard: refusal: expected a text, got an empty one")


@dataclass(frozen=True, eq=False)
class Guard:
    """A logistic regression on neurons at a prompt's last token that predicts a harmful completion.

    Probability of harm = logistic((features - mean) / scale . coefficients + intercept), in float64.

    Args:
        model: Name of the model whose activations it reads and whose own completions it was fitted to predict.
        fingerprint: Engine.fingerprint of that model.
        neurons: [k, 2] int64, (layer, neuron) in the order of the features.
        shape: (layers, neurons per layer) of the model.
        mean: [k] float64, subtracted from the features.
        scale: [k] float64, divides them.
        coefficients: [k] float64.
        intercept: Added to the product.
        threshold: Prompts with a higher probability are refused.
        refusal: Completion of a refused prompt.
        meta: JSON data of the file: the metadata given to `fit`, and C, class_weight, n (prompts), harmful (how many
            of them), fitted_prompts (digests of their texts), ranking (its fingerprint) and versions.
    """

    model: str
    fingerprint: str
    neurons: Tensor
    shape: tuple[int, int]
    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: float
    threshold: float
    refusal: str
    meta: dict = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        features: ArrayLike | Tensor,  # [prompts, k]
        labels: ArrayLike,  # [prompts], True: harmful
        ranking: Ranking,
        *,
        prompts: Sequence[Prompt],
        model: str,
        fingerprint: str,
        config: GuardConfig | None = None,
        meta: dict | None = None,
    ) -> Self:
        """Fit a guard to captured activations.

        Args:
            features: [prompts, k] activations: `engine.capture(prompts, model, ranking, k)`.
            labels: [prompts] bool, True = harmful.
            ranking: Ranking whose first k neurons the features are.
            prompts: The prompts of the features. The guard remembers digests of them, see `find_unseen`.
            model: Name of the model.
            fingerprint: engine.fingerprint(model).
            config: Settings of the fit and of the decisions.
            meta: JSON data to store in the file.

        Returns:
            The guard.

        Raises:
            SnpatchError: Wrong shapes, NaN, too few prompts of a class, or a fit that does not converge.
        """
        config = config or GuardConfig()
        if len(prompts) != np.size(labels):
            raise SnpatchError(f"guard: prompts: expected one per label ({np.size(labels)}), got {len(prompts)}")
        scaler, classifier = fitting.fit_classifier(features, labels, config).named_steps.values()
        fit_meta = {
            "C": classifier.C,
            "class_weight": config.class_weight,
            "n": np.size(labels),
            "harmful": int(np.sum(labels)),
            "fitted_prompts": sorted(map(digest_prompt, prompts)),
            "ranking": ranking.fingerprint,
            "versions": {name: version(name) for name in PACKAGES},
        }
        return cls(
            model,
            fingerprint,
            ranking.top(len(scaler.mean_)),
            ranking.shape,
            scaler.mean_,
            scaler.scale_,
            classifier.coef_[0],
            float(classifier.intercept_[0]),
            config.threshold,
            config.refusal,
            {**(meta or {}), **fit_meta},
        )

    @property
    def k(self) -> int:
        """Return the number of neurons that the guard reads."""
        return len(self.neurons)

    @cached_property
    def ranking(self) -> Ranking:
        """Return a ranking of the guard's neurons alone, in the order of the features."""
        return Ranking.from_order(self.neurons, self.shape)

    def find_unseen(self, prompts: Sequence[Prompt], name: str) -> np.ndarray:
        """Return the indices of the prompts that the guard was not fitted on. Only they may test it.

        Texts that differ in case, spaces or compatible forms of letters alone are equal.

        Args:
            prompts: Strings, chats or lists of token ids, as they were given to `fit`.
            name: Name of the prompts in the error.

        Returns:
            [n] int.

        Raises:
            SnpatchError: No prompt is left, or the guard's file does not say which prompts it was fitted on.
        """
        fitted = self.meta.get("fitted_prompts")
        if not isinstance(fitted, list):
            raise SnpatchError("guard: meta: expected fitted_prompts, got none. Fit the guard again.")
        return require_unseen(prompts, set(fitted), name, "the prompts that the guard was fitted on")

    def probability(self, features: ArrayLike | Tensor) -> np.ndarray:
        """Predict the probability of harm from captured activations.

        Args:
            features: [prompts, k], see `fit`.

        Returns:
            [prompts] float64.

        Raises:
            SnpatchError: Wrong shapes or NaN.
        """
        x = fitting.validate_features(features, self.k)
        # Row sums instead of a matrix product, so that a prompt's bits do not depend on the batch size.
        return expit(((x - self.mean) / self.scale * self.coefficients).sum(axis=1) + self.intercept)

    def is_harmful(self, features: ArrayLike | Tensor) -> np.ndarray:
        """Decide which prompts to refuse, from captured activations.

        Args:
            features: [prompts, k], see `fit`.

        Returns:
            [prompts] bool, True = refuse.

        Raises:
            SnpatchError: Wrong shapes or NaN.
        """
        return self.probability(features) > self.threshold

    def predict(self, engine: Engine, prompts: Sequence[Prompt], progress: Progress | bool | None = None) -> np.ndarray:
        """Predict the probability of harm of prompts. Each costs one prefill in `model`.

        Args:
            engine: Engine that has the guard's model.
            prompts: Strings, chats or lists of token ids.
            progress: See Engine.generate.

        Returns:
            [prompts] float64.

        Raises:
            SnpatchError: The engine's `model` differs from the one that the guard was fitted on.
        """
        self.check_engine(engine)
        return self.probability(engine.capture(prompts, self.model, self.ranking, self.k, progress=progress))

    def check_engine(self, engine: BaseEngine) -> None:
        """Check that the engine's `model` is the one that the guard was fitted on.

        Args:
            engine: The engine.

        Raises:
            SnpatchError: It differs, or the engine has no such model.
        """
        fingerprint = engine.fingerprint(self.model)
        if fingerprint != self.fingerprint:
            raise SnpatchError(
                f"guard: expected the model {self.model!r} that it was fitted on ({self.fingerprint}), got this "
                f"engine's ({fingerprint}). Use the same weights, adapters, template and dtype, or fit it again."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with JSON metadata, atomically.

        Args:
            path: The file.
        """
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in VECTORS}
        tensors |= {"neurons": self.neurons, "intercept": torch.tensor(self.intercept, dtype=torch.float64)}
        meta = {f.name: getattr(self, f.name) for f in fields(_Metadata)}
        write_tensors(path, tensors, kind="guard", meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote. The guard's probabilities are bit-identical.

        Args:
            path: The file.

        Raises:
            SnpatchError: The file is damaged or contains no guard.
        """
        tensors, meta = read_tensors(path, kind="guard")
        _check_tensors(path, tensors)
        metadata = schema.from_dict(_Metadata, str(path), meta)
        Ranking.from_order(tensors["neurons"], metadata.shape)  # raises unless they are neurons of that shape
        vectors = {name: tensors[name].numpy() for name in VECTORS}
        return cls(neurons=tensors["neurons"], intercept=tensors["intercept"].item(), **vectors, **metadata.__dict__)


def _check_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raise for tensors that `save` would not write. With NaN, no probability would exceed the threshold."""
    dimensions = {"neurons": 2, "intercept": 0, **dict.fromkeys(VECTORS, 1)}
    if {name: tensor.dim() for name, tensor in tensors.items()} != dimensions:
        names = ", ".join(sorted(tensors))
        raise SnpatchError(f"{path}: expected the tensors of a guard ({', '.join(dimensions)}), got {names}")
    if len({len(tensor) for tensor in tensors.values() if tensor.dim()}) > 1:
        raise SnpatchError(f"{path}: expected vectors of one length, got several")
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "neurons" else torch.float64
        if tensor.dtype != dtype:
            raise SnpatchError(f"{path}: {name}: expected {dtype}, got {tensor.dtype}")
        if not is_finite(tensor) or (name == "scale" and not (tensor > 0).all()):
            raise SnpatchError(f"{path}: {name} has values that no fit gives. Fit the guard again.")
