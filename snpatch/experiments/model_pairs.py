"""Model pairs: neurons found by comparing other pairs of models, on the text of either of the two (the paper's D.1).

The patch is always the same, from the donor into each recipient; only the neurons differ.
"""

from dataclasses import dataclass
from itertools import combinations

from snpatch.experiments.common.effects import build_effects_report
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.config import Contrast
from snpatch.experiments.context import ExperimentContext
from snpatch.names import BASE, ROLES
from snpatch.report.report import Report


@dataclass(frozen=True)
class ModelPairsSettings(SweepSettings):
    """Settings of the comparison of model pairs.

    Args:
        models: Models that are compared in pairs; empty for base and the main pair.
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        controls: Random controls.
        extra_controls: See SweepConfig.
    """

    models: tuple[str, ...] = ()
    prompts: str = ""
    k: tuple[int | float, ...] = (20_000,)
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: ModelPairsSettings) -> Report:
    """Rank neurons by each pair of models and each of its two texts, and patch the first k of each."""
    safety = context.config.safety
    models = settings.models or tuple(dict.fromkeys((BASE, safety.recipient, safety.donor)))
    rankings = {
        f"{first}-{second} on text of {first if role == 'recipient' else second}": context.ranking(
            Contrast(first, second, safety.prompts, role)
        )
        for first, second in combinations(models, 2)
        for role in ROLES
    }
    reference = context.ranking()
    config = build_sweep_config(context, settings, context.top_windows(settings.k, reference))
    result = context.sweep(
        "model_pairs", settings.prompts or context.config.benchmarks[0], rankings, context.cost, config
    )
    return build_effects_report(context, "model_pairs", result, rankings, reference)
