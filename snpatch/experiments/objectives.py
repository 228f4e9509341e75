"""Objectives: agreement of the rankings of other objectives (helpfulness, ...) with the safety ranking."""

from dataclasses import dataclass

from snpatch.experiments.common.agreement import AgreementSettings, build_agreement_report
from snpatch.experiments.context import ExperimentContext
from snpatch.report.report import Report


@dataclass(frozen=True)
class ObjectivesSettings(AgreementSettings):
    """See AgreementSettings."""


def run(context: ExperimentContext, settings: ObjectivesSettings) -> Report:
    """Compare the rankings of the config's contrasts pairwise."""
    rankings = {objective: context.ranking(contrast) for objective, contrast in context.config.contrasts.items()}
    return build_agreement_report(context, "objectives", rankings, settings, "objectives")
