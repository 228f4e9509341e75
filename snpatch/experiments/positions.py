"""Positions: rankings computed at different token positions, compared by agreement and by effect.

Reports how far the rankings agree and what patching the top k of each recovers.
"""

from dataclasses import dataclass

from snpatch.experiments.common.agreement import AgreementSettings, build_agreement_report
from snpatch.experiments.context import ExperimentContext
from snpatch.names import CONTRAST_POSITIONS
from snpatch.report.report import Report


@dataclass(frozen=True)
class PositionsSettings(AgreementSettings):
    """See AgreementSettings."""

    effect_k: tuple[int | float, ...] = (2_000, 20_000)


def run(context: ExperimentContext, settings: PositionsSettings) -> Report:
    """Rank neurons at each kind of position, compare the rankings, and patch their top neurons."""
    rankings = {positions: context.ranking(positions=positions) for positions in CONTRAST_POSITIONS}
    # Words for positions are not allowed as names of rankings, so those that are patched have a prefix.
    return build_agreement_report(context, "positions", rankings, settings, "kinds of positions", prefix="at ")
