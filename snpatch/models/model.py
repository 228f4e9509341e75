"""Model: the weights of a recipient or a donor, and the IA3 vectors on top of them.

Why models are identified by a content hash and not by the user's name for them: stored completions, rankings and slots
on a device belong to a model whatever it is called and whatever else is loaded.
"""

from dataclasses import dataclass
from functools import cached_property

from snpatch.models.adapters import IA3Scales
from snpatch.utils.hashing import hash_bytes


@dataclass(frozen=True)
class Weights:
    """A checkpoint as an engine runs it.

    Attributes:
        name: Folder, or name on the hub.
        checkpoint_fingerprint: Content hash of the checkpoint's files and of the LoRA adapters merged into it.
        revision: Commit of a model from the hub; None for a folder.
        settings: JSON of the dtype and of all other settings that change what the weights compute.
        eos_ids: Tokens that end a completion.
        index: 0 for the engine's primary weights, 1 for its secondary weights.
    """

    name: str
    checkpoint_fingerprint: str
    revision: str | None
    settings: str
    eos_ids: frozenset[int] = frozenset()
    index: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the checkpoint and its settings; it does not depend on the folder's path."""
        return hash_bytes(f"{self.checkpoint_fingerprint} {self.settings}".encode())


@dataclass(frozen=True, eq=False)
class Model:
    """Weights and the IA3 vectors that scale their activations; vectors of ones for the weights alone."""

    weights: Weights
    scales: IA3Scales

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the weights and their IA3 vectors."""
        return hash_bytes(f"{self.weights.fingerprint} {self.scales.fingerprint}".encode())

    @property
    def is_unscaled(self) -> bool:
        """Return whether all IA3 vectors are ones."""
        return self.scales.is_identity

    @cached_property
    def scales_kv(self) -> bool:
        """Return whether the IA3 vectors scale keys or values."""
        return any(bool((v != 1).any()) for module, v in self.scales.vectors.items() if module != "down_proj")
