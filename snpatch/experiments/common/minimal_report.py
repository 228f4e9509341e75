"""What a search for the smallest neuron set tells: its answer, the curve that it saw, and what it cost."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from snpatch.report.formatting import format_interval, format_percent, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.sweeps.minimal import MinimalResult


def build_minimal_report(results: Sequence[MinimalResult], share: float) -> Report:
    """minimal: a row a window that was looked at; minimal-blocks: a row a block that was added."""
    rows = [
        {
            "recipient": one.recipient, "donor": one.donor, "ranking": one.ranking, "k": seen.k,
            "prompts": seen.prompts, "effect": seen.effect, "effect_low": seen.low, "effect_high": seen.high,
            "is_smallest": seen.k == one.search.k,
        }
        for one in results
        for seen in one.search.curve
    ]  # fmt: skip
    blocks = [
        {"recipient": one.recipient, "ranking": one.ranking, "block": b.name, "effect": b.effect, "completions": b.used}
        for one in results
        for b in one.blocks
    ]
    columns = {
        "recipient": "recipient",
        "ranking": "ranking",
        "k": "k",
        "prompts seen": "prompts",
        "effect": lambda row: format_percent(row["effect"]),
        "interval": lambda row: format_interval(row, "effect", format_percent),
        "": lambda row: "smallest" if row["is_smallest"] else "",
    }
    tables = {"minimal": rows} | ({"minimal-blocks": blocks} if blocks else {})
    return Report(
        "minimal",
        tables,
        {"minimal": _plot(results, share)},
        (TableView.from_rows(rows, columns),),
        [sentence for one in results for sentence in _sentences(one, share)],
    )


def _sentences(one: MinimalResult, share: float) -> list[str]:
    found = one.search
    cost = f"{found.used} completions in {found.rounds} rounds; the whole grid has {found.full}"
    if found.k is None:
        sentences = [f"{one.recipient}: no k of {one.ranking} recovers {format_percent(share)} ({cost})."]
    else:
        ends = ("below the grid" if found.low is None else found.low, "no end" if found.high is None else found.high)
        sentences = [
            f"{one.recipient}: {found.k} neurons by {one.ranking} are the fewest of the grid that recover "
            f"{format_percent(share)} of {one.donor}'s gain (for prompts like these: {ends[0]} .. {ends[1]}; {cost})."
        ]
    if one.blocks:
        names = ", ".join(f"{block.name} ({format_percent(block.effect)})" for block in one.blocks)
        sentences.append(f"{one.recipient}: blocks of {one.ranking} in the order in which they add most: {names}.")
    return sentences


def _plot(results: Sequence[MinimalResult], share: float) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for one in results:
        seen = one.search.curve
        middles = [point.effect for point in seen]
        errors = [[p.effect - p.low for p in seen], [p.high - p.effect for p in seen]]
        name = to_plot_label(f"{one.recipient}, {one.ranking}")
        axis.errorbar([p.k for p in seen], middles, errors, fmt="o", capsize=3, label=name)
        if one.search.k is not None:
            axis.axvline(one.search.k, linestyle=":", color="tab:gray")
    axis.axhline(share, color="tab:green", linestyle="--", label=f"{format_percent(share)} of the gain")
    axis.set(xlabel="patched neurons (k)", ylabel="causal effect")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
