"""Preference neurons: how far rankings of other objectives (helpfulness, ...) agree with safety's."""

from dataclasses import dataclass

from snpatch.experiments.stability import SHARES, report_of
from snpatch.lab import Lab
from snpatch.report import Report


@dataclass(frozen=True)
class Settings:
    """k: what the sentence is about; more_k: further points of the curve. Ints, or shares of the ranked neurons."""

    k: int | float = 20_000
    more_k: tuple[int | float, ...] = SHARES


def run(lab: Lab, settings: Settings) -> Report:
    """Compare the rankings of the world's contrasts pairwise."""
    rankings = {objective: lab.ranking(contrast) for objective, contrast in lab.world.contrasts.items()}
    return report_of(lab, "preference", rankings, settings, "objectives")
