"""Stability: agreement of the safety rankings of training runs that differ only in their seed, and of their effects."""

from dataclasses import dataclass

from snpatch.experiments.common.agreement import AgreementSettings, build_agreement_report
from snpatch.experiments.context import ExperimentContext
from snpatch.report.report import Report


@dataclass(frozen=True)
class StabilitySettings(AgreementSettings):
    """See AgreementSettings."""


def run(context: ExperimentContext, settings: StabilitySettings) -> Report:
    """Compare the rankings of the config's training seeds pairwise."""
    rankings = {seed: context.ranking(contrast) for seed, contrast in context.config.seeds.items()}
    return build_agreement_report(context, "stability", rankings, settings, "training seeds", prefix="seed ")
