"""Specificity: neurons found on other prompt sets, patched on the same benchmark (the paper's C.4)."""

from dataclasses import dataclass, replace

from snpatch.errors import SnpatchError
from snpatch.experiments.common.effects import build_effects_report
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.context import ExperimentContext
from snpatch.report.report import Report


@dataclass(frozen=True)
class SpecificitySettings(SweepSettings):
    """Settings of the specificity.

    Args:
        contrast_prompts: Prompt sets to find neurons on; empty for the safety contrast's and all benchmarks but the
            evaluated one.
        prompts: Prompt set that is evaluated; empty for the first benchmark.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons.
        controls: Random controls.
        extra_controls: See SweepConfig.
    """

    contrast_prompts: tuple[str, ...] = ()
    prompts: str = ""
    k: tuple[int | float, ...] = (2_000, 6_000, 10_000, 14_000, 20_000)
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: SpecificitySettings) -> Report:
    """Rank neurons on each prompt set, and patch the first k of each on one benchmark."""
    config, safety = context.config, context.config.safety
    evaluated = settings.prompts or config.benchmarks[0]
    sources = settings.contrast_prompts or (safety.prompts, *(name for name in config.benchmarks if name != evaluated))
    if evaluated in sources:
        raise SnpatchError(
            f"specificity: contrast_prompts: expected sets other than {evaluated}, which is evaluated, got "
            f"{', '.join(sources)}. Use other rows of it."
        )
    evaluated_prompts = context.prompts(evaluated)
    shared = {name: sum(prompt in evaluated_prompts for prompt in context.prompts(name)) for name in sources}
    rankings = {name: context.ranking(replace(safety, prompts=name)) for name in sources}
    reference = context.ranking()
    sweep_config = build_sweep_config(context, settings, context.top_windows(settings.k, reference))
    result = context.sweep("specificity", evaluated, rankings, context.cost, sweep_config)
    report = build_effects_report(context, "specificity", result, rankings, reference)
    notes = [f"{name}: {count} of its prompts are also evaluated." for name, count in shared.items() if count]
    return replace(report, notes=[*report.notes, *notes])
