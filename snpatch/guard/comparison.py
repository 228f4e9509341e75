"""Comparison of guards: every k, training set and test set, against random neurons and baselines.

Why controls: with a large k random neurons come close to the safety neurons, so an accuracy alone means little.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from snpatch.config import CONFIDENCE, RESAMPLES
from snpatch.engine import Engine
from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.executors.base import Progress
from snpatch.guard import fitting
from snpatch.guard.config import GuardConfig
from snpatch.guard.differences import GuardDifference, GuardMeans, Predictions, summarize
from snpatch.guard.labels import LabeledPrompts, get_prompt_text
from snpatch.guard.residual import capture_residuals
from snpatch.guard.scores import GuardScores, evaluate, warn_of_few_prompts
from snpatch.guard.splits import CROSS_VALIDATED, PROTOCOLS, EvaluationSplit, build_splits
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import RANDOM_CONTROLS
from snpatch.utils import schema

BAG_OF_WORDS = "bag of words"
BASELINES = ("words", "residual")
WORDS_STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the bag of words; with 1 alone it is a weak baseline on few prompts
WORDS_MAX_ITER = 10_000
CONTROL_SEEDS = 5  # as published


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison of guards.

    Args:
        ks: Numbers of neurons to fit guards on.
        guard: Settings of each guard.
        train: Names of the sets to fit on; None for all.
        protocol: One of PROTOCOLS: "pairwise" tests on each other set, "merged" on the other sets as one.
        controls: Random controls of each kind, with seeds 0, 1, ...
        control_kinds: Kinds of random controls, see Ranking.random_control.
        baselines: Classifiers that read no neurons. "words" reads a bag of words of the prompt, with a C that
            cross-validation chooses if the classes have enough prompts. "residual" reads the residual stream of the
            last layer at the last token, and its mean over the prompt, with the guard's settings.
        resamples: Bootstrap resamples of each interval.
        confidence: Confidence level of the intervals.
    """

    ks: Sequence[int]
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: Sequence[str] | None = None
    protocol: str = field(default="pairwise", metadata={"choices": tuple(PROTOCOLS)})
    controls: int = field(default=CONTROL_SEEDS, metadata={"min": 0})
    control_kinds: Sequence[str] = RANDOM_CONTROLS
    baselines: Sequence[str] = BASELINES
    resamples: int = field(default=RESAMPLES, metadata={"min": 1})
    confidence: float = field(default=CONFIDENCE, metadata={"above": 0, "below": 1})

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        schema.validate(self, "guard: ")
        if not self.ks or self.ks[0] < 1:
            raise SnpatchError(f"guard: k: expected numbers of at least 1, got {list(self.ks)}")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise SnpatchError(f"guard: baselines: expected names out of {', '.join(BASELINES)}, got {unknown}")


