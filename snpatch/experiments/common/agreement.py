"""Agreement of rankings: of their top neurons by k, given the activations' sizes, and of the effects of patching them.

Training seeds, objectives and kinds of positions are compared by this one report. Its null is that of ranking.nulls:
rankings of one base model agree even if their changes are unrelated. Effects are compared because rankings whose
overlap is high can differ in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from snpatch.errors import SnpatchError
from snpatch.experiments.common.agreement_plot import plot_agreement
from snpatch.experiments.common.effect_spread import EffectSettings, build_effect_report
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking import nulls
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.reliability import Reliability, compute_reliability, split_halves
from snpatch.report.formatting import format_interval, format_p_value, format_range, format_value, format_with_interval
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import UNDEFINED, Interval, spearman

K_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
ROUNDING = 1e-6  # an overlap is a float32, those of the null are float64
OVERLAP_COLUMNS = {
    "a": "a",
    "b": "b",
    "k": "k",
    "overlap": "overlap",
    "same activations 95%": lambda row: format_with_interval(row, "chance_given_activations"),
    "p": lambda row: format_p_value(row["p_overlap"]),
    "random": "chance",
}
CORRELATION_COLUMNS = {
    "a": "a",
    "b": "b",
    "Spearman": "spearman",
    "same activations 95%": lambda row: format_with_interval(row, "spearman_given_activations"),
    "relative changes": "relative_spearman",
    "signed changes": "signed_correlation",
}
HALVES_COLUMNS = {"ranking": "ranking", "k": "k", **{name: name for name in Reliability.__annotations__}}


@dataclass(frozen=True)
class AgreementSettings(EffectSettings):
    """Settings of a comparison of rankings. With an empty effect_k, no neurons are patched.

    Args:
        k: Number of first neurons that the headline compares: an int, or a fraction of the ranked neurons.
        more_k: Further points of the curve.
    """

    k: int | float = 20_000
    more_k: tuple[int | float, ...] = K_FRACTIONS


def build_agreement_report(
    context: ExperimentContext,
    name: str,
    rankings: Mapping[str, Ranking],
    settings: AgreementSettings,
    compared: str,
    prefix: str = "",
) -> Report:
    """Build the report of a comparison of rankings.

    Args:
        context: The experiment config.
        name: Name of the experiment.
        rankings: Rankings by name.
        settings: The settings.
        compared: The objects whose rankings are compared, in the plural.
        prefix: Put before the rankings' names where they are patched.
    """
    if len(rankings) < 2:
        names = ", ".join(rankings) or "none"
        raise SnpatchError(f"needs at least two {compared} in the experiment config, got {names}")
    first_ranking = next(iter(rankings.values()))
    k = context.num_neurons(settings.k, first_ranking)
    ks = sorted({k, *(context.num_neurons(value, first_ranking) for value in settings.more_k)})
    rows = compare_rankings(rankings, ks)
    rows_at_k = [row for row in rows if row["k"] == k]
    reliability_rows = compare_halves(rankings, ks)
    report = Report(
        name,
        {name: rows, f"{name}-halves": reliability_rows},
        {name: plot_agreement(rows, rankings, k)},
        (
            TableView.from_rows(rows, OVERLAP_COLUMNS, "overlap of the first k neurons"),
            TableView.from_rows(rows_at_k, CORRELATION_COLUMNS, f"correlation at k = {k}, of changes over all neurons"),
            TableView.from_rows(
                [row for row in reliability_rows if row["k"] == k], HALVES_COLUMNS, "halves of prompts"
            ),
        ),
        _build_headline(rows_at_k, [row for row in reliability_rows if row["k"] == k], f"{len(rankings)} {compared}"),
        notes=_list_missing(rankings),
    )
    if not settings.effect_k:
        return report
    effects = build_effect_report(context, name, {f"{prefix}{one}": rankings[one] for one in rankings}, settings)
    return Report(
        name,
        report.tables | effects.tables,
        report.plots | effects.plots,
        (*report.displays, *effects.displays),
        [*report.headline, *effects.headline],
        records=effects.records,
        notes=[*report.notes, *effects.notes],
    )


def compare_rankings(rankings: Mapping[str, Ranking], ks: Sequence[int]) -> list[Row]:
    """Compare each pair of rankings at each k.

    Returns:
        One row per pair and k: overlap |A and B| / k, common (their number), chance (the overlap of random orders),
        chance_given_activations (mean and 95 % range of the null's overlap), p_overlap (of the null reaching the
        overlap), spearman over the common neurons re-ranked among themselves (None for fewer than 2), the same two
        columns for it, relative_spearman (of the relative changes of all neurons) and signed_correlation (Pearson's, of
        (mean d - mean r) / RMS(r)). What needs statistics is None for a ranking without them.
    """
    rows = []
    null_of_pair = nulls.draw_agreement_nulls(rankings, ks)
    for (a, ranking_a), (b, ranking_b) in combinations(rankings.items(), 2):
        null, correlations = null_of_pair.get((a, b)), _correlate_changes(ranking_a, ranking_b)
        for i, k in enumerate(ks):
            overlap = ranking_a.overlap(ranking_b, k)
            common = round(overlap * k)
            rank_correlation = ranking_a.spearman(ranking_b, k) if common > 1 else None
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "k": k,
                    "overlap": overlap,
                    "common": common,
                    "chance": k / len(ranking_a),
                    **_summarize_null(null and null.overlap[:, i]).columns("chance_given_activations"),
                    "p_overlap": _null_p(null and null.overlap[:, i], overlap),
                    "spearman": rank_correlation,
                    **_summarize_null(null and null.spearman[:, i]).columns("spearman_given_activations"),
                    "p_spearman": _null_p(null and null.spearman[:, i], rank_correlation),
                    **correlations,
                }
            )
    return rows


def compare_halves(rankings: Mapping[str, Ranking], ks: Sequence[int]) -> list[Row]:
    """Compare the halves of each ranking's prompts at each k; None for a ranking without halves."""
    rows = []
    for name, ranking in rankings.items():
        halves = split_halves(ranking)
        for k in ks:
            figures = asdict(compute_reliability(halves, k)) if halves else dict.fromkeys(Reliability.__annotations__)
            rows.append({"ranking": name, "k": k, **figures})
    return rows


