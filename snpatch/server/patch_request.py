"""What a client asks for besides its prompt, and what is told of it: the patch, the guard, the receipts."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from snpatch.guard.guard import Guard
from snpatch.patching.patch import Patch, speaker
from snpatch.patching.spec import PatchForm
from snpatch.schema import option


@dataclass(frozen=True, kw_only=True)
class PatchRequest(PatchForm):
    """The object `snpatch` of a request."""

    guard: str | None = option(None, "Name of a guard that reads the prompt first, and may refuse it.")


@dataclass(frozen=True)
class Receipt:
    """Of one text. overwrites: the device's own count; positions: patched positions of the text; verified: whether the
    count is what the patch implies (one that was aborted cannot be); harm: the guard's probability; refused: by it."""

    overwrites: int = 0
    positions: int = 0
    verified: bool = False
    harm: float | None = None
    refused: bool = False


@dataclass(eq=False)
class PatchContext:
    """told: how the answer names the patch. receipts: of the texts, in the order in which vLLM asked for them.
    logprobs: values that the texts so far may have."""

    told: str | Mapping
    patch: Patch | str
    guard: Guard | None = None
    receipts: list[Receipt] = field(default_factory=list)
    logprobs: int = 0

    @property
    def recipient(self) -> str:
        """The model that speaks."""
        return speaker(self.patch)

    @property
    def is_plain(self) -> bool:
        """Whether it asks for the base model alone, which nothing has to be written for."""
        return self.patch == "base" and self.guard is None

    def again(self) -> "PatchContext":
        """The same for another request."""
        return PatchContext(self.told, self.patch, self.guard)

    def answer(self) -> dict:
        """What an answer says under `snpatch`. Of several texts the numbers are sums, and each one's stands beside."""
        every = [self._of_one(receipt) for receipt in self.receipts]
        told = {
            "patch": self.told,
            "overwrites": sum(one["overwrites"] for one in every),
            "positions": sum(one["positions"] for one in every),
            "verified": bool(every) and all(one["verified"] for one in every),
        }
        if len(every) == 1:
            return told | every[0]
        return told | {"choices": every}

    def _of_one(self, receipt: Receipt) -> dict:
        told = {"overwrites": receipt.overwrites, "positions": receipt.positions, "verified": receipt.verified}
        if self.guard is not None:
            told |= {"harm": receipt.harm, "refused": receipt.refused}
        return told


CURRENT_PATCH: ContextVar[PatchContext | None] = ContextVar(
    "snpatch_ask", default=None
)  # of the HTTP request that runs
