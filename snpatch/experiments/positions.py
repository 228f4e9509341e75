"""Which positions tell: rankings over the prompt, its last token, emitted and emitting tokens, compared.

Both ways: how far they agree, and what patching the top k of each recovers.
"""

from dataclasses import asdict, dataclass

from snpatch.experiments import agreement, sweeps
from snpatch.names import POSITIONS
from snpatch.report.cells import cell, percent, span
from snpatch.report.report import Report, View
from snpatch.worlds.context import ExperimentContext


@dataclass(frozen=True)
class Settings(sweeps.SweepSettings):
    """k, more_k: see AgreementSettings; effect_k: the k that are patched."""

    prompts: str = ""
    k: int | float = 20_000
    more_k: tuple[int | float, ...] = agreement.SHARES
    effect_k: tuple[int | float, ...] = (2_000, 20_000)
    controls: int = 0


def run(context: ExperimentContext, settings: Settings) -> Report:
    """Rank by each kind of position, compare, patch."""
    rankings = {at: context.ranking(at=at) for at in POSITIONS}
    agreeing = agreement.report_of(context, "positions", rankings, settings, "kinds of positions")
    config = sweeps.sweep_config(context, settings, context.windows(settings.effect_k, rankings["emitted"]))
    patched_at = {f"at {at}": ranking for at, ranking in rankings.items()}  # a position is no ranking's name
    result = context.sweep(settings.prompts or context.config.benchmarks[0], patched_at, context.cost, config)
    effects = sweeps.report_of(result, "positions-effects")
    patched = [asdict(row) for row in result.rows if row.ranking is not None and row.control_seed is None]
    columns = {
        "recipient": "recipient",
        "positions": "ranking",
        "k": "hi",
        "mean cost": "mean",
        "effect": lambda row: percent(row["effect"]),
        "interval": lambda row: span(row, "effect", percent),
        "agreement with emitted at k": lambda row: _overlap(patched_at, row),
    }
    return Report(
        "positions",
        agreeing.tables | effects.tables,
        agreeing.plots | effects.plots,
        View.of(patched, columns),
        [*agreeing.headline, *effects.headline],
        records=result.records,
    )


def _overlap(rankings: dict, row: dict) -> str:
    return cell(rankings[row["ranking"]].overlap(rankings["at emitted"], row["hi"])) if row["hi"] else ""
