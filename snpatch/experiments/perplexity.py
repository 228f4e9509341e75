"""Perplexity against k: effect of patching on a text that is unrelated to safety (paper: Wikitext-2).

Reports both values of sweeps.perplexity, because the published one overweights a short last window. The difference to
the unpatched recipient has an interval of its own: windows are paired, so it is narrower than those of both values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.experiments.context import ExperimentContext
from snpatch.patching.patch import Patch
from snpatch.report.formatting import format_interval, format_with_interval, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.statistics import UNDEFINED, Interval, interval
from snpatch.sweeps.perplexity import Perplexity


@dataclass(frozen=True)
class PerplexitySettings:
    """Settings of the perplexity.

    Args:
        text: Prompt set of the experiment config that holds the text.
        window: Tokens per window; see sweeps.perplexity.measure.
        k: Numbers of neurons: ints, or floats that are fractions of the ranked neurons. 0, the unpatched recipient, is
            always measured.
        positions: Positions that are patched; see Patch.
        bos_each_window: See sweeps.perplexity.measure.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    text: str = "text"
    window: int = 4096
    k: tuple[int | float, ...] = (0, 20_000)
    positions: str | int = "all"
    bos_each_window: bool | str = "auto"
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


def run(context: ExperimentContext, settings: PerplexitySettings) -> Report:
    """Measure every recipient unpatched and at every k, and the donor."""
    ranking, donor = context.ranking(), context.config.donor
    windows = [window for window in context.top_windows(settings.k, ranking) if len(window)]
    points: list[tuple[str, int, Patch | str]] = []
    for recipient in context.config.recipients:
        points.append((recipient, 0, recipient))
        for window in windows:
            points.append((recipient, window.hi, Patch(recipient, donor, ranking, window, settings.positions)))
    points.append((donor, 0, donor))
    patches = [patch for *_, patch in points]
    results = context.perplexity(settings.text, patches, settings.window, settings.bos_each_window)
    unpatched = {model: result for (model, k, _), result in zip(points, results, strict=True) if not k}
    certainty = {"resamples": settings.resamples, "confidence": settings.confidence}
    rows = []
    for (model, k, patch), result in zip(points, results, strict=True):
        totals, counts = np.array(result.losses).T
        token_weighted = interval(_token_weighted, totals, counts, **certainty)
        difference = compute_difference(result, unpatched[model], **certainty) if k else UNDEFINED
        rows.append(
            {
                "model": model,
                "donor": donor if isinstance(patch, Patch) else None,
                "k": k,
                **token_weighted._replace(value=result.token_weighted).columns("token_weighted"),
                **difference.columns("difference"),
                "window_mean": result.window_mean,
                "tokens": result.tokens,
                "windows": len(result.losses),
            }
        )
    columns = {
        "model": "model",
        "k": "k",
        f"perplexity {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "token_weighted"),
        f"difference {settings.confidence:.0%} CI": lambda row: format_with_interval(row, "difference"),
        "mean of windows (published)": "window_mean",
        "tokens": "tokens",
        "windows": "windows",
    }
    sentences = []
    for recipient in context.config.recipients:
        recipient_rows = [row for row in rows if row["model"] == recipient]
        sentence = f"{recipient}: perplexity {recipient_rows[0]['token_weighted']:.2f} unpatched"
        if (last := recipient_rows[-1])["k"]:
            bounds = format_interval(last, "difference", "{:+.3f}".format)
            certain = f" ({settings.confidence:.0%} CI {bounds}, {last['windows']} windows)" if bounds else ""
            sentence += f", {last['token_weighted']:.2f} at k = {last['k']}: {last['difference']:+.3f}{certain}"
        sentences.append(f"{sentence}.")
    plots = {"perplexity": _plot(rows, context.config.recipients, donor)}
    return Report("perplexity", {"perplexity": rows}, plots, (TableView.from_rows(rows, columns),), sentences)


def compute_difference(patched: Perplexity, unpatched: Perplexity, **certainty) -> Interval:
    """Return the difference of two token-weighted perplexities, paired by window.

    Args:
        patched: Losses of the patched model.
        unpatched: Losses of the unpatched model, on the same windows.
        certainty: resamples and confidence; see statistics.interval.

    Returns:
        The difference; its interval is UNDEFINED's for one window, which has no spread.
    """
    (totals, counts), (own_totals, own_counts) = (np.array(one.losses).T for one in (patched, unpatched))
    result = interval(
        lambda t, n, own_t, own_n, axis: _token_weighted(t, n, axis) - _token_weighted(own_t, own_n, axis),
        totals,
        counts,
        own_totals,
        own_counts,
        **certainty,
    )
    return result if len(totals) > 1 else Interval(result.value, None, None)


def _token_weighted(totals, counts, axis):
    return np.exp(totals.sum(axis) / counts.sum(axis))


def _plot(rows: list[dict], recipients: Sequence[str], donor: str) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, recipient in enumerate(recipients):
        line = [row for row in rows if row["model"] == recipient]
        k = [row["k"] for row in line]
        name = to_plot_label(f"{recipient}, patched")
        axis.plot(k, [row["token_weighted"] for row in line], "o-", color=f"C{number}", label=name)
        axis.plot(k, [row["window_mean"] for row in line], ":", color=f"C{number}", label="mean of windows")
    (last,) = (row for row in rows if row["model"] == donor)
    axis.axhline(last["token_weighted"], color="tab:green", linestyle="--", label=to_plot_label(f"{donor}, unpatched"))
    axis.set(xlabel="patched neurons (k)", ylabel="perplexity")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
