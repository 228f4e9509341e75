"""Bootstrap of guards: weights, ties, seeds of controls, and the coverage of intervals, on constructed data."""

import numpy as np
import pytest
from sklearn import metrics

from snpatch import SnpatchError
from snpatch.guard.differences import MAJORITY, Predictions, summarize
from snpatch.guard.resampling import average_seeds, percentile_interval, resample, weighted_auc
from snpatch.guard.splits import EvaluationSplit


def test_weighted_auc_equals_scikit_learn_on_repeated_prompts():
    rng = np.random.default_rng(0)
    p, y = rng.random(40).round(1), rng.random(40) < 0.4
    weights = rng.integers(0, 4, size=(5, 40)).astype(float)
    expected = [metrics.roc_auc_score(np.repeat(y, row), np.repeat(p, row)) for row in weights.astype(int)]
    assert weighted_auc(p, y, weights) == pytest.approx(expected)
    assert weighted_auc(np.full(40, 0.3), y, weights) == pytest.approx(np.full(5, 0.5)), "ties count half"


def test_resample_draws_each_set_by_itself_and_begins_with_the_prompts():
    weights = resample(lambda weights: weights.T, [3, 5], 400)
    assert (weights[:, 0] == 1).all()
    assert (weights[:3].sum(0) == 3).all()
    assert (weights[3:].sum(0) == 5).all()
    assert weights[:3, 1:].var() == pytest.approx(2 / 3, abs=0.08), "of a binomial of 3 draws of 1 in 3"
    again = resample(lambda weights: weights.T, [3, 5], 400)
    assert np.array_equal(weights, again)
    with pytest.raises(SnpatchError, match="resamples: expected at least 1, got 0"):
        resample(lambda weights: weights.T, [3], 0)


def test_percentile_interval_leaves_out_undefined_resamples():
    assert percentile_interval(np.array([2.0, np.nan, 1.0, 3.0]), 0.5) == (2.0, 1.5, 2.5)
    assert percentile_interval(np.array([np.nan, 1.0]), 0.5) == (None, None, None)
    assert percentile_interval(np.array([1.0, np.nan]), 0.5) == (1.0, None, None)
    with pytest.raises(SnpatchError, match="confidence: expected a number in"):
        percentile_interval(np.ones(3), 1.0)


def test_average_seeds_spreads_as_students_t_around_the_mean():
    values = np.arange(5.0)
    means = average_seeds(np.repeat(values[:, None], 20_001, axis=1))
    assert means[0] == values.mean()
    low, high = np.percentile(means[1:], [2.5, 97.5])
    half = 2.776 * values.std(ddof=1) / 5**0.5  # quantile of t with four degrees of freedom
    assert (low, high) == (pytest.approx(2 - half, abs=0.1), pytest.approx(2 + half, abs=0.1))
    one = average_seeds(np.array([[3.0, 4.0]]))
    assert one[0] == 3.0
    assert np.isnan(one[1])


def split(labels, name: str = "b", train: str = "a") -> EvaluationSplit:
    labels = np.asarray(labels, dtype=bool)
    return EvaluationSplit(train, name, {name: np.arange(len(labels))}, labels)


def predict(correct, labels) -> np.ndarray:
    """Return probabilities that are right where `correct` is true."""
    return np.where(np.asarray(correct, dtype=bool) == labels, 0.9, 0.1)


