"""Model: what a recipient or a donor is: weights, and the vectors that scale what they compute.

Why it is named by content and not by the name that a user gave it: what was kept of a model (texts, rankings, rows on a
device) is that model's, whatever it is called and whatever else is loaded beside it.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from snpatch.models.adapters import Scales


@dataclass(frozen=True)
class Weights:
    """A checkpoint as an engine runs it.

    digest: of its bytes, and of the LoRA adapters that are merged into it; revision: of a model from the hub; settings:
    dtype and what else changes its numbers; eos_ids: tokens that end its texts; place: 0 for an engine's own set of
    weights, 1 for its second.
    """

    name: str
    digest: str
    revision: str | None
    settings: str
    eos_ids: frozenset[int] = frozenset()
    place: int = 0

    @cached_property
    def identity(self) -> str:
        """Names the weights by content, wherever the checkpoint lies."""
        return hashlib.sha256(f"{self.digest} {self.settings}".encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Model:
    """Weights, and the IA3 vectors on top of them: all ones for the weights alone."""

    weights: Weights
    scales: Scales

    @cached_property
    def digest(self) -> str:
        """Names the model by its content."""
        return hashlib.sha256(f"{self.weights.identity} {self.scales.digest}".encode()).hexdigest()[:16]

    @property
    def is_plain(self) -> bool:
        """Whether nothing scales the weights."""
        return self.scales.is_plain

    @cached_property
    def scales_kv(self) -> bool:
        """Whether keys or values are scaled."""
        return any(bool((v != 1).any()) for module, v in self.scales.scale.items() if module != "down_proj")
