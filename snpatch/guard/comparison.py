"""Guards on several sets of prompts: every k, training set and test set, beside random neurons.

Why random neurons: they come close to the safety neurons where k is large, so that no accuracy means much alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.executors.base import Progress
from snpatch.guard import fitting
from snpatch.guard.config import GuardConfig
from snpatch.guard.guard import Guard
from snpatch.guard.labels import LabeledPrompts
from snpatch.guard.scores import GuardScores, evaluate
from snpatch.ranking.ranking import Ranking
from snpatch.sweeps.config import SweepConfig


@dataclass(frozen=True)
class GuardRow:
    """One point: a guard on the first k of `features` (a ranking's name), fitted on `train`, tried on `test`.

    control, seed: of the random neurons of that ranking which it was fitted on instead; None: on its own. C: the one
    chosen. scores: where train is test, of probabilities from the other folds, so never of prompts that it saw.
    """

    features: str
    control: str | None
    seed: int | None
    k: int
    train: str
    test: str
    C: float
    scores: GuardScores

    def flat(self) -> dict:
        """Everything but the calibration curve, as one row of a table."""
        row = {**self.__dict__, **asdict(self.scores)}
        del row["scores"], row["curve"]
        return row


@dataclass(frozen=True)
class Comparison:
    """rows: by ranking and control, training set, k, test set. notes: what was left out and why."""

    rows: list[GuardRow]
    notes: list[str]


@dataclass(frozen=True)
class _Features:
    """Neurons in an order, of which the first of each of `ks` are tried."""

    name: str
    control: str | None
    seed: int | None
    ranking: Ranking
    ks: list[int]


def compare(
    engine: Engine,
    model: str,
    sets: Mapping[str, LabeledPrompts],
    rankings: Mapping[str, Ranking],
    ks: Sequence[int],
    config: GuardConfig | None = None,
    *,
    train: Sequence[str] | None = None,
    controls: int = SweepConfig.controls,
    control_kinds: Sequence[str] = ("per_layer", "last_layer"),
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    progress: Progress | None = None,
) -> Comparison:
    """Fit a guard for every ranking (and its random controls), k and training set, and try each on every set.

    train: names of the sets to fit on (default: all). controls: random controls of each kind, one a seed from 0 on.
    All of a ranking's activations are captured in one pass. A k for which there are not enough neurons, and prompts
    of a test set that are in the training set, too, are left out, and a note says so; a prompt that is twice in its
    set is an error. progress counts pairs of features and training sets.
    """
    config = config or GuardConfig()
    train = list(sets) if train is None else list(train)
    unknown = [name for name in train if name not in sets]
    if unknown or not train or not rankings:
        raise SnpatchError(f"guard: wanted a ranking and training sets out of {', '.join(sets)}, got {train}")
    for name in train:
        fitting.check_trainable(sets[name].labels, config, name)
    encoded = {name: _distinct(engine, model, s.prompts, name) for name, s in sets.items()}
    fresh, notes = _unseen(encoded, train)
    features = _features(rankings, ks, controls, control_kinds, notes)
    fingerprint, rows = engine.fingerprint(model), []
    for number, one in enumerate(features):
        captured = _capture(engine, model, encoded, one)
        for done, source in enumerate(train, start=1):
            for k in one.ks:
                x, y = captured[source][:, :k], sets[source].labels
                guard = Guard.fit(x, y, one.ranking, model=model, fingerprint=fingerprint, config=config)
                for target, kept in fresh[source].items():
                    if target == source:
                        p = fitting.predict_out_of_fold(x, y, config)
                    else:
                        p = guard.probability(captured[target][kept, :k])
                    scores = evaluate(
                        p,
                        sets[target].labels[kept],
                        threshold=config.threshold,
                        resamples=resamples,
                        confidence=confidence,
                    )
                    names = one.name, one.control, one.seed, k, source, target
                    rows.append(GuardRow(*names, guard.meta["C"], scores))
            if progress:
                progress(number * len(train) + done, len(features) * len(train))
    return Comparison(rows, notes)


def _distinct(engine: Engine, model: str, prompts: Sequence[Chat], name: str) -> list[tuple[int, ...]]:
    """Token ids of each prompt. The same prompt in two folds would be a training row that is tested on."""
    encoded = [tuple(ids) for ids in engine.encode(prompts, model)]
    if len(set(encoded)) < len(encoded):
        raise SnpatchError(f"guard: {name} has {len(encoded)} prompts, only {len(set(encoded))} different ones")
    return encoded


def _unseen(encoded: dict[str, list], train: list[str]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Training set -> test set -> indices of its prompts that are not in the training set (all of its own)."""
    fresh, notes = {}, []
    for source in train:
        seen = set(encoded[source])
        fresh[source] = {}
        for target, prompts in encoded.items():
            kept = np.array([i for i, ids in enumerate(prompts) if target == source or ids not in seen], dtype=int)
            if len(kept) < len(prompts):
                notes.append(f"{target}: {len(prompts) - len(kept)} prompts are in {source}, too, and left out")
            if len(kept):
                fresh[source][target] = kept
    return fresh, notes


def _features(rankings, ks, controls, kinds, notes) -> list[_Features]:
    """Each ranking and its controls with the ks for which they have enough neurons."""
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise SnpatchError(f"guard: k must be at least 1, got {ks}")
    features = []
    for name, ranking in rankings.items():
        own = [k for k in ks if k <= len(ranking)]
        if own != ks:
            notes.append(f"{name}: has {len(ranking)} neurons, not enough for k={ks[len(own)]} and more")
        if own:
            features.append(_Features(name, None, None, ranking, own))
        for kind in kinds if controls else ():
            left = [k for k in own if _has_control(ranking, k, kind, name, notes)]
            features += [
                _Features(name, kind, seed, ranking.random_control(left[-1], seed=seed, kind=kind), left)
                for seed in range(controls)
                if left
            ]
    return features


def _has_control(ranking: Ranking, k: int, kind: str, name: str, notes: list[str]) -> bool:
    try:
        ranking.random_control(k, seed=0, kind=kind)
    except NotEnoughNeuronsError as reason:
        notes.append(f"{name}: k={k} has no {kind} control: {reason}")
        return False
    return True


def _capture(engine: Engine, model: str, encoded: dict[str, list], one: _Features) -> dict[str, np.ndarray]:
    """Set -> activations [prompts, largest k], from one pass over all sets."""
    everything = [ids for prompts in encoded.values() for ids in prompts]
    captured = engine.capture(everything, model, one.ranking, one.ks[-1]).numpy()
    ends = np.cumsum([len(prompts) for prompts in encoded.values()])[:-1]
    return dict(zip(encoded, np.split(captured, ends), strict=True))
