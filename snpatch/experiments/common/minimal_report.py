"""Report of a search for the smallest neuron set: its answer, the effects that it measured, and its cost.

Why a sentence says "smallest" only under conditions: the search does not measure every smaller k unless it is asked to.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from snpatch.report.formatting import format_percent, format_with_interval, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.statistics import Interval
from snpatch.sweeps.minimal import MinimalResult

VERDICTS = {True: "suffices", False: "too small", None: "undecided"}


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
            "suffices": estimate.suffices,
            "clipped": estimate.clipped,
            "is_answer": estimate.k == result.search.k,
            "conflict": estimate.k in result.search.conflict,
        }
        for result in results
        for estimate in result.search.curve
    ]
    blocks = [
        {
            "recipient": result.recipient,
            "ranking": result.ranking,
            "block": block.name,
            **block.effect.columns("effect"),
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
        "effect CI": _format_effect,
        "verdict": lambda row: VERDICTS[row["suffices"]],
        "": lambda row: "answer" if row["is_answer"] else "contradicts a rising effect" if row["conflict"] else "",
    }
    return Report(
        "minimal",
        {"minimal": rows} | ({"minimal-blocks": blocks} if blocks else {}),
        {"minimal": _plot(results, target_effect)},
        (TableView.from_rows(rows, columns),),
        [sentence for result in results for sentence in _build_headline(result, target_effect)],
        notes=[note for result in results for note in _build_notes(result)],
    )


def _format_effect(row: dict) -> str:
    """Return the effect with its interval, whose sides may be open."""
    low, high = ("open" if row[name] is None else format_percent(row[name]) for name in ("effect_low", "effect_high"))
    return f"{format_percent(row['effect'])} [{low} .. {high}]"


def _build_headline(result: MinimalResult, target_effect: float) -> list[str]:
    search, target = result.search, format_percent(target_effect)
    cost = f"{search.used} of {search.full} completions used, in {search.rounds} rounds"
    contrary = f"the effect does not rise with k (see k = {', '.join(map(str, search.conflict))})"
    if search.k is None:
        subject = f"{result.recipient}: no k of ranking {result.ranking}"
        if search.conflict:
            sentences = [f"{subject} was found that recovers {target}, but {contrary} ({cost})."]
        else:
            condition = "if the effect rises with k" if search.monotone else "each k was tested"
            sentences = [f"{subject} recovers {target} ({cost}); {condition}."]
    else:
        low = "above the grid" if search.low is None else search.low
        high = "above the grid" if search.high is None else search.high
        about = f"{target} of the gain of {result.donor} (interval over prompts: {low} .. {high}; {cost})"
        subject = f"{result.recipient}: k = {search.k} of ranking {result.ranking}"
        if search.conflict:
            sentences = [f"{subject} recovers {about}. A smaller k may recover it, too, because {contrary}."]
        else:
            condition = "if the effect rises with k" if search.monotone else "each smaller k was tested"
            sentences = [f"{subject} is the smallest k on the grid that recovers {about}; {condition}."]
    if result.blocks:
        blocks = ((block.name, block.effect.columns("effect")) for block in result.blocks)
        names = ", ".join(f"{name} ({format_with_interval(row, 'effect', format_percent)})" for name, row in blocks)
        used = sum(block.used for block in result.blocks)
        sentences.append(
            f"{result.recipient}: blocks of layers of ranking {result.ranking}, largest gain first, with the effect "
            f"of all up to each on prompts that did not choose them: {names} ({used} completions)."
        )
    return sentences


def _build_notes(result: MinimalResult) -> list[str]:
    search, about = result.search, f"{result.recipient}, ranking {result.ranking}"
    notes = []
    if search.conflict:
        ks = ", ".join(map(str, search.conflict))
        notes.append(
            f"{about}: the search assumed that the effect rises with k, and k = {ks} contradict it. Search with "
            "--no-monotone, which tests every smaller k by itself."
        )
    clipped = {estimate.k: estimate.clipped for estimate in search.curve if estimate.clipped}
    if clipped:
        ks = ", ".join(map(str, clipped))
        notes.append(
            f"{about}: {sum(clipped.values())} scores of k = {ks} are outside the range assumed from the unpatched "
            "models. They are cut to it, and nothing that they contradict is decided before all prompts are read. "
            "Give the judge's own bounds by --score-range."
        )
    return notes


def _plot(results: Sequence[MinimalResult], target_effect: float) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for result in results:
        curve = result.search.curve
        effects = [point.effect for point in curve]
        lows = [point.effect - (point.effect if point.low is None else point.low) for point in curve]
        highs = [(point.effect if point.high is None else point.high) - point.effect for point in curve]
        label = to_plot_label(f"{result.recipient}, {result.ranking}")
        axis.errorbar([point.k for point in curve], effects, [lows, highs], fmt="o", capsize=3, label=label)
        if result.search.k is not None:
            axis.axvline(result.search.k, linestyle=":", color="tab:gray")
    label = f"{format_percent(target_effect)} of the gain"
    axis.axhline(target_effect, color="tab:green", linestyle="--", label=label)
    axis.set(xlabel="patched neurons (k)", ylabel="causal effect")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
