"""Comparison of guards: every k, training set and test set, with random neurons as a control.

Why random neurons: with a large k they come close to the safety neurons, so an accuracy alone means little.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

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
class ComparisonConfig:
    """Settings of a comparison of guards.

    Args:
        ks: Numbers of neurons to fit guards on.
        guard: Settings of each guard.
        train: Names of the sets to fit on; None for all.
        controls: Random controls of each kind, with seeds 0, 1, ...
        control_kinds: Kinds of random controls, see Ranking.random_control.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    ks: Sequence[int]
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: Sequence[str] | None = None
    controls: int = SweepConfig.controls
    control_kinds: Sequence[str] = ("per_layer", "last_layer")
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        if not self.ks or self.ks[0] < 1:
            raise SnpatchError(f"guard: k: expected numbers of at least 1, got {list(self.ks)}")


@dataclass(frozen=True)
class GuardRow:
    """Scores of one guard on one set.

    Args:
        features: Name of the ranking whose first k neurons the guard reads.
        control: Kind of random control of that ranking which the guard reads instead; None for the ranking itself.
        seed: Seed of the control.
        k: Number of neurons.
        train: Set that the guard was fitted on.
        test: Set that it was tested on.
        C: Inverse penalty strength that was used.
        scores: Scores on the test set. If it is the training set, of out-of-fold probabilities.
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
        """Return everything but the calibration curve as one table row."""
        row = {**self.__dict__, **asdict(self.scores)}
        del row["scores"], row["curve"]
        return row


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        rows: Ordered by ranking and control, training set, k, test set.
        notes: What was left out, with the reason.
    """

    rows: list[GuardRow]
    notes: list[str]


@dataclass(frozen=True)
class _Features:
    """An order of neurons, and the ks for which it has enough of them."""

    name: str
    control: str | None
    seed: int | None
    ranking: Ranking
    ks: list[int]


def compare_guards(
    engine: Engine,
    model: str,
    sets: Mapping[str, LabeledPrompts],
    rankings: Mapping[str, Ranking],
    config: ComparisonConfig,
    progress: Progress | None = None,
) -> Comparison:
    """Fit guards, and test each on every set.

    There is one guard for each ranking (and its random controls), k and training set. All activations of a ranking are
    captured in one pass.

    Args:
        engine: Engine that has the model.
        model: Name of the model whose activations and completions are used.
        sets: Labeled prompts, by name.
        rankings: Rankings, by name.
        config: See ComparisonConfig.
        progress: Called as `progress(done, total)` with the number of (features, training set) pairs.

    Returns:
        The rows. A k with too few neurons, and test prompts that are also in the training set, are left out with a
        note.

    Raises:
        SnpatchError: An unknown training set, a set with too few prompts of a class, or a set that repeats a prompt.
    """
    train = list(sets) if config.train is None else list(config.train)
    unknown = [name for name in train if name not in sets]
    if unknown or not train or not rankings:
        raise SnpatchError(f"guard: expected a ranking and training sets out of {', '.join(sets)}, got {train}")
    for name in train:
        fitting.check_trainable(sets[name].labels, config.guard, name)
    encoded = {name: _encode_distinct(engine, model, labeled.prompts, name) for name, labeled in sets.items()}
    test_indices, notes = _find_unseen(encoded, train)
    features = _build_features(rankings, config, notes)
    identity, rows = (model, engine.fingerprint(model)), []
    for number, order in enumerate(features):
        captured = _capture(engine, model, encoded, order)
        for done, source in enumerate(train, start=1):
            for k in order.ks:
                rows += _fit_and_test(captured, sets, test_indices[source], order, k, source, config, identity)
            if progress:
                progress(number * len(train) + done, len(features) * len(train))
    return Comparison(rows, notes)


