"""SweepConfig: what is swept. Kept free of torch: the CLI takes its defaults from here."""

import math
from dataclasses import dataclass

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.ranking.window import CONTROLS, Window
from snpatch.sampling import GREEDY, Sampling
from snpatch.utils.schema import option


def check_texts(sampling: Sampling, where: str) -> None:
    """Raise for a sampling that asks for more than one text, or for what is not kept of a text."""
    if sampling.n > 1:
        raise SnpatchError(f"{where}: sampling: n: expected 1, got {sampling.n}. Ask for several samples instead.")
    if sampling.logprobs:
        raise SnpatchError(f"{where}: sampling: logprobs: expected false, as they are not kept. Leave it out.")


@dataclass(frozen=True)
class SweepConfig:
    """What is swept: recipients x donors x windows x strengths, of every ranking and its random controls.

    donors: or one. windows: Window, k or (lo, hi). strengths: see Patch. controls: random controls of each window, one
    a seed from 0 on. samples: texts of a prompt, whose scores are averaged; the seeds of their sampling count from its
    own.
    """

    recipients: tuple[str, ...]
    donors: tuple[str, ...]
    windows: tuple[Window, ...]
    strengths: tuple[float, ...] = (1.0,)
    controls: int = option(3, "Random controls of each ranking.", min=0)
    control_kind: str = option("per_layer", "per_layer, last_layer or everywhere.")
    disjoint: bool = True
    positions: str | int = option(
        "all", "all, prompt, last_prompt_token, completion, completion_shifted, or a position to start from."
    )
    sampling: Sampling = GREEDY
    samples: int = option(1, "Texts of each prompt, which need a temperature; their scores are averaged.", min=1)
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        for name in ("recipients", "donors"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "windows", tuple(Window.of(window) for window in self.windows))
        object.__setattr__(self, "strengths", tuple(float(strength) for strength in self.strengths))
        check_texts(self.sampling, "sweep")
        if not self.windows or not self.recipients or not self.donors or not self.strengths:
            raise SnpatchError("sweep: needs at least one window, one recipient, one donor and one strength")
        if not all(map(math.isfinite, self.strengths)):
            raise SnpatchError(f"sweep: strengths must be finite, got {self.strengths}")
        if self.controls < 0:
            raise SnpatchError(f"sweep: controls must be at least 0, got {self.controls}")
        if self.control_kind not in CONTROLS:
            raise SnpatchError(f"sweep: control_kind must be one of {', '.join(CONTROLS)}, got {self.control_kind!r}")
        if self.samples < 1:
            raise SnpatchError(f"sweep: samples must be at least 1, got {self.samples}")
        if self.resamples < 1 or not 0 < self.confidence < 1:
            raise SnpatchError("sweep: resamples must be at least 1 and confidence lie between 0 and 1")
        for recipient in self.recipients:
            if self.donors == (recipient,):
                raise SnpatchError(f"sweep: {recipient!r} is recipient and donor")

    @property
    def models(self) -> tuple[str, ...]:
        """All that are patched or copied from, each once."""
        return tuple(dict.fromkeys((*self.recipients, *self.donors)))
