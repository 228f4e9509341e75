"""Patch: interventions on a recipient, each with donor, ranking, window, positions and strength.

The content hash of a patch, its JSON and the key of the prefix cache are made from the fields of `Intervention` and
`Overwrite` (`to_json_data`), so a new field is part of all three. Everything is checked when a patch is made, because a
window past the end of the ranking or a mean of the wrong shape would patch fewer neurons than the caller believes, and
the completion would not show it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.models.model import Model
from snpatch.names import MODES, POSITIONS, SOURCES
from snpatch.op.plan import NO_END
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.utils import schema
from snpatch.utils.files import read_tensors, write_tensors
from snpatch.utils.hashing import hash_tensor
from snpatch.utils.tensors import FLOATS, check_tensor

LARGEST_FACTOR = torch.finfo(torch.float32).max  # factors are float32 on the device
ORDER = ". Arguments are (recipient, donor, ranking, window)"
LARGEST_NORMAL = math.sqrt(48 * math.log(2))  # of noise, because reference.normal draws 24 bits


@dataclass(frozen=True, eq=False)
class Constant:
    """Donor that is a fixed value per neuron.

    Attributes:
        values: [L, F] float32.
        mode: "replace", or "add": the values are added to the recipient's activations.
    """

    values: Tensor
    mode: str = field(default="replace", metadata={"choices": MODES})

    def __post_init__(self) -> None:
        schema.validate(self, "constant: ")
        _check_values(self.values, "constant")

    @classmethod
    def zero(cls, ranking: Ranking) -> "Constant":
        """Return zeros, for zero ablation.

        Args:
            ranking: Ranking of the model; its shape is the constant's.
        """
        return cls(torch.zeros(ranking.shape))

    @classmethod
    def mean(cls, ranking: Ranking, of: str = "recipient") -> "Constant":
        """Return the mean activations of a model of a contrast, for mean ablation.

        Args:
            ranking: Ranking of `Engine.contrast`, with moments.
            of: "recipient" or "donor".

        Raises:
            SnpatchError: The ranking has no such mean.
        """
        return cls(_moment(ranking, f"{of}_mean"))

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the values as float32; it does not cover `mode`."""
        return hash_tensor(self.values.float())

    @cached_property
    def magnitude(self) -> float:
        """Return the largest absolute value."""
        return float(self.values.abs().max())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically.

        Args:
            path: The file.
        """
        write_tensors(path, {"values": self.values.float()}, kind="constant", meta={"mode": self.mode})

    @classmethod
    def load(cls, path: str | Path) -> "Constant":
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            SnpatchError: The file is damaged or contains no constant.
        """
        tensors, meta = read_tensors(path, kind="constant")
        if {*tensors} != {"values"}:
            names = ", ".join(sorted(tensors)) or "nothing"
            raise SnpatchError(f"{path}: not a constant: expected values, got {names}")
        check_tensor(tensors["values"], f"{path}: values", torch.float32)
        return cls(tensors["values"], meta.get("mode", "replace"))


@dataclass(frozen=True, eq=False)
class Noise:
    """Donor that is the recipient's own activation plus Gaussian noise.

    Attributes:
        deviation: Standard deviation of each neuron, [L, F] float32.
        seed: Seed, 0 to 2^31 - 1.
    """

    deviation: Tensor
    seed: int = 0

    def __post_init__(self) -> None:
        schema.validate(self, "noise: ")
        _check_values(self.deviation, "noise")
        if (self.deviation < 0).any():
            raise SnpatchError(f"noise: deviation: expected at least 0, got {self.deviation.min().item():.6g}")
        if not 0 <= self.seed < 2**31:
            raise SnpatchError(f"noise: seed: expected 0..2^31-1, got {self.seed}")

    @classmethod
    def of_std(cls, ranking: Ranking, n: float = 3.0, of: str = "recipient", seed: int = 0) -> "Noise":
        """Return noise in proportion to a model's standard deviations in a contrast.

        Args:
            ranking: Ranking of `Engine.contrast`, with moments.
            n: Number of standard deviations.
            of: "recipient" or "donor".
            seed: Seed of the noise.

        Raises:
            SnpatchError: The ranking has no such standard deviations, or the seed is invalid.
        """
        return cls(_moment(ranking, f"{of}_std") * n, seed)

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the deviations as float32; it does not cover `seed`."""
        return hash_tensor(self.deviation.float())

    @cached_property
    def magnitude(self) -> float:
        """Return the largest absolute value that the noise can have."""
        return float(self.deviation.max()) * LARGEST_NORMAL


@dataclass(frozen=True)
class Scale:
    """Donor that is the recipient's own activation times a factor."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor, "scale: factor")

    @property
    def fingerprint(self) -> str:
        """Return the factor as text, equal for 2 and 2.0; there is no tensor to hash."""
        return repr(float(self.factor))


Source = Constant | Noise | Scale  # donors that are not models


