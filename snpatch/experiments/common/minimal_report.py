"""Report of a search for the smallest neuron set: its answer, the effects that it measured, and its cost."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from snpatch.report.formatting import format_percent, format_with_interval, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.statistics import Interval
from snpatch.sweeps.minimal import MinimalResult


def build_minimal_report(results: Sequence[MinimalResult], target_effect: float) -> Report:
    """Build the report of a search for a minimal set of neurons.

    Table minimal has one row per sampled k; minimal-blocks has one per added block of layers.
    """
    rows = [
        {
            "recipient": result.recipient,
            "donor": result.donor,
            "ranking": result.ranking,
            "k": estimate.k,
            "prompts": estimate.prompts,
            **Interval(estimate.effect, estimate.low, estimate.high).columns("effect"),
            "is_smallest": estimate.k == result.search.k,
        }
        for result in results
        for estimate in result.search.curve
    ]
    blocks = [
        {
            "recipient": result.recipient,
            "ranking": result.ranking,
            "block": block.name,
            "effect": block.effect,
            "completions": block.used,
        }
        for result in results
        for block in result.blocks
    ]
    columns = {
        "recipient": "recipient",
        "ranking": "ranking",
        "k": "k",
        "prompts": "prompts",
        "effect CI": lambda row: format_with_interval(row, "effect", format_percent),
        "": lambda row: "smallest" if row["is_smallest"] else "",
    }
    return Report(
        "minimal",
        {"minimal": rows} | ({"minimal-blocks": blocks} if blocks else {}),
        {"minimal": _plot(results, target_effect)},
        (TableView.from_rows(rows, columns),),
        [sentence for result in results for sentence in _build_headline(result, target_effect)],
    )


def _build_headline(result: MinimalResult, target_effect: float) -> list[str]:
    search, target = result.search, format_percent(target_effect)
    cost = f"{search.used} of {search.full} completions used, in {search.rounds} rounds"
    if search.k is None:
        sentences = [f"{result.recipient}: no k of ranking {result.ranking} recovers {target} ({cost})."]
    else:
        low = "below the grid" if search.low is None else search.low
        high = "above the grid" if search.high is None else search.high
        sentences = [
            f"{result.recipient}: k = {search.k} of ranking {result.ranking} is the smallest k on the grid that "
            f"recovers {target} of the gain of {result.donor} (interval over prompts: {low} .. {high}; {cost})."
        ]
    if result.blocks:
        names = ", ".join(f"{block.name} ({format_percent(block.effect)})" for block in result.blocks)
        sentences.append(
            f"{result.recipient}: blocks of layers of ranking {result.ranking}, largest gain first: {names}."
        )
    return sentences


def _plot(results: Sequence[MinimalResult], target_effect: float) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for result in results:
        curve = result.search.curve
        effects = [point.effect for point in curve]
        errors = [[point.effect - point.low for point in curve], [point.high - point.effect for point in curve]]
        label = to_plot_label(f"{result.recipient}, {result.ranking}")
        axis.errorbar([point.k for point in curve], effects, errors, fmt="o", capsize=3, label=label)
        if result.search.k is not None:
            axis.axvline(result.search.k, linestyle=":", color="tab:gray")
    label = f"{format_percent(target_effect)} of the gain"
    axis.axhline(target_effect, color="tab:green", linestyle="--", label=label)
    axis.set(xlabel="patched neurons (k)", ylabel="causal effect")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
