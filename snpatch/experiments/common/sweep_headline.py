"""Sentences of a sweep: what the patch does at a k that was fixed in advance, and net of what."""

from collections.abc import Sequence
from dataclasses import asdict

from snpatch.report.formatting import format_interval, format_percent, format_value
from snpatch.sweeps.rows import Row
from snpatch.sweeps.sweep import SweepResult

BROKEN_LIMIT = 0.05  # share of broken texts above which a headline names it


def build_headline(result: SweepResult, label: str = "") -> list[str]:
    """Write one sentence per judge, recipient and ranking: the change of the mean at a fixed k.

    The window is the same for all rankings; `choose_window` does not look at scores. If the gap of donor and recipient
    is not established, the sentence says so instead, because an effect is a fraction of that gap.

    Args:
        result: One slice of a sweep: one set, donor and strength.
        label: Name of the slice.
    """
    sentences, suffix = [], f" ({label})" if label else ""
    for judge in result.judges:
        if not result.is_reported(judge):
            continue
        for recipient in result.config.recipients:
            for ranking in result.rankings:
                row = choose_window(result.line(judge, recipient, ranking), result.config.report_k)
                sentences.append(f"{recipient}: {_describe_row(result, row)}{suffix}.")
    return list(dict.fromkeys(sentences))


def choose_window(rows: Sequence[Row], k: int | float) -> Row:
    """Return the row whose number of neurons is nearest to k, whatever its scores.

    Windows that begin at the top come first, and the window of no neurons comes last.

    Args:
        rows: Rows of one ranking.
        k: Number of neurons, or a float: a fraction of the ranked neurons.
    """

    def distance(row: Row) -> float:
        return abs((row.ranked_fraction or 0.0) - k) if isinstance(k, float) else abs(row.num_patched - k)

    return min(rows, key=lambda row: (row.num_patched == 0, row.rank_lo, distance(row), row.num_patched))


def describe_neurons(row: Row) -> str:
    """Return a row's neurons with both of their fractions."""
    neurons = f"ranks {row.rank_lo} to {row.rank_hi - 1}" if row.rank_lo else f"the top {row.rank_hi} neurons"
    ranked = "" if row.ranked_fraction is None else f", {row.ranked_fraction:.1%} of the ranked"
    return f"{neurons} ({row.neuron_fraction:.1%} of all{ranked})"


def describe_gap(row: Row, donor: str, confidence: float) -> str:
    """Return why a row has no effect: the gap of donor and recipient with its interval."""
    if row.gap is None:
        return f"no prompt has scores of both models, so there is no effect of {donor}"
    bounds = format_interval(asdict(row), "gap")
    certainty = f"{confidence:.0%} CI {bounds}, " if bounds else ""
    t = "" if row.gap_t is None else f": t = {row.gap_t:.1f}"
    return (
        f"the difference of {donor}'s mean {row.judge}, {row.gap:+.2f} ({certainty}{row.prompts} prompts), is not "
        f"established{t}, so no effect is given"
    )


def describe_change(row: Row, baseline: float | None) -> str:
    """Return in which direction, and by how much, a row moves the recipient's mean."""
    change = (row.mean or 0.0) - (baseline or 0.0)
    if not change:
        return f"leave the mean {row.judge} unchanged"
    return f"{'raise' if change > 0 else 'lower'} the mean {row.judge} by {format_value(abs(change))}"


def _describe_row(result: SweepResult, row: Row) -> str:
    if row.effect is None:
        return describe_gap(row, result.donor, result.config.confidence)
    baseline = result.baseline(row.recipient, row.judge).mean
    certainty = f"{result.config.confidence:.0%} CI"
    side = "higher" if (row.gap or 0.0) > 0 else "lower"
    bounds = format_interval(asdict(row), "effect", format_percent)
    return (
        f"{describe_neurons(row)} of ranking {row.ranking} {describe_change(row, baseline)}, "
        f"{format_percent(row.effect)} ({certainty} {bounds}) of the way to {result.donor}, whose mean is "
        f"{format_value(abs(row.gap or 0.0))} {side}; {_describe_controls(row, certainty)}"
        f"{_describe_ceiling(result, row)}{_describe_side_effects(result, row)}"
    )


def _describe_side_effects(result: SweepResult, row: Row) -> str:
    """Return the share of broken texts above BROKEN_LIMIT, and that of harmless prompts that are refused."""
    text = ""
    if row.broken is not None and row.broken > BROKEN_LIMIT:
        effect = "none" if row.effect_coherent is None else format_percent(row.effect_coherent)
        text += f"; {format_percent(row.broken)} of its texts are broken (effect over the other prompts: {effect})"
    if row.harmless_refused is not None:
        before = result.baseline(row.recipient, row.judge).harmless_refused
        text += (
            f"; it refuses {format_percent(row.harmless_refused)} of the harmless prompts (unpatched: "
            f"{format_percent(before)})"
        )
    return text


def _describe_controls(row: Row, certainty: str) -> str:
    """Return the effect net of a row's random controls, with their overlap, and of its magnitude control."""
    magnitude = ""
    if row.net_of_magnitude is not None:
        bounds = format_interval(asdict(row), "net_of_magnitude", format_percent)
        share = f"{format_percent(row.net_of_magnitude)} ({certainty} {bounds})"
        magnitude = f"; net of the neurons with the largest activations: {share}"
    if not row.controls:
        return f"no random control{magnitude}"
    controls = "1 random control" if row.controls == 1 else f"{row.controls} random controls"
    overlap = f" ({row.control_overlap:.1%} of them in the window: conservative)" if row.control_overlap else ""
    bounds = format_interval(asdict(row), "net_effect", format_percent)
    bounds = f" ({certainty} {bounds})" if bounds else ""
    return f"net of {controls}{overlap}: {format_percent(row.net_effect)}{bounds}{magnitude}"


def _describe_ceiling(result: SweepResult, row: Row) -> str:
    """Return the effect of all ranked neurons, the ceiling of a row's effect, if the grid has them."""
    line = result.line(row.judge, row.recipient, row.ranking or "")
    effects = [other.effect for other in line if other.ranked_fraction == 1 and other is not row]
    return f"; all ranked neurons: {format_percent(effects[0])}" if effects and effects[0] is not None else ""
