"""The smallest neuron set of an engine: search.py's questions, written and judged, each round as one batch.

Why texts go through a store: what a search has seen, a later one (another share, a finer grid, a whole sweep) does not
write again.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

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
from snpatch.sweeps import judging, search, texts
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import Store


@dataclass(frozen=True)
class Minimal:
    """Of one recipient. found: see search.Found; blocks: of layers that suffice, where they were asked for."""

    recipient: str
    donor: str
    ranking: str
    found: search.Found
    blocks: tuple[search.Block, ...]


def minimal(
    engine: Engine,
    prompts: Sequence[Chat],
    rankings: Mapping[str, Ranking],
    judge: Judge,
    config: SweepConfig,
    *,
    share: float = 0.9,
    layers: int | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> list[Minimal]:
    """The smallest of the config's windows that recovers `share` of the judge's gain, of each recipient and ranking.

    config: windows must be top ks, of one donor and one strength; its controls are not used. layers: also find which
    blocks of so many layers suffice, each with the neurons that the found window (else the largest) has there.
    """
    (donor, *others), (strength, *more) = config.donors, config.strengths
    if others or more or config.samples > 1 or any(window.lo for window in config.windows):
        raise SnpatchError("minimal: windows must be top ks, of one donor, one strength and one sample")
    if layers is not None and layers < 1:
        raise SnpatchError(f"minimal: blocks must have at least one layer, got {layers}")
    check_names(rankings, "a ranking")
    how = {"positions": config.positions, "strength": strength}
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as kept:
        scorer = _Scorer(engine, prompts, judge, config, kept, progress)
        scores = {model: scorer.of_all(model) for model in config.models}
        results = []
        for recipient in config.recipients:
            ends = scores[recipient], scores[donor]
            for name, ranking in rankings.items():
                ks = sorted({window.hi for window in config.windows})
                patches = {k: Patch(recipient, donor, ranking, k, **how) for k in ks}
                certain = {"share": share, "confidence": config.confidence}
                found = search.smallest(lambda pairs, p=patches: scorer(p, pairs), ks, *ends, **certain)
                blocks = []
                if layers is not None:
                    own = _blocks(ranking, found.k or ks[-1], layers)
                    blocks = search.blocks(
                        lambda pairs, r=recipient, own=own: scorer(_joined(pairs, r, donor, own, how), pairs),
                        list(own), *ends, share=share,
                    )  # fmt: skip
                results.append(Minimal(recipient, donor, name, found, tuple(blocks)))
    return results


class _Scorer:
    """Scores of patched texts: written where the store lacks them, and judged."""

    def __init__(self, engine, prompts, judge, config, store, progress) -> None:
        self._engine, self._prompts, self._judge, self._config = engine, list(prompts), judge, config
        self._store, self._progress = store, progress
        self._items: dict[object, list[texts.Item]] = {}  # by patch, or the name of a model

    def __call__(self, patches: Mapping[object, Patch | str], pairs: Sequence[tuple[object, int]]) -> list[float]:
        """The score of each (name of a patch, prompt)."""
        for patch in dict.fromkeys(patches[name] for name, _ in pairs):
            if patch not in self._items:
                (self._items[patch],) = texts.wanted(self._engine, self._prompts, [patch], self._config.sampling)
        items = [self._items[patches[name]][prompt] for name, prompt in pairs]
        texts.fill(self._engine, items, self._store, progress=self._progress)
        (records,) = texts.records([items], self._store)
        judging.judge_all(records, {"judge": self._judge}, self._store)
        judging.check_scored(records)
        return [record["scores"]["judge"] for record in records]

    def of_all(self, model: str) -> np.ndarray:
        """Of an unpatched model, all prompts."""
        return np.array(self({model: model}, [(model, prompt) for prompt in range(len(self._prompts))]))


def _blocks(ranking: Ranking, k: int, layers: int) -> dict[str, Ranking]:
    """The first k neurons, by blocks of so many layers; blocks without any are left out."""
    own = Ranking.from_order(ranking.top(k), ranking.shape)
    found = {}
    for start in range(0, ranking.shape[0], layers):
        end = min(start + layers, ranking.shape[0])
        part = own.filter_layers(range(start, end))
        if len(part):
            found[f"layers {start}-{end - 1}" if end - start > 1 else f"layer {start}"] = part
    return found


def _joined(pairs, recipient: str, donor: str, own: Mapping[str, Ranking], how: dict) -> dict[tuple, Patch]:
    """A patch for each set of blocks that is asked for: their neurons together."""
    patches = {}
    for names, _ in pairs:
        if names not in patches:
            places = torch.cat([own[name].top(len(own[name])) for name in names])
            ranking = Ranking.from_order(places, own[names[0]].shape)
            patches[names] = Patch(recipient, donor, ranking, len(ranking), **how)
    return patches
