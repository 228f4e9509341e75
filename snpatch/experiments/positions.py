"""Rankings over the prompt, its last token, the completion and the positions that predict it, compared.

Both ways: how far they agree, and what patching the top k of each recovers.
"""

from dataclasses import asdict, dataclass

from snpatch.experiments.common import agreement, sweep_report
from snpatch.experiments.context import ExperimentContext
from snpatch.names import CONTRAST_POSITIONS
from snpatch.report.formatting import format_interval, format_percent, format_value
from snpatch.report.report import Report, TableView


@dataclass(frozen=True)
class Settings(sweep_report.SweepSettings):
    """k, more_k: see AgreementSettings; effect_k: the k that are patched."""

    prompts: str = ""
    k: int | float = 20_000
    more_k: tuple[int | float, ...] = agreement.SHARES
    effect_k: tuple[int | float, ...] = (2_000, 20_000)
    controls: int = 0


def run(context: ExperimentContext, settings: Settings) -> Report:
    """Rank by each kind of position, compare, patch."""
    rankings = {positions: context.ranking(positions=positions) for positions in CONTRAST_POSITIONS}
    agreeing = agreement.build_agreement_report(context, "positions", rankings, settings, "kinds of positions")
    config = sweep_report.build_sweep_config(
        context, settings, context.top_windows(settings.effect_k, rankings["completion"])
    )
    # A word for positions cannot be the name of a ranking.
    patched_at = {f"at {positions}": ranking for positions, ranking in rankings.items()}
    result = context.sweep(settings.prompts or context.config.benchmarks[0], patched_at, context.cost, config)
    effects = sweep_report.build_sweep_report(result, "positions-effects")
    patched = [asdict(row) for row in result.rows if row.ranking is not None and row.control_seed is None]
    columns = {
        "recipient": "recipient",
        "positions": "ranking",
        "k": "rank_hi",
        "mean cost": "mean",
        "effect": lambda row: format_percent(row["effect"]),
        "interval": lambda row: format_interval(row, "effect", format_percent),
        "agreement with completion at k": lambda row: _overlap(patched_at, row),
    }
    return Report(
        "positions",
        agreeing.tables | effects.tables,
        agreeing.plots | effects.plots,
        (TableView.from_rows(patched, columns),),
        [*agreeing.headline, *effects.headline],
        records=result.records,
    )


def _overlap(rankings: dict, row: dict) -> str:
    return (
        format_value(rankings[row["ranking"]].overlap(rankings["at completion"], row["rank_hi"]))
        if row["rank_hi"]
        else ""
    )