def _fit_and_test(
    captured: Mapping[str, np.ndarray],
    sets: Mapping[str, LabeledPrompts],
    test_indices: Mapping[str, np.ndarray],
    order: _Features,
    k: int,
    source: str,
    config: ComparisonConfig,
    identity: tuple[str, str],
) -> list[GuardRow]:
    """Fit a guard on the first k neurons of a training set, and return its scores on each test set."""
    x, labels = captured[source][:, :k], sets[source].labels
    model, fingerprint = identity
    guard = Guard.fit(x, labels, order.ranking, model=model, fingerprint=fingerprint, config=config.guard)
    rows = []
    for target, indices in test_indices.items():
        if target == source:
            probabilities = fitting.predict_out_of_fold(x, labels, config.guard)
        else:
            probabilities = guard.probability(captured[target][indices, :k])
        scores = evaluate(
            probabilities,
            sets[target].labels[indices],
            threshold=config.guard.threshold,
            resamples=config.resamples,
            confidence=config.confidence,
        )
        names = order.name, order.control, order.seed, k, source, target
        rows.append(GuardRow(*names, guard.meta["C"], scores))
    return rows


def _encode_distinct(engine: Engine, model: str, prompts: Sequence[Chat], name: str) -> list[tuple[int, ...]]:
    """Return token ids of each prompt. Raise for a repeated prompt, which could be in two folds."""
    encoded = [tuple(ids) for ids in engine.encode(prompts, model)]
    if len(set(encoded)) < len(encoded):
        raise SnpatchError(f"guard: {name} has {len(encoded)} prompts, only {len(set(encoded))} different ones")
    return encoded


def _find_unseen(encoded: dict[str, list], train: list[str]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the indices of prompts that are not in the training set.

    They are nested: training set -> test set -> indices. All prompts of the training set itself are included.
    """
    unseen, notes = {}, []
    for source in train:
        training_prompts = set(encoded[source])
        unseen[source] = {}
        for target, prompts in encoded.items():
            indices = np.array(
                [i for i, ids in enumerate(prompts) if target == source or ids not in training_prompts], dtype=int
            )
            if len(indices) < len(prompts):
                notes.append(f"{target}: {len(prompts) - len(indices)} prompts are also in {source} and left out")
            if len(indices):
                unseen[source][target] = indices
    return unseen, notes


def _build_features(rankings: Mapping[str, Ranking], config: ComparisonConfig, notes: list[str]) -> list[_Features]:
    """Return each ranking and its controls, with the ks for which they have enough neurons."""
    features = []
    for name, ranking in rankings.items():
        ks = [k for k in config.ks if k <= len(ranking)]
        if len(ks) < len(config.ks):
            notes.append(f"{name}: has {len(ranking)} neurons, too few for k={config.ks[len(ks)]} and more")
        if ks:
            features.append(_Features(name, None, None, ranking, ks))
        for kind in config.control_kinds if config.controls else ():
            control_ks = [k for k in ks if _has_control(ranking, k, kind, name, notes)]
            features += [
                _Features(name, kind, seed, ranking.random_control(control_ks[-1], seed=seed, kind=kind), control_ks)
                for seed in range(config.controls)
                if control_ks
            ]
    return features


def _has_control(ranking: Ranking, k: int, kind: str, name: str, notes: list[str]) -> bool:
    try:
        ranking.random_control(k, seed=0, kind=kind)
    except NotEnoughNeuronsError as error:
        notes.append(f"{name}: k={k} has no {kind} control: {error}")
        return False
    return True


def _capture(engine: Engine, model: str, encoded: dict[str, list], order: _Features) -> dict[str, np.ndarray]:
    """Return set -> activations [prompts, largest k], captured in one pass over all sets."""
    token_ids = [ids for prompts in encoded.values() for ids in prompts]
    captured = engine.capture(token_ids, model, order.ranking, order.ks[-1]).numpy()
    ends = np.cumsum([len(prompts) for prompts in encoded.values()])[:-1]
    return dict(zip(encoded, np.split(captured, ends), strict=True))
