"""Smallest sufficient set of neurons of an engine: search.py's samples, generated and judged in one batch per round.

Why completions go through a store: a later search (another target, a finer grid) or sweep reuses them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.names import check_names
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.sweeps import generation, judging, search
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.generation import CompletionTask
from snpatch.sweeps.search import Block, SearchResult
from snpatch.sweeps.store import Store


@dataclass(frozen=True)
class MinimalResult:
    """Result for one recipient and ranking.

    Attributes:
        recipient: The patched model.
        donor: The model whose activations are copied.
        ranking: Name of the ranking.
        search: The smallest window.
        blocks: Blocks of layers that suffice, if they were requested.
    """

    recipient: str
    donor: str
    ranking: str
    search: SearchResult
    blocks: tuple[Block, ...]


def find_minimal(
    engine: Engine,
    prompts: Sequence[Chat],
    rankings: Mapping[str, Ranking],
    judge: Judge,
    config: SweepConfig,
    *,
    target: float = 0.9,
    monotone: bool = True,
    score_range: tuple[float, float] | None = None,
    block_layers: int | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> list[MinimalResult]:
    """Find the smallest window that reaches the target effect, for each recipient and ranking.

    Args:
        engine: The engine.
        prompts: The prompts.
        rankings: Rankings by name.
        judge: The judge that decides.
        config: The grid: windows [0, k) of one donor and one strength. Its controls are not used.
        target: Effect to reach: 0 is the recipient's mean score, 1 the donor's.
        monotone: See find_smallest_window; so is score_range.
        score_range: The judge's lowest and highest possible score.
        block_layers: Also find which blocks of this many layers suffice, each with its neurons of the smallest window
            (the largest if none suffices).
        store: A folder that stores completions and scores; or an open Store.
        progress: Called as `progress(done, total)`.

    Raises:
        SnpatchError: An argument is invalid, a completion or score fails, or the scores of a recipient and the donor
            do not differ clearly.
    """
    (donor, *other_donors), (strength, *other_strengths) = config.donors, config.strengths
    if other_donors or other_strengths or config.samples > 1 or any(window.lo for window in config.windows):
        raise SnpatchError("minimal: expected windows of top ks, one donor, one strength and one sample")
    if block_layers is not None and block_layers < 1:
        raise SnpatchError(f"minimal: blocks: expected at least 1 layer, got {block_layers}")
    check_names(rankings, "a ranking")
    ks = sorted({window.hi for window in config.windows})
    patch_options = {"positions": config.positions, "strength": strength}
    results = []
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as open_store:
        scorer = _Scorer(engine, prompts, judge, config, open_store, progress)
        unpatched = {model: scorer.score_unpatched(model) for model in config.models}
        for recipient in config.recipients:
            for name, ranking in rankings.items():
                patches = {k: Patch(recipient, donor, ranking, k, **patch_options) for k in ks}
                window_search = search.find_smallest_window(
                    lambda pairs, patches=patches: scorer.score(patches, pairs),
                    ks, unpatched[recipient], unpatched[donor], target=target, confidence=config.confidence,
                    monotone=monotone, score_range=score_range,
                )  # fmt: skip
                chosen = []
                if block_layers is not None:
                    blocks = _split_into_blocks(ranking, window_search.k or ks[-1], block_layers)

                    def measure(pairs, recipient=recipient, blocks=blocks):
                        return scorer.score(_join_blocks(pairs, recipient, donor, blocks, patch_options), pairs)

                    chosen = search.find_blocks(
                        measure, list(blocks), unpatched[recipient], unpatched[donor],
                        target=target, confidence=config.confidence,
                    )  # fmt: skip
                results.append(MinimalResult(recipient, donor, name, window_search, tuple(chosen)))
    return results


class _Scorer:
    """Scores of patched completions, which are generated if the store lacks them."""

    def __init__(self, engine, prompts, judge, config, store, progress) -> None:
        self._engine, self._prompts, self._judge, self._config = engine, list(prompts), judge, config
        self._store, self._progress = store, progress
        self._tasks: dict[Patch | str, list[CompletionTask]] = {}  # by patch or unpatched model, one per prompt

    def score(self, patches: Mapping[Any, Patch | str], pairs: Sequence[tuple[Any, int]]) -> list[float]:
        """Return the score of each (key of `patches`, index of a prompt)."""
        for patch in dict.fromkeys(patches[key] for key, _ in pairs):
            if patch not in self._tasks:
                (self._tasks[patch],) = generation.plan_completions(
                    self._engine, self._prompts, [patch], self._config.sampling
                )
        tasks = [self._tasks[patches[key]][prompt] for key, prompt in pairs]
        generation.generate_missing(self._engine, tasks, self._store, progress=self._progress)
        (records,) = generation.build_records([tasks], self._store)
        judging.judge_all(records, {"judge": self._judge}, self._store)
        judging.check_scored(records)
        return [record["scores"]["judge"] for record in records]

    def score_unpatched(self, model: str) -> np.ndarray:
        """Return the scores [prompts] of an unpatched model."""
        return np.array(self.score({model: model}, [(model, prompt) for prompt in range(len(self._prompts))]))


def _split_into_blocks(ranking: Ranking, k: int, layers: int) -> dict[str, Ranking]:
    """Split the first k neurons into blocks of `layers` layers; leave out blocks without neurons."""
    selected = Ranking.from_order(ranking.top(k), ranking.shape)
    blocks = {}
    for start in range(0, ranking.shape[0], layers):
        end = min(start + layers, ranking.shape[0])
        block = selected.filter_layers(range(start, end))
        if len(block):
            blocks[f"layers {start}-{end - 1}" if end - start > 1 else f"layer {start}"] = block
    return blocks


def _join_blocks(pairs, recipient: str, donor: str, blocks: Mapping[str, Ranking], patch_options: dict) -> dict:
    """Return a patch of the neurons of each requested set of blocks, by the names of the blocks."""
    patches = {}
    for names, _ in pairs:
        if names not in patches:
            neurons = torch.cat([blocks[name].top(len(blocks[name])) for name in names])
            ranking = Ranking.from_order(neurons, blocks[names[0]].shape)
            patches[names] = Patch(recipient, donor, ranking, len(ranking), **patch_options)
    return patches