def _correlate_changes(ranking_a: Ranking, ranking_b: Ranking) -> Row:
    """Return the correlations of relative and of signed changes over the neurons that both rankings rank."""
    figures = {}
    for name, compute, correlate in (
        ("relative_spearman", nulls.relative_changes, spearman),
        ("signed_correlation", nulls.signed_changes, lambda x, y: float(np.corrcoef(x, y)[0, 1])),
    ):
        a, b = compute(ranking_a), compute(ranking_b)
        figures[name] = None
        if a is not None and b is not None:
            x, y = (values[~np.isnan(a) & ~np.isnan(b)] for values in (a, b))
            figures[name] = correlate(x, y) if len(x) > 1 and np.ptp(x) and np.ptp(y) else None
    return figures


def _summarize_null(values: np.ndarray | None) -> Interval:
    """Return mean and 95 % range of a figure's draws [draws], of those in which it is defined."""
    defined = np.array([]) if values is None else values[~np.isnan(values)]
    return (
        Interval(float(defined.mean()), *map(float, np.quantile(defined, [0.025, 0.975])))
        if len(defined)
        else UNDEFINED
    )


def _null_p(values: np.ndarray | None, figure: float | None) -> float | None:
    """Return the one-sided p of a figure: how often the null reaches it, itself counted as one draw."""
    if values is None or figure is None:
        return None
    defined = values[~np.isnan(values)]
    return (1 + int((defined >= figure - ROUNDING).sum())) / (1 + len(defined))


def _build_headline(rows: Sequence[Row], reliability_rows: Sequence[Row], subject: str) -> list[str]:
    """Write the overlap at one k against both nulls, the correlations, and the overlap of halves."""
    tested = [row for row in rows if row["chance_given_activations"] is not None]
    null = f"{format_value(rows[0]['chance'])} for random orders"
    if tested:
        unrelated = _join_ranges(tested, "chance_given_activations")
        null = f"{unrelated} for unrelated changes of the same activations, {null}"
    overlap = f"{subject}: overlap {_format_range_of(rows, 'overlap')} at k = {rows[0]['k']} ({null})"
    correlations = []
    if text := _format_range_of(rows, "spearman"):
        unrelated = _join_ranges(tested, "spearman_given_activations")
        correlations.append(
            f"of the shared neurons {text}" + (f" ({unrelated} for unrelated changes)" if unrelated else "")
        )
    if text := _format_range_of(rows, "relative_spearman"):
        correlations.append(f"of the relative changes of all neurons {text}")
    sentences = [f"{overlap}; {_describe_excess(tested)}." if tested else f"{overlap}."]
    if correlations:
        sentences.append(f"{subject}: Spearman {', '.join(correlations)}.")
    if text := _format_range_of(rows, "signed_correlation"):
        sentences.append(f"{subject}: correlation of the signed changes {text}.")
    if text := _format_range_of(reliability_rows, "overlap"):
        sentences.append(f"{subject}: rankings of two halves of the prompts overlap by {text} at k = {rows[0]['k']}.")
    return sentences


def _describe_excess(rows: Sequence[Row]) -> str:
    """State which pairs overlap more than the null's 95 % range."""
    above = [row for row in rows if row["overlap"] > row["chance_given_activations_high"]]
    is_one = len(rows) == 1
    if not above:
        return f"{'they overlap no' if is_one else 'no pair overlaps'} more than unrelated changes"
    if len(above) == len(rows):
        return f"{'they overlap' if is_one else 'every pair overlaps'} more than unrelated changes"
    names = "; ".join(f"{row['a']}, {row['b']}" for row in above)
    return f"{len(above)} of {len(rows)} pairs overlap more than unrelated changes ({names})"


def _format_range_of(rows: Sequence[Row], name: str) -> str:
    """Return the range of a column, empty if no row has a value."""
    values = [row[name] for row in rows if row[name] is not None]
    return format_range(values) if values else ""


def _join_ranges(rows: Sequence[Row], name: str) -> str:
    """Return the 95 % ranges of several rows as one range, empty if none is defined."""
    defined = [row for row in rows if row[name] is not None]
    if not defined:
        return ""
    low, high = min(row[f"{name}_low"] for row in defined), max(row[f"{name}_high"] for row in defined)
    return format_interval({f"{name}_low": low, f"{name}_high": high}, name)


def _list_missing(rankings: Mapping[str, Ranking]) -> list[str]:
    """Return a note for each ranking that lacks what the null or the halves need."""
    notes = []
    for name, ranking in rankings.items():
        if nulls.relative_changes(ranking) is None:
            notes.append(f"ranking {name} has no statistics of activations: no null, no correlation of changes")
        elif split_halves(ranking) is None:
            notes.append(f"ranking {name} has no statistics of a half of its prompts: no agreement of halves")
    return notes
