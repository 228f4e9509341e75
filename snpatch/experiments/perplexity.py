"""Perplexity of patched and unpatched models on one text, in windows without overlap (paper: Wikitext-2, 4096 tokens).

Two figures: the published code's, exp of the plain mean of the windows' mean losses, in which a short last window
counts as much as a whole one; and the token-weighted one, exp of the mean loss of all predicted tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoConfig

from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.models.pretrained import load_pretrained
from snpatch.patching.patch import Patch
from snpatch.report.report import Report, span, table_of
from snpatch.statistics import interval
from snpatch.worlds.lab import Lab


@dataclass(frozen=True)
class Settings:
    """text: a set of the world. window: tokens. k: ints, or shares of the neurons. bos_each_window: put BOS in the
    place of each window's first token, as the published code does for Gemma ("auto": for Gemma alone).
    """

    text: str = "text"
    window: int = 4096
    k: tuple[int | float, ...] = (0, 20_000)
    where: str | int = "all"
    bos_each_window: bool | str = "auto"
    resamples: int = 1000
    confidence: float = 0.95


@dataclass(frozen=True)
class Perplexity:
    """window_mean: the published figure; token_weighted: the right one. losses: a window's sum and its predictions."""

    losses: tuple[tuple[float, int], ...]

    @property
    def window_mean(self) -> float:
        return math.exp(sum(total / n for total, n in self.losses) / len(self.losses))

    @property
    def token_weighted(self) -> float:
        return math.exp(sum(total for total, _ in self.losses) / self.tokens)

    @property
    def tokens(self) -> int:
        return sum(n for _, n in self.losses)


def run(lab: Lab, settings: Settings) -> Report:
    """Every recipient at every k, and the donor."""
    ranking, donor = lab.ranking(), lab.world.donor
    points: list[tuple[str, int, Patch | str]] = []
    for recipient in lab.world.recipients:
        for window in lab.windows(settings.k, ranking):
            points.append((recipient, window.hi, Patch(recipient, donor, ranking, window, settings.where)))
    points.append((donor, 0, donor))
    found = measure(lab, [patch for *_, patch in points], settings.text, settings.window, settings.bos_each_window)
    rows = []
    for (model, k, patch), one in zip(points, found, strict=True):
        totals, counts = np.array(one.losses).T
        _, low, high = interval(
            lambda t, n, axis: np.exp(t.sum(axis) / n.sum(axis)),
            totals,
            counts,
            resamples=settings.resamples,
            confidence=settings.confidence,
        )
        rows.append(
            {
                "model": model,
                "donor": donor if isinstance(patch, Patch) else None,
                "k": k,
                "token_weighted": one.token_weighted,
                "token_weighted_low": low,
                "token_weighted_high": high,
                "window_mean": one.window_mean,
                "tokens": one.tokens,
                "windows": len(one.losses),
            }
        )
    columns = {
        "model": "model",
        "k": "k",
        "perplexity": "token_weighted",
        f"{settings.confidence:.0%} interval": lambda row: span(row, "token_weighted"),
        "mean of windows (published)": "window_mean",
        "tokens": "tokens",
        "windows": "windows",
    }
    sentences = []
    for recipient in lab.world.recipients:
        mine = [row for row in rows if row["model"] == recipient]
        first, last = mine[0], mine[-1]
        sentences.append(
            f"{recipient}: perplexity {first['token_weighted']:.2f} at k = {first['k']}, "
            f"{last['token_weighted']:.2f} at k = {last['k']}."
        )
    plots = {"perplexity": _plot(rows, lab.world.recipients, donor)}
    return Report("perplexity", {"perplexity": rows}, plots, table_of(rows, columns), sentences)


def measure(
    lab: Lab, patches: Sequence[Patch | str], text: str, window: int, bos_each_window: bool | str = "auto"
) -> list[Perplexity]:
    """Perplexity of each patched or unpatched model on a text of the world, all in one run of the engine."""
    tokenizer = lab.engine.tokenizer
    ids = tokenizer(lab.data(text).text, verbose=False)["input_ids"]
    if not 2 <= window <= lab.engine.geometry.context:
        raise SnpatchError(f"perplexity: window must lie in 2..{lab.engine.geometry.context} tokens, got {window}")
    bos = None
    if bos_each_window is True or (bos_each_window == "auto" and _is_gemma(lab)):
        bos = tokenizer.bos_token_id
    windows = windows_of(ids, window, bos)
    with lab.progress(f"perplexity on {text}") as progress:
        return perplexities(lab.engine, windows, patches, progress)


def perplexities(
    engine: Engine, windows: Sequence[Sequence[int]], patches: Sequence[Patch | str], progress: Progress | None = None
) -> list[Perplexity]:
    """Of each patched or unpatched model on windows of token ids."""
    every = [patch for patch in patches for _ in windows]
    found = engine.logprobs([*windows] * len(patches), every, progress=progress)
    losses = [(-one.values.double().sum().item(), len(one.values)) for one in found]
    n = len(windows)
    return [Perplexity(tuple(losses[start : start + n])) for start in range(0, len(losses), n)]


def _is_gemma(lab: Lab) -> bool:
    return load_pretrained(AutoConfig, lab.world.place(lab.world.model)).model_type.startswith("gemma")


def windows_of(ids: Sequence[int], size: int, bos: int | None = None) -> list[list[int]]:
    """The ids cut into windows without overlap; one token alone predicts nothing and is left out.

    bos: takes the place of each window's first token.
    """
    windows = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise SnpatchError("perplexity: the text has fewer than two tokens")
    return windows if bos is None else [[bos, *window[1:]] for window in windows]


def _plot(rows: list[dict], recipients: Sequence[str], donor: str) -> Figure:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, recipient in enumerate(recipients):
        line = [row for row in rows if row["model"] == recipient]
        k = [row["k"] for row in line]
        axis.plot(k, [row["token_weighted"] for row in line], "o-", color=f"C{number}", label=f"{recipient}, patched")
        axis.plot(k, [row["window_mean"] for row in line], ":", color=f"C{number}", label="mean of windows")
    (last,) = (row for row in rows if row["model"] == donor)
    axis.axhline(last["token_weighted"], color="tab:green", linestyle="--", label=f"{donor}, unpatched")
    axis.set(xlabel="patched neurons (k)", ylabel="perplexity")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
