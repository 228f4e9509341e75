"""SweepConfig: what is swept. Kept free of torch: the CLI takes its defaults from here."""

from dataclasses import dataclass

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.ranking.window import CONTROLS, Window
from snpatch.sampling import GREEDY, Sampling
from snpatch.schema import option


@dataclass(frozen=True)
class SweepConfig:
    """What is swept. windows: Window, k or (lo, hi). controls: random controls of each window, one a seed from 0 on."""

    recipients: tuple[str, ...]
    donor: str
    windows: tuple[Window, ...]
    controls: int = option(3, "Random controls of each ranking.", min=0)
    control_kind: str = option("per_layer", "per_layer, last_layer or everywhere.")
    disjoint: bool = True
    where: str | int = option("all", "all, prompt, generated, or a position to start from.")
    sampling: Sampling = GREEDY
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(Window.of(window) for window in self.windows))
        if not self.windows or not self.recipients:
            raise SnpatchError("sweep: needs at least one window and one recipient")
        if self.controls < 0:
            raise SnpatchError(f"sweep: controls must be at least 0, got {self.controls}")
        if self.control_kind not in CONTROLS:
            raise SnpatchError(f"sweep: control_kind must be one of {', '.join(CONTROLS)}, got {self.control_kind!r}")
        if self.resamples < 1 or not 0 < self.confidence < 1:
            raise SnpatchError("sweep: resamples must be at least 1 and confidence lie between 0 and 1")
        if self.donor in self.recipients:
            raise SnpatchError(f"sweep: {self.donor!r} is recipient and donor")
