"""Perplexity of patched and unpatched models on one text, in windows without overlap (paper: Wikitext-2, 4096 tokens).

Two figures: that of the published code, exp of the unweighted mean of the windows' mean losses, in which a short last
window counts as much as a full one; and the token-weighted one, exp of the mean loss of all predicted tokens.
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
    """Losses of a model on a text: for each window the sum of losses and the number of predicted tokens."""

    losses: tuple[tuple[float, int], ...]

    @property
    def window_mean(self) -> float:
        """The published figure."""
        return math.exp(sum(total / n for total, n in self.losses) / len(self.losses))

    @property
    def token_weighted(self) -> float:
        """The figure with equal weight for each token."""
        return math.exp(sum(total for total, _ in self.losses) / self.tokens)

    @property
    def tokens(self) -> int:
        """Return the number of predicted tokens: all tokens of the windows except each window's first."""
        return sum(n for _, n in self.losses)


def measure_perplexity(
    engine: Engine,
    text: str,
    patches: Sequence[Patch | str],
    window: int,
    *,
    bos_each_window: bool | str = "auto",
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Return the perplexity of each patched or unpatched model on a text, from one run of the engine.

    Args:
        engine: The engine.
        text: The text.
        patches: Patches, or names of models that run unpatched.
        window: Tokens per window.
        bos_each_window: Replace each window's first token with BOS, as the published code does for Gemma; "auto": only
            for Gemma.
        progress: Called as `progress(done, total)`.
    """
    if not 2 <= window <= engine.geometry.context:
        raise SnpatchError(f"perplexity: window: expected 2..{engine.geometry.context} tokens, got {window}")
    ids = engine.tokenizer(text, verbose=False)["input_ids"]
    has_bos = bos_each_window is True or (bos_each_window == "auto" and _is_gemma(engine))
    windows = split_into_windows(ids, window, engine.tokenizer.bos_token_id if has_bos else None)
    return compute_perplexities(engine, windows, patches, progress)


def compute_perplexities(
    engine: Engine, windows: Sequence[Sequence[int]], patches: Sequence[Patch | str], progress: Progress | None = None
) -> list[Perplexity]:
    """Return the perplexity of each patched or unpatched model on windows of token ids."""
    patch_of_each = [patch for patch in patches for _ in windows]
    logprobs = engine.logprobs([*windows] * len(patches), patch_of_each, progress=progress)
    losses = [(-result.values.double().sum().item(), len(result.values)) for result in logprobs]
    n = len(windows)
    return [Perplexity(tuple(losses[start : start + n])) for start in range(0, len(losses), n)]


def split_into_windows(ids: Sequence[int], size: int, bos: int | None = None) -> list[list[int]]:
    """Split token ids into windows without overlap.

    A window of one token predicts nothing and is left out.

    bos: replaces each window's first token.
    """
    windows = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise SnpatchError("perplexity: the text has fewer than two tokens")
    return windows if bos is None else [[bos, *window[1:]] for window in windows]


def _is_gemma(engine: Engine) -> bool:
    return load_pretrained(AutoConfig, engine.config.model).model_type.startswith("gemma")