@dataclass(frozen=True)
class GuardRow:
    """Scores of one guard on one set.

    Args:
        features: Name of the ranking whose first k neurons the guard reads, or of a baseline.
        control: Kind of random control of that ranking which the guard reads instead; None for the ranking itself.
        seed: Seed of the control.
        k: Number of neurons; None for a baseline.
        train: Set that the guard was fitted on.
        test: Set that it was tested on; "merged" for all others as one.
        C: Inverse penalty strength that was used.
        scores: Scores on the test set. If it is the training set, of out-of-fold probabilities.
    """

    features: str
    control: str | None
    seed: int | None
    k: int | None
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
        rows: Ordered by features and control, k, training set, test set.
        means: Mean scores of the guards on each kind of features.
        differences: Differences between each ranking's guards and the controls and baselines.
        protocol: What was tested on what, as a phrase.
        notes: What was left out, with the reason, and warnings.
    """

    rows: list[GuardRow]
    means: list[GuardMeans]
    differences: list[GuardDifference]
    protocol: str
    notes: list[str]


@dataclass(frozen=True)
class _Features:
    """An order of neurons, and the ks for which it has enough of them."""

    name: str
    control: str | None
    seed: int | None
    ranking: Ranking
    ks: list[int]


@dataclass(frozen=True, eq=False)
class _Reading:
    """Features of all sets, [prompts, k] or a list of texts, as one guard per training set reads them."""

    name: str
    control: str | None
    seed: int | None
    k: int | None
    features: Mapping[str, np.ndarray | list[str]]
    guard: GuardConfig


def compare_guards(
    engine: Engine,
    model: str,
    sets: Mapping[str, LabeledPrompts],
    rankings: Mapping[str, Ranking],
    config: ComparisonConfig,
    progress: Progress | None = None,
) -> Comparison:
    """Fit guards, test each on other sets, and compare them with controls and baselines.

    There is one guard for each ranking (and its random controls), k and training set, and for each baseline and
    training set. All activations of a ranking are captured in one pass.

    Args:
        engine: Engine that has the model.
        model: Name of the model whose activations and completions are used.
        sets: Labeled prompts, by name. A single set is tested by cross-validation.
        rankings: Rankings, by name.
        config: See ComparisonConfig.
        progress: Called as `progress(done, total)` with the number of rankings, controls and baselines.

    Returns:
        The comparison. A k with too few neurons, and test prompts that are also in the training set, are left out with
        a note.

    Raises:
        SnpatchError: An unknown training set, a set with too few prompts of a class, a set that repeats a prompt, or a
            test set with no prompt that is not in the training set.
    """
    train = list(sets) if config.train is None else list(config.train)
    unknown = [name for name in train if name not in sets]
    if unknown or not train or not rankings:
        raise SnpatchError(f"guard: expected a ranking and training sets out of {', '.join(sets)}, got {train}")
    for name in train:
        fitting.check_trainable(sets[name].labels, config.guard, name)
    notes = [note for name, labeled in sets.items() for note in warn_of_few_prompts(name, labeled.labels)]
    splits = build_splits(sets, train, config.protocol, notes)
    encoded = {name: [tuple(ids) for ids in engine.encode(s.prompts, model)] for name, s in sets.items()}
    orders = _build_features(rankings, config, notes)
    rows, predictions = [], []
    for reading in _read_all(engine, model, sets, encoded, orders, config, progress):
        new_rows, probabilities = _fit_and_test(reading, sets, splits, train, config)
        rows += new_rows
        predictions.append(Predictions(reading.name, reading.control, reading.seed, reading.k, probabilities))
    sizes = {name: len(labeled.labels) for name, labeled in sets.items()}
    certainty = {"resamples": config.resamples, "confidence": config.confidence}
    means, differences = summarize(splits, sizes, predictions, threshold=config.guard.threshold, **certainty)
    protocol = PROTOCOLS[config.protocol] if len(sets) > 1 else CROSS_VALIDATED
    return Comparison(rows, means, differences, protocol, notes)


def _read_all(
    engine: Engine,
    model: str,
    sets: Mapping[str, LabeledPrompts],
    encoded: Mapping[str, list[tuple[int, ...]]],
    orders: Sequence[_Features],
    config: ComparisonConfig,
    progress: Progress | None,
) -> Iterator[_Reading]:
    """Yield what each kind of guard reads: the first k neurons of each order, then the baselines."""
    token_ids = [ids for prompts in encoded.values() for ids in prompts]
    ends = np.cumsum([len(prompts) for prompts in encoded.values()])[:-1]

    def by_set(values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(encoded, np.split(values, ends), strict=True))

    total = len(orders) + len(config.baselines)
    for done, order in enumerate(orders, start=1):
        captured = by_set(engine.capture(token_ids, model, order.ranking, order.ks[-1]).numpy())
        for k in order.ks:
            features = {name: values[:, :k] for name, values in captured.items()}
            yield _Reading(order.name, order.control, order.seed, k, features, config.guard)
        if progress:
            progress(done, total)
    if "words" in config.baselines:
        texts = {name: [get_prompt_text(prompt) for prompt in labeled.prompts] for name, labeled in sets.items()}
        words_config = replace(config.guard, C=WORDS_STRENGTHS, max_iter=WORDS_MAX_ITER)
        if not all(fitting.is_trainable(labeled.labels, words_config) for labeled in sets.values()):
            words_config = config.guard
        yield _Reading(BAG_OF_WORDS, None, None, None, texts, words_config)
    if "residual" in config.baselines:
        for name, values in capture_residuals(engine, token_ids, model).items():
            yield _Reading(name, None, None, None, by_set(values), config.guard)
    if progress:
        progress(total, total)


def _fit_and_test(
    reading: _Reading,
    sets: Mapping[str, LabeledPrompts],
    splits: Sequence[EvaluationSplit],
    train: Sequence[str],
    config: ComparisonConfig,
) -> tuple[list[GuardRow], list[np.ndarray]]:
    """Fit a guard to each training set. Return its scores and probabilities on each split.

    The guards on the neurons of a ranking also get scores on their own training set, by cross-validation.
    """
    rows, probabilities = [], []
    is_ranking = reading.control is None and reading.k is not None
    for source in train:
        x, labels = reading.features[source], sets[source].labels
        pipeline = fitting.fit_classifier(x, labels, reading.guard)
        own_splits = [split for split in splits if split.train == source]
        tested: list[tuple[str, np.ndarray, np.ndarray]] = []  # set, probabilities, labels
        for split in own_splits:
            if split.test == source:
                p = fitting.predict_out_of_fold(x, labels, reading.guard)
            else:
                parts = [_select(reading.features[name], indices) for name, indices in split.parts.items()]
                p = np.concatenate([pipeline.predict_proba(part)[:, 1] for part in parts])
            probabilities.append(p)
            tested.append((split.test, p, split.labels))
        if is_ranking and all(split.test != source for split in own_splits):
            tested.insert(0, (source, fitting.predict_out_of_fold(x, labels, reading.guard), labels))
        for target, p, target_labels in tested:
            scores = evaluate(
                p,
                target_labels,
                threshold=config.guard.threshold,
                resamples=config.resamples,
                confidence=config.confidence,
            )
            names = reading.name, reading.control, reading.seed, reading.k, source, target
            rows.append(GuardRow(*names, pipeline.named_steps["logisticregression"].C, scores))
    return rows, probabilities


def _select(features: np.ndarray | list[str], indices: np.ndarray) -> np.ndarray | list[str]:
    return [features[i] for i in indices] if isinstance(features, list) else features[indices]


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
