"""Stability: do training runs that differ in their seed alone find the same safety neurons?"""

from dataclasses import dataclass

from snpatch.experiments.agreement import AgreementSettings, report_of
from snpatch.report.report import Report
from snpatch.worlds.lab import Lab


@dataclass(frozen=True)
class Settings(AgreementSettings):
    """See AgreementSettings."""


def run(lab: Lab, settings: Settings) -> Report:
    """Compare the rankings of the world's training seeds pairwise."""
    rankings = {seed: lab.ranking(contrast) for seed, contrast in lab.world.seeds.items()}
    return report_of(lab, "stability", rankings, settings, "training seeds")
