"""The patch of a request: its schema, and the context that carries it and its receipts through vLLM's handlers."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from snpatch.guard.guard import Guard
from snpatch.patching.patch import Patch, recipient_name
from snpatch.patching.spec import PatchSchema
from snpatch.utils.schema import option


@dataclass(frozen=True, kw_only=True)
class PatchRequest(PatchSchema):
    """The object `snpatch` of a request."""

    guard: str | None = option(None, "Name of a guard that reads the prompt first and may refuse it.")


@dataclass(frozen=True)
class Receipt:
    """Receipt of one completion.

    Attributes:
        overwrites: Overwritten neurons, counted on the device.
        positions: Patched positions of prompt and completion.
        verified: Whether the count equals what the patch implies. False for an aborted completion.
        harm: The guard's probability.
        refused: Whether the guard refused the prompt.
    """

    overwrites: int = 0
    positions: int = 0
    verified: bool = False
    harm: float | None = None
    refused: bool = False


@dataclass(eq=False)
class PatchContext:
    """The patch of one HTTP request, and the receipts of its completions.

    Attributes:
        label: The patch as responses name it.
        receipts: In the order in which vLLM requested the completions.
        num_logprobs: Log-probabilities that the completions so far may have.
    """

    label: str | Mapping
    patch: Patch | str
    guard: Guard | None = None
    receipts: list[Receipt] = field(default_factory=list)
    num_logprobs: int = 0

    @property
    def recipient(self) -> str:
        """The model that generates."""
        return recipient_name(self.patch)

    @property
    def is_base(self) -> bool:
        """True if only the base model is requested, which needs no slots."""
        return self.patch == "base" and self.guard is None

    def copy(self) -> "PatchContext":
        """Return a context of the same patch without receipts, for another request."""
        return PatchContext(self.label, self.patch, self.guard)

    def to_dict(self) -> dict:
        """Return the object `snpatch` of a response.

        With several completions it has their sums and the list `choices`.
        """
        choices = [self._receipt_to_dict(receipt) for receipt in self.receipts]
        total = {
            "patch": self.label,
            "overwrites": sum(choice["overwrites"] for choice in choices),
            "positions": sum(choice["positions"] for choice in choices),
            "verified": bool(choices) and all(choice["verified"] for choice in choices),
        }
        if len(choices) == 1:
            return total | choices[0]
        return total | {"choices": choices}

    def _receipt_to_dict(self, receipt: Receipt) -> dict:
        values = {"overwrites": receipt.overwrites, "positions": receipt.positions, "verified": receipt.verified}
        if self.guard is not None:
            values |= {"harm": receipt.harm, "refused": receipt.refused}
        return values


CURRENT_PATCH: ContextVar[PatchContext | None] = ContextVar("snpatch_patch", default=None)  # of the running request
