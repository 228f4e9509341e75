"""Cost against k, the paper's main figure: top-k neurons patched into each recipient, random ones beside them."""

from dataclasses import dataclass

from snpatch.experiments.sweeps import SweepSettings, report_of, sweep_config
from snpatch.report.report import Report
from snpatch.worlds.lab import Lab

PAPER_K = (0, 200, 400, 600, 800, 1000, 1200, 1500, *range(2000, 10_000, 1000), *range(10_000, 20_001, 2000))


@dataclass(frozen=True)
class Settings(SweepSettings):
    """prompts: a set of the world (default: its first benchmark). k: ints, or floats that are shares of the ranked
    neurons. judges: the world's, by name (default: the cost).
    """

    prompts: str = ""
    k: tuple[int | float, ...] = PAPER_K
    judges: tuple[str, ...] = ()


def run(lab: Lab, settings: Settings) -> Report:
    """Sweep k on one set."""
    ranking = lab.ranking()
    config = sweep_config(lab, settings, lab.windows(settings.k, ranking))
    judges = {name: lab.judge(name) for name in settings.judges} or lab.cost
    result = lab.sweep(settings.prompts or lab.world.benchmarks[0], {"safety": ranking}, judges, config)
    return report_of(result, "curve")
