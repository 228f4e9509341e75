"""Perplexity of patched and unpatched models on one text, in windows without overlap (paper: Wikitext-2, 4096 tokens).

Two figures: the published code's, exp of the plain mean of the windows' mean losses, in which a short last window
counts as much as a whole one; and the token-weighted one, exp of the mean loss of all predicted tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.models.pretrained import load_pretrained
from snpatch.patching.patch import Patch


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


def measure(
    engine: Engine,
    text: str,
    patches: Sequence[Patch | str],
    window: int,
    *,
    bos_each_window: bool | str = "auto",
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of each patched or unpatched model on a text, all in one run of the engine.

    window: tokens. bos_each_window: put BOS in the place of each window's first token, as the published code does for
    Gemma ("auto": for Gemma alone).
    """
    if not 2 <= window <= engine.geometry.context:
        raise SnpatchError(f"perplexity: window must lie in 2..{engine.geometry.context} tokens, got {window}")
    ids = engine.tokenizer(text, verbose=False)["input_ids"]
    has_bos = bos_each_window is True or (bos_each_window == "auto" and _is_gemma(engine))
    windows = windows_of(ids, window, engine.tokenizer.bos_token_id if has_bos else None)
    return perplexities(engine, windows, patches, progress)


def perplexities(
    engine: Engine, windows: Sequence[Sequence[int]], patches: Sequence[Patch | str], progress: Progress | None = None
) -> list[Perplexity]:
    """Of each patched or unpatched model on windows of token ids."""
    every = [patch for patch in patches for _ in windows]
    found = engine.logprobs([*windows] * len(patches), every, progress=progress)
    losses = [(-one.values.double().sum().item(), len(one.values)) for one in found]
    n = len(windows)
    return [Perplexity(tuple(losses[start : start + n])) for start in range(0, len(losses), n)]


def windows_of(ids: Sequence[int], size: int, bos: int | None = None) -> list[list[int]]:
    """The ids cut into windows without overlap; one token alone predicts nothing and is left out.

    bos: takes the place of each window's first token.
    """
    windows = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise SnpatchError("perplexity: the text has fewer than two tokens")
    return windows if bos is None else [[bos, *window[1:]] for window in windows]


def _is_gemma(engine: Engine) -> bool:
    return load_pretrained(AutoConfig, engine.config.model).model_type.startswith("gemma")
