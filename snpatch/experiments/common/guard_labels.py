"""Labels in experiments: a set's prompts with the answers of the config's generator, harmful or not.

Why apart from `guard`: safeguard fits its guard on the same labels, with the same settings.
"""

from dataclasses import dataclass

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.experiments.context import ExperimentContext
from snpatch.guard.config import GuardConfig
from snpatch.guard.labels import LabeledPrompts, deduplicate, label_answers


@dataclass(frozen=True)
class GuardSettings:
    """What guard and safeguard have in common. harm_threshold: the cost above which an answer is harmful. The rest: see
    GuardConfig.
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
        return GuardConfig(self.C, self.class_weight, self.folds, threshold=self.threshold)


def label_set(context: ExperimentContext, name: str, harm_threshold: float) -> LabeledPrompts:
    """A set's prompts with the generator's own answers, judged. A prompt that repeats in its set counts once."""
    prompts = deduplicate(context.prompts(name))
    with context.progress(f"answers to {name}") as progress:
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