def test_summary_has_the_means_over_splits_and_seeds():
    labels = np.array([True] * 6 + [False] * 4)
    splits = [split(labels), split(labels[:4], "c")]
    own = [predict([1] * 9 + [0], labels), predict([1, 1, 1, 0], labels[:4])]  # .9, .75
    controls = [[predict([1] * 5 + [0] * 5, labels), predict([1] * 4, labels[:4])] for _ in range(2)]  # .5, 1
    controls[1][1] = predict([0] * 4, labels[:4])  # .5, 0
    predictions = [
        Predictions("safety", None, None, 3, own),
        *(Predictions("safety", "per_layer", seed, 3, p) for seed, p in enumerate(controls)),
        Predictions("words", None, None, None, own),
    ]
    means, differences = summarize(
        splits, {"a": 5, "b": 10, "c": 4}, predictions, threshold=0.5, resamples=200, confidence=0.95
    )
    accuracies = {(row.features, row.control): (row.accuracy, row.seeds) for row in means}
    assert accuracies == {
        ("safety", None): (pytest.approx(0.825), None),
        ("safety", "per_layer"): (pytest.approx(0.5), 2),
        ("words", None): (pytest.approx(0.825), None),
        (MAJORITY, None): (pytest.approx((0.6 + 1) / 2), None),
    }
    control, words, majority = differences
    assert control.accuracy_difference == pytest.approx(0.325)
    assert (control.reference, control.seeds, control.seeds_at_least) == ("random per_layer", 2, 0)
    assert (words.reference, words.accuracy_difference, words.verdict) == ("words", 0, "unclear")
    assert words.accuracy_difference_low == words.accuracy_difference_high == words.auc_difference == 0, "paired"
    assert majority.accuracy_difference == pytest.approx(0.025)
    own_auc = metrics.roc_auc_score(labels, own[0])
    assert means[0].auc == pytest.approx(own_auc), "of the only split with both classes"
    assert majority.auc_difference == pytest.approx(own_auc - 0.5)


def test_merged_split_weighs_prompts_and_not_sets():
    labels = np.array([True, False, True, True])
    merged = EvaluationSplit("a", "merged", {"b": np.array([0, 2]), "c": np.array([1])}, labels[[0, 2, 1]])
    p = [predict([1, 1, 0], merged.labels)]
    (row, _), _ = summarize(
        [merged],
        {"a": 3, "b": 4, "c": 2},
        [Predictions("safety", None, None, 1, p)],
        threshold=0.5,
        resamples=50,
        confidence=0.9,
    )
    assert row.accuracy == pytest.approx(2 / 3)


@pytest.mark.slow
def test_difference_from_controls_is_claimed_as_rarely_as_promised():
    """300 runs in which the ranking's guard is as accurate as the mean of random ones; a claim either way is an error.

    The control draws differ: an interval over prompts alone would be wrong far more often than 5 %.
    """
    rng, claims, naive_claims = np.random.default_rng(1), 0, 0
    n, runs = 150, 300
    for _ in range(runs):
        labels = rng.random(n) < 0.5
        difficulty = rng.normal(size=n)
        own, *others = [
            difficulty < quality for quality in [0.8, *(0.8 + 0.25 * rng.normal(size=5))]
        ]  # right on the easy prompts: strongly paired
        predictions = [Predictions("safety", None, None, 1, [predict(own, labels)])]
        predictions += [
            Predictions("safety", "per_layer", seed, 1, [predict(correct, labels)])
            for seed, correct in enumerate(others)
        ]
        _, (difference, _) = summarize(
            [split(labels)], {"b": n}, predictions, threshold=0.5, resamples=200, confidence=0.95
        )
        claims += difference.verdict != "unclear"
        paired = own - np.mean(others, axis=0)
        naive_claims += abs(paired.mean()) > 1.96 * paired.std(ddof=1) / n**0.5
    assert claims / runs < 0.08
    assert naive_claims / runs > 0.4


def test_real_difference_is_found():
    rng = np.random.default_rng(2)
    labels = rng.random(300) < 0.5
    own, other = rng.random(300) < 0.9, rng.random(300) < 0.7
    predictions = [
        Predictions("safety", None, None, 1, [predict(own, labels)]),
        Predictions("words", None, None, None, [predict(other, labels)]),
    ]
    _, (words, _) = summarize([split(labels)], {"b": 300}, predictions, threshold=0.5, resamples=500, confidence=0.95)
    assert words.verdict == "better"
    error = 1.96 * (own.astype(float) - other).std() / 300**0.5
    assert words.accuracy_difference_low == pytest.approx(words.accuracy_difference - error, abs=0.01)
    assert words.accuracy_difference_high == pytest.approx(words.accuracy_difference + error, abs=0.01)