@dataclass(frozen=True, eq=False)
class Intervention:
    """One overwrite of a patch: at `positions`, the neurons of a window become the donor's. Fields: see Patch."""

    donor: str | Source
    ranking: Ranking
    window: Window
    positions: str | int = "all"
    strength: float = 1.0

    if TYPE_CHECKING:  # the constructor takes windows in other forms, too

        def __init__(
            self,
            donor: str | Source,
            ranking: Ranking,
            window: Window | int | tuple[int, int],
            positions: str | int = "all",
            strength: float = 1.0,
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.ranking, Ranking):
            raise SnpatchError(f"ranking: expected a Ranking, got {shown(self.ranking)}{ORDER}", field="ranking")
        if not isinstance(self.donor, str | Source):
            message = f"donor: expected a model's name, a Constant, Noise or Scale, got {shown(self.donor)}{ORDER}"
            raise SnpatchError(message, field="donor")
        if isinstance(self.donor, str) and self.donor.partition(":")[0] in SOURCES:
            message = f"donor: expected a model's name, a Constant, Noise or Scale, got {self.donor!r}, a reserved word"
            raise SnpatchError(message, field="donor")
        object.__setattr__(self, "window", Window.of(self.window))
        if self.window.hi > len(self.ranking):
            raise SnpatchError(
                f"window [{self.window.lo}, {self.window.hi}) reaches past the ranking's {len(self.ranking)} neurons",
                field="window",
            )
        is_index = type(self.positions) is int and abs(self.positions) < NO_END
        if not is_index and self.positions not in POSITIONS:
            message = f"positions: expected one of {', '.join(POSITIONS)} or an index, got {self.positions!r}"
            raise SnpatchError(message, field="positions")
        _check_factor(self.strength, "strength", field="strength")
        object.__setattr__(self, "strength", float(self.strength))  # 1 and 1.0 have the same content
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
        """Return the intervention as JSON data. name_of: maps a model's name to what identifies the model."""
        data = {f.name: to_json_data(getattr(self, f.name)) for f in fields(Intervention)}
        return data | ({"donor": name_of(self.donor)} if isinstance(self.donor, str) else {})

    def resolved(self, model_of: Callable[[str], Model], prompt_length: int) -> "Overwrite":
        """Return what an executor does for a prompt of `prompt_length` tokens.

        model_of: maps a name to its Model.
        """
        source = model_of(self.donor) if isinstance(self.donor, str) else self.donor
        return Overwrite(source, self.ranking, self.window, *self.position_range(prompt_length), self.strength)

    def position_range(self, prompt_length: int) -> tuple[int, int]:
        """Return the half-open range of positions that are patched in a request."""
        if isinstance(self.positions, int):
            return self.positions if self.positions >= 0 else max(0, prompt_length + self.positions), NO_END
        return {
            "all": (0, NO_END),
            "prompt": (0, prompt_length),
            "last_prompt_token": (prompt_length - 1, prompt_length),
            "completion": (prompt_length, NO_END),
            "completion_shifted": (prompt_length - 1, NO_END),
        }[self.positions]


