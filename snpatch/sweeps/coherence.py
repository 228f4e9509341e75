"""Coherence of completions: how they end, how much they repeat, and how likely they are to the unpatched models.

Why log-probabilities: a patch can break a model, and a broken text has a low cost. A text that neither unpatched model
would write is not a safe answer, whatever its score is.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from snpatch.engine import Engine
from snpatch.errors import EngineCrashedError
from snpatch.executors.base import Progress, Request
from snpatch.sweeps.store import Store
from snpatch.utils.optional import require

BROKEN_PERCENTILE = 1.0  # of the unpatched models' own texts: a patched text below it is broken
ROUNDING = 1e-3  # nats per token, by which readings of one text differ between batches
STORED_BATCH_SIZE = 256  # readings that are stored at a time


@dataclass(frozen=True)
class Reading:
    """Completion that an unpatched model reads.

    Attributes:
        key: Key of the completion in the store.
        token_ids: Its tokens.
        model: Name of the model.
    """

    key: str
    token_ids: tuple[int, ...]
    model: str


def count_repeats(token_ids: Sequence[int], n: int) -> float:
    """Return the fraction of a text's n-grams that occurred before in it; 0 for fewer than n tokens."""
    ngrams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def find_unread(store: Store, readers: Mapping[str, Iterable[str]], fingerprints: Mapping[str, str]) -> list[Reading]:
    """Return the readings that are not stored yet, those of one completion next to each other.

    Args:
        store: Store of the completions. One without tokens cannot be read.
        readers: Names of the models that read each completion, by its key.
        fingerprints: Fingerprint of each model, by name.
    """
    logprobs = load_logprobs(store, fingerprints)
    return [
        Reading(key, tuple(completion.token_ids), model)
        for key, completion in store.completions(readers).items()
        for model in readers[key]
        if completion.token_ids and key not in logprobs[model]
    ]


def read_completions(
    engine: Engine, readings: Sequence[Reading], requests: Mapping[str, Request], progress: Progress | None = None
) -> Iterator[tuple[Reading, float]]:
    """Yield each reading with the mean log-probability of the completion's tokens under its model.

    All are prefills in one batch. Equal texts are read once.

    Args:
        engine: The engine.
        readings: What to read.
        requests: The request of each completion, by its key; its prompt comes before the completion.
        progress: Called as `progress(done, total)`.
    """
    equal_readings: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[Reading]] = {}
    for reading in readings:
        text = tuple(requests[reading.key].prompt_ids), reading.token_ids, reading.model
        equal_readings.setdefault(text, []).append(reading)
    texts = list(equal_readings)
    batch = engine.requests.reading(
        [list(prompt) for prompt, _, _ in texts],
        [model for _, _, model in texts],
        [list(completion) for _, completion, _ in texts],
    )
    for done, (index, output) in enumerate(engine.run(batch), start=1):
        values = require(output.prompt_logprobs).last(len(texts[index][1])).values
        for reading in equal_readings[texts[index]]:
            yield reading, float(values.double().mean())
        if progress:
            progress(done, len(batch))


def store_logprobs(readings: Iterable[tuple[Reading, float]], store: Store, fingerprints: Mapping[str, str]) -> None:
    """Store log-probabilities as they are read, so that a killed run keeps them. fingerprints: by model."""
    waiting: dict[str, dict[str, float]] = {}
    for number, (reading, logprob) in enumerate(readings, start=1):
        waiting.setdefault(_logprob_key(fingerprints[reading.model]), {})[reading.key] = logprob
        if number % STORED_BATCH_SIZE == 0:
            _flush(waiting, store)
    _flush(waiting, store)


def read_missing(
    engine: Engine,
    requests: Mapping[str, Request],
    readers: Mapping[str, Iterable[str]],
    fingerprints: Mapping[str, str],
    store: Store,
    *,
    max_restarts: int,
    progress: Progress | None = None,
) -> None:
    """Read the completions that were not read yet, and store their log-probabilities.

    Args:
        engine: The engine. If it crashes, it is restarted and reads the rest.
        requests: See `read_completions`.
        readers: See `find_unread`.
        fingerprints: See `find_unread`.
        store: Store of the completions.
        max_restarts: Maximum number of restarts.
        progress: See `read_completions`.
    """
    while readings := find_unread(store, readers, fingerprints):
        try:
            store_logprobs(read_completions(engine, readings, requests, progress), store, fingerprints)
        except EngineCrashedError:
            if not max_restarts:
                raise
            max_restarts -= 1
            engine.restart()


def load_logprobs(store: Store, fingerprints: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return stored log-probabilities per token, by the model that read, then by the completion's key."""
    return {model: store.scores(_logprob_key(fingerprint)) for model, fingerprint in fingerprints.items()}


def get_logprobs(records: Sequence[Mapping], models: Iterable[str]) -> np.ndarray:
    """Return the log-probability per token [records] of each text under the model that finds it likeliest.

    NaN for a text that was not read by all of the models.
    """
    values = [[record["logprobs"].get(model) for model in models] for record in records]
    return np.array([math.nan if None in row or not row else max(row) for row in values])


def find_broken(logprobs: np.ndarray, own_logprobs: np.ndarray) -> np.ndarray:
    """Return a mask [records] of the broken texts.

    Args:
        logprobs: Log-probabilities per token [records]; a text without one (NaN) is not broken.
        own_logprobs: Those of the unpatched models' own texts, whose first percentile is the limit (of fewer than 100
            texts, the least likely one).
    """
    own_logprobs = own_logprobs[~np.isnan(own_logprobs)]
    if not len(own_logprobs):
        return np.zeros(len(logprobs), dtype=bool)
    return logprobs < np.percentile(own_logprobs, BROKEN_PERCENTILE, method="lower") - ROUNDING


def describe_texts(records: Sequence[Mapping]) -> dict[str, float | None]:
    """Return the figures of a point's texts that need no model; see Row."""
    texts = [record for record in records if record["completion"] is not None]
    if not texts:
        return dict.fromkeys(("ended", "mean_tokens", "repeated_4grams", "distinct_2"))
    return {
        "ended": mean(record["finish_reason"] != "length" for record in texts),
        "mean_tokens": mean(len(record["token_ids"]) for record in texts),
        "repeated_4grams": mean(count_repeats(record["token_ids"], 4) for record in texts),
        "distinct_2": mean(1 - count_repeats(record["token_ids"], 2) for record in texts),
    }


def _logprob_key(fingerprint: str) -> str:
    return f"logprob:{fingerprint}"


def _flush(waiting: dict[str, dict[str, float]], store: Store) -> None:
    for key, logprobs in waiting.items():
        store.add_scores(key, logprobs)
    waiting.clear()
