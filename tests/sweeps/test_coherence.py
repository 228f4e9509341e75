"""Coherence of completions: repetition by hand, log-probabilities against Engine.logprobs, stored and read once."""

import numpy as np
import pytest

from snpatch.sweeps import coherence
from snpatch.sweeps.coherence import Reading, count_repeats
from snpatch.sweeps.store import Store, StoredCompletion


@pytest.mark.parametrize(
    ("text", "n", "fraction"),
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1, 1, 1, 1, 1, 1], 4, 2 / 3),  # three 4-grams, one of them different
        ([1, 2, 1, 2, 1], 2, 0.5),
        ([1, 2, 3], 4, 0.0),
        ([], 2, 0.0),
    ],
)
def test_count_repeats_counts_ngrams_that_occurred_before(text, n, fraction):
    assert count_repeats(text, n) == pytest.approx(fraction)


def test_broken_texts_are_below_first_percentile_of_own_texts():
    own = np.append(np.arange(101.0), np.nan)  # the first percentile is 1
    assert coherence.find_broken(np.array([0.99, 0.9995, 1.0, np.nan]), own).tolist() == [True, False, False, False]
    assert not coherence.find_broken(np.array([-99.0]), np.array([np.nan])).any()


def test_logprob_of_a_text_is_that_of_the_model_that_finds_it_likelier():
    records = [{"logprobs": {"a": -1.0, "b": -3.0}}, {"logprobs": {"a": -4.0, "b": -2.0}}, {"logprobs": {"a": -1.0}}]
    assert coherence.get_logprobs(records, ("a", "b"))[:2].tolist() == [-1.0, -2.0]
    assert np.isnan(coherence.get_logprobs(records, ("a", "b"))[2])
    assert np.isnan(coherence.get_logprobs(records, ())).all()


def test_unread_completions_are_those_with_tokens_and_without_a_value():
    with Store(None) as store:
        for key, ids in (("a", [5]), ("b", [6, 7]), ("c", []), ("d", [8])):
            store.add(key, StoredCompletion("", ids, "eos", 0))
        coherence.store_logprobs([(Reading("a", (5,), "x"), -1.0)], store, {"x": "fx"})
        readers = {"a": ("x", "y"), "b": ("x",), "c": ("x", "y"), "missing": ("x",)}
        unread = coherence.find_unread(store, readers, {"x": "fx", "y": "fy"})
    assert unread == [Reading("a", (5,), "y"), Reading("b", (6, 7), "x")]


def test_logprobs_are_stored_in_batches_by_content_of_the_model(monkeypatch):
    monkeypatch.setattr(coherence, "STORED_BATCH_SIZE", 2)
    readings = [
        (Reading(key, (1,), model), value)
        for key, model, value in (("a", "x", -1.0), ("a", "y", -2.0), ("b", "x", -3.0))
    ]
    fingerprints = {"x": "fx", "y": "fy"}

    def interrupted():
        yield from readings[:2]
        raise KeyboardInterrupt

    with Store(None) as store:
        with pytest.raises(KeyboardInterrupt):
            coherence.store_logprobs(interrupted(), store, fingerprints)
        assert coherence.load_logprobs(store, fingerprints) == {"x": {"a": -1.0}, "y": {"a": -2.0}}
        coherence.store_logprobs(readings, store, fingerprints)
        assert coherence.load_logprobs(store, {"renamed": "fx"}) == {"renamed": {"a": -1.0, "b": -3.0}}
