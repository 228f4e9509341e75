"""Preference neurons: how far rankings of other objectives (helpfulness, ...) agree with safety's."""

from dataclasses import dataclass

from snpatch.experiments.agreement import AgreementSettings, report_of
from snpatch.report.report import Report
from snpatch.worlds.lab import Lab


@dataclass(frozen=True)
class Settings(AgreementSettings):
    """See AgreementSettings."""


def run(lab: Lab, settings: Settings) -> Report:
    """Compare the rankings of the world's contrasts pairwise."""
    rankings = {objective: lab.ranking(contrast) for objective, contrast in lab.world.contrasts.items()}
    return report_of(lab, "preference", rankings, settings, "objectives")
