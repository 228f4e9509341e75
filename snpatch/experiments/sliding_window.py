"""Sliding window over ranks: effect of the neurons of rank [i, i + width) for growing i (paper, section 2)."""

from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config, build_sweep_report
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.window import Window
from snpatch.report.report import Report


@dataclass(frozen=True)
class SlidingWindowSettings(SweepSettings):
    """Settings of the sliding window. Numbers of neurons are ints, or floats that are fractions of the ranked neurons.

    Args:
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        width: Neurons per window.
        stride: Ranks between the starts of two windows.
        last: First rank of the last window.
    """

    prompts: str = ""
    width: int | float = 20_000
    stride: int | float = 2_000
    last: int | float = 100_000


def run(context: ExperimentContext, settings: SlidingWindowSettings) -> Report:
    """Sweep the window. Windows that would reach past the ranking are left out with a note."""
    ranking = context.ranking()
    width, stride, last = (
        context.num_neurons(value, ranking) for value in (settings.width, settings.stride, settings.last)
    )
    if width < 1 or stride < 1:
        raise SnpatchError(f"sliding_window: width and stride: expected at least one neuron, got {width} and {stride}")
    starts = range(0, last + 1, stride)
    windows = tuple(Window(start, start + width) for start in starts if start + width <= len(ranking))
    result = context.sweep(
        "sliding_window",
        settings.prompts or context.config.benchmarks[0],
        {"safety": ranking},
        context.cost,
        build_sweep_config(context, settings, windows),
    )
    if len(windows) < len(starts):
        result.notes.append(f"{len(starts) - len(windows)} windows reach past the {len(ranking)} ranked neurons")
    return build_sweep_report(result, "sliding_window")
