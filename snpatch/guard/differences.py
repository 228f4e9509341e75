"""Mean scores of guards over all splits, and their differences from controls and baselines, with intervals.

Why prompts and control seeds are resampled together: the prompts of a test set and the draws of random neurons are both
samples, and a difference that ignores either claims too much. The fitted guards are not refitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from snpatch.guard.resampling import average_seeds, percentile_interval, resample, weighted_auc
from snpatch.guard.splits import EvaluationSplit

MAJORITY = "majority class"  # of each test set


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of harm that the guards on one kind of features predict, one guard per training set.

    Args:
        features: Name of a ranking or of a baseline.
        control: Kind of random control of the ranking which the guards read instead; None for the ranking itself.
        seed: Seed of the control.
        k: Number of neurons; None for a baseline.
        probabilities: Probabilities [prompts] of each split.
    """

    features: str
    control: str | None
    seed: int | None
    k: int | None
    probabilities: Sequence[np.ndarray]

    @property
    def reader(self) -> tuple[str, str | None, int | None]:
        """Return what the guards read: features, control and k, without the control's seed."""
        return self.features, self.control, self.k


@dataclass(frozen=True)
class GuardMeans:
    """Mean scores over all splits, and over the seeds of a control.

    Args:
        features: Name of a ranking or of a baseline.
        control: Kind of random control, or None.
        k: Number of neurons; None for a baseline.
        seeds: Number of seeds of the control; None for all others.
        accuracy: Mean accuracy. `_low` and `_high`, here and below, are the ends of its interval.
        auc: Mean AUC over the splits whose prompts are of both classes; None if there is none.
    """

    features: str
    control: str | None
    k: int | None
    seeds: int | None
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    auc: float | None
    auc_low: float | None
    auc_high: float | None


@dataclass(frozen=True)
class GuardDifference:
    """Difference between the guards on a ranking's neurons and those on a reference.

    Args:
        features: Name of the ranking.
        k: Number of neurons.
        reference: Baseline, or kind of random control with the prefix "random".
        seeds: Number of seeds of a control; None for a baseline. With one seed, no interval is defined.
        seeds_at_least: Number of these seeds whose mean accuracy is at least the ranking's.
        accuracy_difference: Mean accuracy of the ranking less that of the reference. `_low` and `_high`, here and
            below, are the ends of the interval over prompts and seeds.
        auc_difference: The same of the AUC; None if no split has both classes.
    """

    features: str
    k: int
    reference: str
    seeds: int | None
    seeds_at_least: int | None
    accuracy_difference: float
    accuracy_difference_low: float | None
    accuracy_difference_high: float | None
    auc_difference: float | None
    auc_difference_low: float | None
    auc_difference_high: float | None

    @property
    def verdict(self) -> str:
        """Return "better", "worse" or "unclear": by the interval of the accuracy's difference."""
        low, high = self.accuracy_difference_low, self.accuracy_difference_high
        if low is None or high is None or low <= 0 <= high:
            return "unclear"
        return "better" if low > 0 else "worse"


def summarize(
    splits: Sequence[EvaluationSplit],
    sizes: Mapping[str, int],
    predictions: Sequence[Predictions],
    *,
    threshold: float,
    resamples: int,
    confidence: float,
) -> tuple[list[GuardMeans], list[GuardDifference]]:
    """Return the mean scores of all guards, and the differences of each ranking's guards from the others.

    The others are the ranking's random controls of the same k, the baselines, and the majority class.

    Args:
        splits: What the guards were tested on.
        sizes: Number of prompts of each set.
        predictions: Predictions on these splits. Those of a control have one entry per seed.
        threshold: Prompts with a higher probability are called harmful.
        resamples: Bootstrap resamples. Each set is resampled by itself, and once for all splits and guards.
        confidence: Confidence level of the intervals.
    """
    predictions = [*predictions, _predict_majority(splits)]
    draws = _resample_means(splits, sizes, predictions, threshold, resamples)  # [2, guards, 1 + resamples]
    indices: dict[tuple[str, str | None, int | None], list[int]] = {}
    for i, prediction in enumerate(predictions):
        indices.setdefault(prediction.reader, []).append(i)
    means = {
        reader: [average_seeds(scores[rows]) if reader[1] else scores[rows[0]] for scores in draws]
        for reader, rows in indices.items()
    }

    def difference(reader, other) -> GuardDifference:
        (features, _, k), (name, control, _) = reader, other
        accuracy, auc = (
            percentile_interval(own - others, confidence)
            for own, others in zip(means[reader], means[other], strict=True)
        )
        columns: dict[str, Any] = {**accuracy.columns("accuracy_difference"), **auc.columns("auc_difference")}
        num_seeds = len(indices[other]) if control else None
        at_least = (draws[0, indices[other], 0] >= draws[0, indices[reader], 0] - 1e-12).sum()
        return GuardDifference(
            features,
            k,
            f"random {control}" if control else name,
            num_seeds,
            int(at_least) if control else None,
            **columns,
        )

    def is_reference(other, reader) -> bool:
        (features, _, k), (name, control, other_k) = reader, other
        return other_k is None or (control is not None and (name, other_k) == (features, k))

    rows = []
    for reader, scores in means.items():
        columns: dict[str, Any] = {}
        for name, values in zip(("accuracy", "auc"), scores, strict=True):
            columns |= percentile_interval(values, confidence).columns(name)
        rows.append(GuardMeans(*reader, len(indices[reader]) if reader[1] else None, **columns))
    rankings = [reader for reader in means if reader[1] is None and reader[2] is not None]
    differences = [difference(reader, other) for reader in rankings for other in means if is_reference(other, reader)]
    return rows, differences


def _predict_majority(splits: Sequence[EvaluationSplit]) -> Predictions:
    constants = [np.full(len(split.labels), float(split.labels.mean() >= 0.5)) for split in splits]
    return Predictions(MAJORITY, None, None, None, constants)


def _resample_means(
    splits: Sequence[EvaluationSplit],
    sizes: Mapping[str, int],
    predictions: Sequence[Predictions],
    threshold: float,
    resamples: int,
) -> np.ndarray:
    """Return each guard's mean accuracy and AUC over the splits, [2, guards, 1 + resamples]."""
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    columns = [np.concatenate([starts[name] + part for name, part in split.parts.items()]) for split in splits]

    def score(weights: np.ndarray) -> np.ndarray:
        accuracy, auc = [], []
        for i, split in enumerate(splits):
            split_weights = weights[:, columns[i]]
            p = np.stack([prediction.probabilities[i] for prediction in predictions])  # [guards, prompts]
            accuracy.append(((p > threshold) == split.labels) @ split_weights.T / split_weights.sum(1))
            if 0 < split.labels.sum() < len(split.labels):
                auc.append(np.stack([weighted_auc(row, split.labels, split_weights) for row in p]))
        undefined = np.full((len(predictions), len(weights)), np.nan)
        return np.concatenate([np.mean(accuracy, axis=0), np.mean(auc, axis=0) if auc else undefined])

    draws = resample(score, list(sizes.values()), resamples)
    return draws.reshape(2, len(predictions), -1)