@dataclass(frozen=True, eq=False, init=False)
class Patch:
    """Interventions on one recipient: neurons of a window become the donor's at the chosen positions.

    `Patch(recipient, donor, ranking, window, positions, strength)` makes one intervention,
    `Patch(recipient, interventions=[...])` makes several. They are applied in order, each to the result of the
    previous one, and name at most one donor model.

    Args:
        recipient: Name of the model that is patched and generates.
        donor: Name of the model whose activations are copied, or a Constant, Noise or Scale.
        ranking: Order of the neurons.
        window: Ranks to patch: k for the top k, (lo, hi) or a Window.
        positions: "all", "prompt", "last_prompt_token", "completion" (tokens of the completion),
            "completion_shifted" (the positions that predict them), or an index n: from position n on. A negative n
            counts from the end of the prompt, -1 is its last token.
        strength: A neuron becomes (1 - strength) * the recipient's + strength * the donor's value. 1 is the paper's
            exact copy, more amplifies the donor's change, less than 0 reverses it. Added donors (noise, constants of
            mode "add") are multiplied by it.
        interventions: All interventions, in place of the arguments from donor to strength.

    Raises:
        SnpatchError: An argument has another type, a window is longer than its ranking, or the interventions name two
            donor models.
    """

    recipient: str
    interventions: tuple[Intervention, ...]

    def __init__(
        self,
        recipient: str,
        donor: str | Source | None = None,
        ranking: Ranking | None = None,
        window: Window | int | tuple[int, int] | None = None,
        positions: str | int = "all",
        strength: float = 1.0,
        *,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        if not isinstance(recipient, str):
            raise SnpatchError(f"recipient: expected a model's name, got {shown(recipient)}{ORDER}", field="recipient")
        single: tuple[Any, ...] = (donor, ranking, window, positions, strength)
        if not interventions:
            interventions = [Intervention(*single)]  # raises for an argument that is None
        elif single != (None, None, None, "all", 1.0):
            raise SnpatchError("patch: expected either one donor, ranking and window, or interventions, got both")
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                message = f"interventions: expected Intervention(donor, ranking, window), got {shown(intervention)}"
                raise SnpatchError(message, field="interventions")
        object.__setattr__(self, "recipient", recipient)
        object.__setattr__(self, "interventions", tuple(interventions))
        donors = dict.fromkeys(part.donor for part in self.interventions if isinstance(part.donor, str))
        if len(donors) > 1:
            message = f"patch: interventions: expected at most one donor model, got {', '.join(donors)}"
            raise SnpatchError(message, field="interventions")
        shapes = {intervention.ranking.shape for intervention in self.interventions}
        if len(shapes) > 1:
            listed = ", ".join(map(str, sorted(shapes)))
            message = f"patch: interventions: expected rankings of one model, got the shapes {listed}"
            raise SnpatchError(message, field="interventions")

    @property
    def donor(self) -> str | Source:
        """Return the first intervention's donor; likewise `ranking`, `window`, ..."""
        return self.interventions[0].donor

    @property
    def ranking(self) -> Ranking:
        """Return the first intervention's ranking; the others' may differ in order, but not in shape."""
        return self.interventions[0].ranking

    @property
    def window(self) -> Window:
        """Return the first intervention's window, as a Window even if it was given as k or (lo, hi)."""
        return self.interventions[0].window

    @property
    def positions(self) -> str | int:
        """Return the first intervention's positions: one of POSITIONS, or the index from which on it patches."""
        return self.interventions[0].positions

    @property
    def strength(self) -> float:
        """Return the first intervention's strength; 1.0 is an exact copy of a donor model's values."""
        return self.interventions[0].strength

    def content(self, name_of: Callable[[str], str]) -> dict:
        """Return the patch as JSON data. name_of: maps a model's name to what identifies the model."""
        interventions = [intervention.content(name_of) for intervention in self.interventions]
        parts = interventions[0] if len(interventions) == 1 else {"interventions": interventions}
        return {"recipient": name_of(self.recipient), **parts}

    def resolved(self, model_of: Callable[[str], Model], prompt_length: int) -> "tuple[Overwrite, ...]":
        """Return what an executor does for a prompt of `prompt_length` tokens.

        model_of: maps a name to its Model.
        """
        return tuple(intervention.resolved(model_of, prompt_length) for intervention in self.interventions)


def recipient_name(patch: Patch | str) -> str:
    """Return the name of the model that generates under a patch, or unpatched."""
    return patch if isinstance(patch, str) else patch.recipient


@dataclass(frozen=True, eq=False)
class Overwrite:
    """An intervention as an executor applies it.

    At positions [start, stop), the window's neurons become `factors` of their own and the source's values.
    """

    source: Model | Source
    ranking: Ranking
    window: Window
    start: int
    stop: int
    strength: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """Return (keep, take): a neuron becomes keep * its own value + take * the source's."""
        if isinstance(self.source, Scale):
            return 1 + self.strength * (self.source.factor - 1), 0.0
        is_added = isinstance(self.source, Noise) or (isinstance(self.source, Constant) and self.source.mode == "add")
        return 1.0 if is_added else 1 - self.strength, self.strength

    def num_positions(self, fed: int) -> int:
        """Return how many of the first `fed` positions are patched."""
        return max(0, min(self.stop, fed) - self.start)

    @property
    def content(self) -> dict:
        """Return the overwrite as JSON data."""
        return {f.name: to_json_data(getattr(self, f.name)) for f in fields(self)}


def to_json_data(value: object) -> object:
    """Return a field of a patch as JSON data; tensors and models by their content hash."""
    if isinstance(value, Source):
        return [type(value).__name__, value.fingerprint, getattr(value, "seed", None), getattr(value, "mode", None)]
    if isinstance(value, Ranking | Model):
        return value.fingerprint
    return [value.lo, value.hi] if isinstance(value, Window) else value


def _moment(ranking: Ranking, name: str) -> Tensor:
    if name not in ranking.moments:
        have = ", ".join(ranking.moments) or "none"
        raise SnpatchError(f"the ranking holds no {name} (it has: {have}): make it with engine.contrast")
    return ranking.moments[name]


def _check_factor(factor, name: str, field: str | None = None) -> None:
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not abs(factor) <= LARGEST_FACTOR:  # NaN is not, either
        raise SnpatchError(f"{name}: expected a finite number of float32, got {factor!r}", field=field)


def _check_values(values: Tensor, name: str) -> None:
    if values.dim() != 2:
        raise SnpatchError(f"{name}: expected [layers, neurons], got {list(values.shape)}")
    check_tensor(values, name, *FLOATS, used=torch.float32)
