"""Cost against k, the paper's main figure: top-k neurons patched into each recipient, with random controls."""

from dataclasses import dataclass

from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config, build_sweep_report
from snpatch.experiments.config import PAPER_K
from snpatch.experiments.context import ExperimentContext
from snpatch.report.report import Report


@dataclass(frozen=True)
class CurveSettings(SweepSettings):
    """Settings of the curve.

    Args:
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        judges: Names of the config's judges; empty for the cost.
    """

    prompts: str = ""
    k: tuple[int | float, ...] = PAPER_K
    judges: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: CurveSettings) -> Report:
    """Sweep k on one prompt set."""
    ranking = context.ranking()
    config = build_sweep_config(context, settings, context.top_windows(settings.k, ranking))
    judges = {name: context.judge(name) for name in settings.judges} or context.cost
    result = context.sweep(
        "curve", settings.prompts or context.config.benchmarks[0], {"safety": ranking}, judges, config
    )
    return build_sweep_report(result, "curve")
