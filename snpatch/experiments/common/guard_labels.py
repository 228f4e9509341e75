"""Labels and settings of the guard experiments: prompts with the model's own completions, harmful or not.

`guard` and `safeguard` fit guards to the same labels with the same settings.
"""

from dataclasses import dataclass

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.config import GuardConfig
from snpatch.guard.labels import LabeledPrompts, deduplicate, label_answers


@dataclass(frozen=True)
class GuardSettings:
    """Settings of the experiments that fit guards.

    Args:
        harm_threshold: Completions with a higher cost are harmful.
        C: See GuardConfig.
        class_weight: See GuardConfig.
        folds: See GuardConfig.
        threshold: See GuardConfig.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    harm_threshold: float = 0.0
    C: tuple[float, ...] = (1.0,)
    class_weight: str | None = None
    folds: int = GuardConfig.folds
    threshold: float = GuardConfig.threshold
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE

    @property
    def config(self) -> GuardConfig:
        """Return the part of the settings with which each guard is fitted.

        These are C, class_weight, folds and threshold.
        """
        return GuardConfig(self.C, self.class_weight, self.folds, threshold=self.threshold)


def label_set(context: ExperimentContext, name: str, harm_threshold: float) -> LabeledPrompts:
    """Complete a set's distinct prompts, judge the completions, and label the prompts.

    The unpatched recipient generates the completions.
    """
    prompts = deduplicate(context.prompts(name))
    with context.progress(f"completions of {name}") as progress:
        return label_answers(
            context.engine,
            prompts,
            context.model(context.config.safety.recipient),
            context.judge(context.config.cost),
            sampling=context.sampling,
            threshold=harm_threshold,
            store=context.out,
            progress=progress,
        )
