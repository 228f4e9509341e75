"""Guard: a fitted classifier with everything it needs to be used: its neurons, scaler, coefficients and refusal.

Why it keeps arrays and not scikit-learn's objects: a file of tensors needs no pickle, and gives the same bits with
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
from snpatch.ranking.ranking import Ranking
from snpatch.utils import schema
from snpatch.utils.files import read_tensors, write_tensors
from snpatch.utils.tensors import is_finite

VECTORS = ("mean", "scale", "coefficients")
MAX_NEURONS = 2**28  # of a model, in all layers: a hundred times those of the largest
PACKAGES = ("snpatch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class _Rest:
    """What a guard's file holds beside its tensors."""

    model: str
    fingerprint: str
    shape: tuple[int, ...]
    threshold: float
    refusal: str
    meta: dict

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or math.prod(self.shape) > MAX_NEURONS:
            raise SnpatchError(f"guard: shape must be (layers, neurons), got {self.shape}")
        if not 0 < self.threshold < 1:
            raise SnpatchError(f"guard: threshold must lie between 0 and 1, got {self.threshold}")
        if not self.refusal.strip():
            raise SnpatchError("guard: its refusal is empty")


@dataclass(frozen=True, eq=False)
class Guard:
    """Probability of harm = logistic((features - mean) / scale . coefficients + intercept), in float64.

    model: whose activations it reads, and whose own answers it was fitted to predict; digest: its Engine.fingerprint.
    neurons: [k, 2] int64 of (layer, neuron) in the order of the features; shape: (layers, neurons of a layer).
    mean, scale, coefficients: [k]. threshold: a prompt of a higher probability is refused with the text `refusal`.
    meta: JSON data kept in the file: what was given to `fit` (judge, data set, ...), and C, class_weight, n and harmful
    (prompts and how many of them), ranking (its digest) and versions.
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
        model: str,
        fingerprint: str,
        config: GuardConfig | None = None,
        meta: dict | None = None,
    ) -> Self:
        """Fit to what `engine.capture(prompts, model, ranking, k)` gave; digest: engine.fingerprint(model).

        Wrong shapes, NaN, too few prompts of a class and a fit that does not converge are SnpatchErrors.
        """
        config = config or GuardConfig()
        scaler, classifier = fitting.fit_classifier(features, labels, config).named_steps.values()
        found = {
            "C": classifier.C,
            "class_weight": config.class_weight,
            "n": len(labels),
            "harmful": int(np.sum(labels)),
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
            {**(meta or {}), **found},
        )

    @property
    def k(self) -> int:
        """The number of neurons it reads."""
        return len(self.neurons)

    @cached_property
    def ranking(self) -> Ranking:
        """Its neurons alone, in the order of the features."""
        return Ranking.from_order(self.neurons, self.shape)

    def probability(self, features: ArrayLike | Tensor) -> np.ndarray:
        """Probability of harm [prompts] from features [prompts, k]."""
        x = fitting.validate_features(features, self.k)
        # Row sums, not a matrix product: a prompt's bits do not hang on how many stand beside it.
        return expit(((x - self.mean) / self.scale * self.coefficients).sum(axis=1) + self.intercept)

    def is_harmful(self, features: ArrayLike | Tensor) -> np.ndarray:
        """Whether each prompt is to be refused, [prompts] bool, from features [prompts, k]."""
        return self.probability(features) > self.threshold

    def predict(self, engine: Engine, prompts: Sequence[Prompt], progress: Progress | None = None) -> np.ndarray:
        """Probability of harm [prompts] of each prompt, for one prefill of it in `model`.

        An engine in which `model` is not what the guard was fitted on is a SnpatchError.
        """
        self.check_engine(engine)
        return self.probability(engine.capture(prompts, self.model, self.ranking, self.k, progress=progress))

    def check_engine(self, engine: BaseEngine) -> None:
        """An error for an engine in which `model` is not what the guard was fitted on."""
        fingerprint = engine.fingerprint(self.model)
        if fingerprint != self.fingerprint:
            raise SnpatchError(
                f"the guard was fitted on another {self.model!r} ({self.fingerprint}) than this engine's "
                f"({fingerprint}): weights, adapters, template and dtype must be the same, or fit it anew"
            )

    def save(self, path: str | Path) -> None:
        """Write safetensors with the rest as JSON; the file appears whole or not at all."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in VECTORS}
        tensors |= {"neurons": self.neurons, "intercept": torch.tensor(self.intercept, dtype=torch.float64)}
        meta = {f.name: getattr(self, f.name) for f in fields(_Rest)}
        write_tensors(path, tensors, kind="guard", meta=meta)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; its probabilities are the same to the bit."""
        tensors, meta = read_tensors(path, kind="guard")
        _check_tensors(path, tensors)
        rest = schema.from_dict(_Rest, str(path), meta)
        Ranking.from_order(tensors["neurons"], rest.shape)  # an error unless they are neurons of such a model
        vectors = {name: tensors[name].numpy() for name in VECTORS}
        return cls(neurons=tensors["neurons"], intercept=tensors["intercept"].item(), **vectors, **rest.__dict__)


def _check_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """An error for what `save` would not write. NaN above all: no probability would ever be above the threshold."""
    wanted = {"neurons": 2, "intercept": 0, **dict.fromkeys(VECTORS, 1)}
    if {name: tensor.dim() for name, tensor in tensors.items()} != wanted:
        raise SnpatchError(f"{path}: not a guard: it holds {', '.join(sorted(tensors))}")
    if len({len(tensor) for tensor in tensors.values() if tensor.dim()}) > 1:
        raise SnpatchError(f"{path}: its vectors differ in length")
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "neurons" else torch.float64
        if tensor.dtype != dtype:
            raise SnpatchError(f"{path}: {name}: wanted {dtype}, got {tensor.dtype}")
        if not is_finite(tensor) or (name == "scale" and not (tensor > 0).all()):
            raise SnpatchError(f"{path}: {name} holds numbers that no fit gives; fit the guard anew")
