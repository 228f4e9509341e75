"""Preference neurons: how far rankings of other objectives (helpfulness, ...) agree with safety's."""

from snpatch.experiments.stability import Settings, report_of
from snpatch.report.report import Report
from snpatch.worlds.lab import Lab


def run(lab: Lab, settings: Settings) -> Report:
    """Compare the rankings of the world's contrasts pairwise."""
    rankings = {objective: lab.ranking(contrast) for objective, contrast in lab.world.contrasts.items()}
    return report_of(lab, "preference", rankings, settings, "objectives")
