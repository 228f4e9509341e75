"""Patch: recipient + donor + ranking + window + where in the text it applies. The one place that says what a patch is.

What names a patch by content, its JSON and the prefix cache's key all come from the fields of `Clause` and `Overwrite`
(`content_of`), so that a further field is in all of them. Why everything is checked when a patch is made: a window past
the ranking or a mean of the wrong shape would otherwise overwrite fewer neurons than the caller believes, and the text
would not show it.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.files import read_tensors, write_tensors
from snpatch.models.model import Model
from snpatch.names import MODES, PLACES, SOURCES
from snpatch.op.plan import NO_END
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.tensors import FLOATS, check_tensor

LARGEST = torch.finfo(torch.float32).max  # factors are float32 on the device
LARGEST_NORMAL = math.sqrt(48 * math.log(2))  # of the noise: reference.normal draws 24 bits


@dataclass(frozen=True, eq=False)
class Constant:
    """A donor that is a fixed value for each neuron: values [L, F] float32. mode "add" adds it to the recipient's."""

    values: Tensor
    mode: str = "replace"

    def __post_init__(self) -> None:
        _check_values(self.values, "constant")
        if self.mode not in MODES:
            raise SnpatchError(f"constant: mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    @classmethod
    def zero(cls, ranking: Ranking) -> "Constant":
        """Zero ablation."""
        return cls(torch.zeros(ranking.shape))

    @classmethod
    def mean(cls, ranking: Ranking, of: str = "recipient") -> "Constant":
        """Mean ablation with the mean that the contrast measured in the "recipient" or the "donor"."""
        return cls(_moment(ranking, f"{of}_mean"))

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self.values)

    @cached_property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return float(self.values.abs().max())

    def save(self, path: str | Path) -> None:
        """Write safetensors; the file appears whole or not at all."""
        write_tensors(path, {"values": self.values.float()}, kind="constant", meta={"mode": self.mode})

    @classmethod
    def load(cls, path: str | Path) -> "Constant":
        """Read what `save` wrote."""
        tensors, meta = read_tensors(path, kind="constant")
        if {*tensors} != {"values"}:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise SnpatchError(f"{path}: not a constant: expected values, got {found}")
        check_tensor(tensors["values"], f"{path}: values", torch.float32)
        return cls(tensors["values"], meta.get("mode", "replace"))


@dataclass(frozen=True, eq=False)
class Noise:
    """A donor that is the recipient's own value plus Gaussian noise: deviation [L, F] float32, seeded."""

    deviation: Tensor
    seed: int = 0

    def __post_init__(self) -> None:
        _check_values(self.deviation, "noise")
        if (self.deviation < 0).any():
            raise SnpatchError("noise: a standard deviation must not be negative")
        if not 0 <= self.seed < 2**31:
            raise SnpatchError(f"noise: seed must lie in 0..2^31-1, got {self.seed}")

    @classmethod
    def of_std(cls, ranking: Ranking, n: float = 3.0, of: str = "recipient", seed: int = 0) -> "Noise":
        """n standard deviations of each neuron, as the contrast measured them in the "recipient" or "donor"."""
        return cls(_moment(ranking, f"{of}_std") * n, seed)

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self.deviation)

    @cached_property
    def magnitude(self) -> float:
        """Largest absolute value that the noise can have."""
        return float(self.deviation.max()) * LARGEST_NORMAL


@dataclass(frozen=True)
class Scale:
    """A donor that is the recipient's own value times a factor."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor, "scale: factor")

    @property
    def fingerprint(self) -> str:
        return repr(float(self.factor))


Source = Constant | Noise | Scale  # what can stand in a donor model's place


@dataclass(frozen=True, eq=False)
class Clause:
    """One overwrite: at the chosen positions the neurons of a window become the donor's. Fields: see Patch."""

    donor: str | Source
    ranking: Ranking
    window: Window | int | tuple[int, int]
    where: str | int = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Window.of(self.window))
        if not isinstance(self.ranking, Ranking):
            raise SnpatchError(f"ranking: expected a Ranking, got {shown(self.ranking)}", field="ranking")
        if not isinstance(self.donor, str | Source):
            message = f"donor: expected a model's name, a Constant, Noise or Scale, got {shown(self.donor)}"
            raise SnpatchError(message, field="donor")
        if isinstance(self.donor, str) and (word := self.donor.partition(":")[0]) in SOURCES:
            message = f"donor {self.donor!r}: {word} is no model's name; in Python give a Constant, Noise or Scale"
            raise SnpatchError(message, field="donor")
        if self.window.hi > len(self.ranking):
            raise SnpatchError(
                f"window [{self.window.lo}, {self.window.hi}) reaches past the ranking's {len(self.ranking)} neurons",
                field="window",
            )
        is_position = isinstance(self.where, int) and abs(self.where) < NO_END
        if not is_position and self.where not in PLACES:
            message = f"where must be one of {', '.join(PLACES)} or a position, got {self.where!r}"
            raise SnpatchError(message, field="where")
        _check_factor(self.strength, "strength", field="strength")
        object.__setattr__(self, "strength", float(self.strength))  # 1 and 1.0 are one content
        if isinstance(self.donor, Scale):
            _check_factor(self.strength * (self.donor.factor - 1), "strength * (scale - 1)", field="strength")
        if isinstance(self.donor, Constant | Noise):
            values = self.donor.values if isinstance(self.donor, Constant) else self.donor.deviation
            if values.shape != self.ranking.rank.shape:
                raise SnpatchError(
                    f"patch: the donor's values are {list(values.shape)}, the ranking is {list(self.ranking.shape)}",
                    field="donor",
                )

    def content(self, name_of: Callable[[str], str]) -> dict:
        """The clause as JSON data, by content. name_of: what stands for a model of this name."""
        found = {f.name: content_of(getattr(self, f.name)) for f in fields(Clause)}
        return found | ({"donor": name_of(self.donor)} if isinstance(self.donor, str) else {})

    def resolved(self, model_of: Callable[[str], Model], prompt_length: int) -> "Overwrite":
        """What it does to a prompt of so many tokens. model_of: the model of a name."""
        source = model_of(self.donor) if isinstance(self.donor, str) else self.donor
        return Overwrite(source, self.ranking, self.window, *self.positions(prompt_length), self.strength)

    def positions(self, prompt_length: int) -> tuple[int, int]:
        """The half-open range of positions that it covers in a request."""
        if self.where == "prompt":
            return 0, prompt_length
        if self.where == "generated":
            return prompt_length, NO_END
        if self.where == "all":
            return 0, NO_END
        return (self.where if self.where >= 0 else max(0, prompt_length + self.where)), NO_END


