"""SweepConfig: the grid of a sweep. It does not import torch, because the CLI takes its defaults from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.errors import SnpatchError
from snpatch.judges.refusal import REFUSAL_JUDGE
from snpatch.ranking.window import EXTRA_CONTROLS, MAGNITUDE, RANDOM_CONTROLS, Window
from snpatch.sampling import GREEDY, Sampling
from snpatch.utils import schema
from snpatch.utils.schema import option


def check_sampling(sampling: Sampling, context: str) -> None:
    """Raise if the sampling has n above 1, or log-probabilities, which a store does not contain."""
    if sampling.n > 1:
        raise SnpatchError(f"{context}: sampling: n: expected 1, got {sampling.n}. Ask for several samples instead.")
    if sampling.logprobs:
        raise SnpatchError(f"{context}: sampling: logprobs: expected false, as they are not stored. Leave it out.")


@dataclass(frozen=True)
class SweepConfig:
    """Grid of a sweep: recipients x donors x windows x strengths, for every ranking and its random controls.

    Attributes:
        recipients: Models to patch.
        donors: Models whose activations are copied; a str for one.
        windows: Windows over each ranking: Window, k or (lo, hi).
        strengths: Strengths of the patch, see Patch.
        controls: Number of random controls per window; their seeds are 0, 1, ...
        control_kind: How random controls are drawn, see Ranking.random_control.
        extra_controls: Kinds of further controls of each window. "magnitude": the neurons with the largest activations
            of the recipient, see Ranking.magnitude_control. "matched": see Ranking.matched_control. "equal_energy": the
            random controls, with a strength at which they change activations as much as the window does (the sum of
            squares over the contrast's texts).
        disjoint: Draw controls without neurons of the window, or with as few as possible where too few others are left.
        positions: Positions that are patched, see Patch.
        sampling: Sampling of one completion.
        coherence: Let the unpatched recipient and donor read each completion, so that broken texts are counted.
        samples: Completions per prompt, whose scores are averaged. Their seeds count up from the sampling's seed.
        resamples: Bootstrap resamples.
        confidence: Level of the intervals.
        report_k: Window that headlines are about, fixed before any score is seen: the window of the grid whose number
            of neurons is nearest. An int, or a float that is a fraction of the ranked neurons; the default is the
            paper's 5 %.
        harmless: Name of a prompt set of harmless prompts; the share of them that each patch refuses is reported with
            its effects. Empty: none.
        refusal_judge: Name of the judge whose scores below 0 are refusals of harmless prompts.
        cluster_by: Column of the prompt sets whose values are clusters of prompts, such as a category: intervals and
            tests are over clusters. Empty: over prompts.
    """

    recipients: tuple[str, ...]
    donors: tuple[str, ...]
    windows: tuple[Window, ...]
    strengths: tuple[float, ...] = (1.0,)
    controls: int = option(3, "Number of random controls per window.", min=0)
    control_kind: str = option(
        "per_layer",
        "Layers that random controls are drawn from: per_layer (as many neurons of each layer as the window has), "
        "last_layer or everywhere.",
        choices=RANDOM_CONTROLS,
    )
    extra_controls: tuple[str, ...] = option(
        (MAGNITUDE,),
        "Further controls: magnitude (largest activations, no donor needed), matched (nearest activations) or "
        "equal_energy (random neurons that are changed as much). Repeatable.",
        choices=EXTRA_CONTROLS,
    )
    disjoint: bool = True
    coherence: bool = option(True, "Let the unpatched models read each completion, so that broken texts are counted.")
    positions: str | int = option(
        "all",
        "Patched positions: all, prompt, last_prompt_token, completion, completion_shifted, or the index to start "
        "from.",
    )
    sampling: Sampling = GREEDY
    samples: int = option(
        1, "Number of completions per prompt; their scores are averaged. More than 1 needs a temperature.", min=1
    )
    resamples: int = field(default=RESAMPLES, metadata={"min": 1})
    confidence: float = field(default=CONFIDENCE, metadata={"above": 0, "below": 1})
    report_k: int | float = field(default=0.05, metadata={"min": 0})
    harmless: str = ""
    refusal_judge: str = REFUSAL_JUDGE
    cluster_by: str = ""

    if TYPE_CHECKING:  # what the constructor accepts and __post_init__ converts

        def __init__(
            self,
            recipients: str | Sequence[str],
            donors: str | Sequence[str],
            windows: Sequence[Window | int | tuple[int, int]],
            strengths: Sequence[float] = (1.0,),
            controls: int = 3,
            control_kind: str = "per_layer",
            extra_controls: Sequence[str] = (MAGNITUDE,),
            disjoint: bool = True,
            coherence: bool = True,
            positions: str | int = "all",
            sampling: Sampling = GREEDY,
            samples: int = 1,
            resamples: int = RESAMPLES,
            confidence: float = CONFIDENCE,
            report_k: int | float = 0.05,
            harmless: str = "",
            refusal_judge: str = REFUSAL_JUDGE,
            cluster_by: str = "",
        ) -> None: ...

    def __post_init__(self) -> None:
        for name in ("recipients", "donors"):
            models = getattr(self, name)
            object.__setattr__(self, name, (models,) if isinstance(models, str) else tuple(models))
        if not isinstance(self.extra_controls, str):  # a str is an error below
            object.__setattr__(self, "extra_controls", tuple(self.extra_controls))
        object.__setattr__(self, "windows", tuple(Window.of(window) for window in self.windows))
        object.__setattr__(self, "strengths", tuple(float(strength) for strength in self.strengths))
        check_sampling(self.sampling, "sweep")
        if not self.windows or not self.recipients or not self.donors or not self.strengths:
            grid = {"windows": self.windows, "recipients": self.recipients, "donors": self.donors}
            missing = [name for name, values in (grid | {"strengths": self.strengths}).items() if not values]
            raise SnpatchError(f"sweep: {', '.join(missing)}: expected at least one value, got none")
        if not all(map(math.isfinite, self.strengths)):
            raise SnpatchError(f"sweep: strengths: expected finite numbers, got {self.strengths}")
        schema.validate(self, "sweep: ")
        if isinstance(self.report_k, float) and self.report_k > 1:
            raise SnpatchError(
                f"sweep: report_k: expected a number of neurons, or a fraction in 0.0..1.0, got {self.report_k}"
            )
        for recipient in self.recipients:
            if self.donors == (recipient,):
                raise SnpatchError(
                    f"sweep: donors: expected a model that is no recipient, got {recipient!r}. Remove it from the "
                    "recipients."
                )

    @property
    def models(self) -> tuple[str, ...]:
        """All recipients and donors, each once."""
        return tuple(dict.fromkeys((*self.recipients, *self.donors)))
