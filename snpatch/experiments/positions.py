"""Positions: rankings computed at different token positions, compared by agreement and by effect.

Reports how far the rankings agree and what patching the top k of each recovers.
"""

from dataclasses import asdict, dataclass

from snpatch.experiments.common import agreement, sweep_report
from snpatch.experiments.context import ExperimentContext
from snpatch.names import CONTRAST_POSITIONS
from snpatch.report.formatting import format_percent, format_value, format_with_interval
from snpatch.report.report import Report, TableView


@dataclass(frozen=True)
class PositionsSettings(sweep_report.SweepSettings):
    """Settings of the comparison of positions.

    Args:
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: See AgreementSettings.
        more_k: See AgreementSettings.
        effect_k: Numbers of neurons to patch: ints, or floats that are fractions of the ranked neurons.
        controls: Random controls.
    """

    prompts: str = ""
    k: int | float = 20_000
    more_k: tuple[int | float, ...] = agreement.K_FRACTIONS
    effect_k: tuple[int | float, ...] = (2_000, 20_000)
    controls: int = 0


def run(context: ExperimentContext, settings: PositionsSettings) -> Report:
    """Rank neurons at each kind of position, compare the rankings, and patch their top neurons."""
    rankings = {positions: context.ranking(positions=positions) for positions in CONTRAST_POSITIONS}
    agreement_settings = agreement.AgreementSettings(settings.k, settings.more_k)
    agreement_report = agreement.build_agreement_report(
        context, "positions", rankings, agreement_settings, "kinds of positions"
    )
    config = sweep_report.build_sweep_config(
        context, settings, context.top_windows(settings.effect_k, rankings["completion"])
    )
    # Words for positions are not allowed as names of rankings.
    named_rankings = {f"at {positions}": ranking for positions, ranking in rankings.items()}
    result = context.sweep(
        "positions", settings.prompts or context.config.benchmarks[0], named_rankings, context.cost, config
    )
    effect_report = sweep_report.build_sweep_report(result, "positions-effects")
    patched = [asdict(row) for row in result.rows if row.ranking is not None and row.control is None]
    columns = {
        "recipient": "recipient",
        "positions": "ranking",
        "k": "rank_hi",
        "mean cost": "mean",
        f"effect {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "effect", format_percent),
        "overlap with completion": lambda row: _format_overlap(named_rankings, row),
    }
    return Report(
        "positions",
        agreement_report.tables | effect_report.tables,
        agreement_report.plots | effect_report.plots,
        (TableView.from_rows(patched, columns),),
        [*agreement_report.headline, *effect_report.headline],
        records=result.records,
        notes=effect_report.notes,
    )


def _format_overlap(rankings: dict, row: dict) -> str:
    return (
        format_value(rankings[row["ranking"]].overlap(rankings["at completion"], row["rank_hi"]))
        if row["rank_hi"]
        else ""
    )