@dataclass(frozen=True, eq=False)
class Patch:
    """Overwrite the recipient's neurons of a window with the donor's, at the chosen positions.

    recipient: name of the model that speaks. donor: name of the model whose activations are copied, or a
    Constant, Noise or Scale. window: Window, k for the top k, or (lo, hi). where: "all", "prompt", "generated", or
    an int n: from position n on (negative: counted from the prompt's end, -1 is its last token). strength: a neuron
    becomes (1 - strength) * the recipient's + strength * the donor's value: 1 is the paper's exact copy, more
    amplifies what the donor changed, less than 0 reverses it. What is added (noise, constants) is multiplied by it.
    then: further clauses, in order, each applied to what the ones before it left; of one donor model at most.
    """

    recipient: str
    donor: str | Source
    ranking: Ranking
    window: Window | int | tuple[int, int]
    where: str | int = "all"
    strength: float = 1.0
    then: tuple[Clause, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.recipient, str):
            raise SnpatchError(f"recipient: expected a model's name, got {shown(self.recipient)}", field="recipient")
        first = Clause(self.donor, self.ranking, self.window, self.where, self.strength)
        object.__setattr__(self, "window", first.window)
        object.__setattr__(self, "then", tuple(self.then))
        object.__setattr__(self, "clauses", (first, *self.then))
        donors = dict.fromkeys(clause.donor for clause in self.clauses if isinstance(clause.donor, str))
        if len(donors) > 1:
            message = f"patch: its clauses name {len(donors)} donor models ({', '.join(donors)}): one can run"
            raise SnpatchError(message, field="clauses")
        shapes = {clause.ranking.shape for clause in self.clauses}
        if len(shapes) > 1:
            message = f"patch: its rankings are of different models: {', '.join(map(str, sorted(shapes)))}"
            raise SnpatchError(message, field="clauses")

    def content(self, name_of: Callable[[str], str]) -> dict:
        """The patch as JSON data, by content. name_of: what stands for a model of this name."""
        first, *then = (clause.content(name_of) for clause in self.clauses)
        return {"recipient": name_of(self.recipient), **first, **({"clauses": then} if then else {})}

    def resolved(self, model_of: Callable[[str], Model], prompt_length: int) -> "tuple[Overwrite, ...]":
        """What it does to a prompt of so many tokens, clause by clause. model_of: the model of a name."""
        return tuple(clause.resolved(model_of, prompt_length) for clause in self.clauses)


def speaker(patch: Patch | str) -> str:
    """The model that speaks under a patch, or unpatched."""
    return patch if isinstance(patch, str) else patch.recipient


@dataclass(frozen=True, eq=False)
class Overwrite:
    """A clause as an executor applies it: at positions [start, stop) the window's neurons become `factors` of their
    own and the source's values."""

    source: Model | Source
    ranking: Ranking
    window: Window
    start: int
    stop: int
    strength: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """(keep, take): a neuron becomes keep * its own value + take * the source's."""
        if isinstance(self.source, Scale):
            return 1 + self.strength * (self.source.factor - 1), 0.0
        is_added = isinstance(self.source, Noise) or (isinstance(self.source, Constant) and self.source.mode == "add")
        return 1.0 if is_added else 1 - self.strength, self.strength

    def positions(self, fed: int) -> int:
        """How many of a text's first `fed` positions it covers."""
        return max(0, min(self.stop, fed) - self.start)

    @property
    def content(self) -> dict:
        """What it does, as JSON data, by content."""
        return {f.name: content_of(getattr(self, f.name)) for f in fields(self)}


def content_of(value: object) -> object:
    """A field of a patch as JSON data, by content."""
    if isinstance(value, Source):
        return [type(value).__name__, value.fingerprint, getattr(value, "seed", None), getattr(value, "mode", None)]
    if isinstance(value, Ranking | Model):
        return value.fingerprint
    return [value.lo, value.hi] if isinstance(value, Window) else value


def digest_of(content: object) -> str:
    """Names JSON data by its canonical text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _moment(ranking: Ranking, name: str) -> Tensor:
    if name not in ranking.moments:
        have = ", ".join(ranking.moments) or "none"
        raise SnpatchError(f"the ranking holds no {name} (it has: {have}): make it with engine.contrast")
    return ranking.moments[name]


def _check_factor(factor: object, name: str, field: str | None = None) -> None:
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not (is_number and abs(factor) <= LARGEST):  # NaN is not, either
        raise SnpatchError(f"{name} must be a finite number of float32, got {factor!r}", field=field)


def _check_values(values: Tensor, name: str) -> None:
    if values.dim() != 2:
        raise SnpatchError(f"{name}: wanted [layers, neurons], got {list(values.shape)}")
    check_tensor(values, name, *FLOATS, used=torch.float32)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()[:16]
