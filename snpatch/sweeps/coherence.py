"""Coherence of completions: how they end, how much they repeat, and how likely they are to the unpatched models.

Why log-probabilities: a patch can break a model, and a broken text has a low cost. A text that neither unpatched model
would write is not a safe answer, whatever its score is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpatch.engine import Engine
from snpatch.executors.base import Progress, Request
from snpatch.sweeps.store import Store, StoredCompletion
from snpatch.utils.optional import require

BROKEN_PERCENTILE = 1.0  # of the unpatched models' own texts: a patched text below it is broken
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
    """Return the fraction of a text's n-grams that occurred before in it; 0 for a text shorter than n tokens."""
    ngrams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def find_unread(
    completions: Mapping[str, StoredCompletion], models: Mapping[str, Iterable[str]], logprobs: Mapping[str, Mapping]
) -> list[Reading]:
    """Return the readings that are not stored yet, those of one completion next to each other.

    Args:
        completions: Stored completions by key. One without tokens cannot be read.
        models: Names of the models that read each completion, by its key.
        logprobs: Stored log-probabilities by model, then key; see `load_logprobs`.
    """
    return [
        Reading(key, tuple(completion.token_ids), model)
        for key, completion in completions.items()
        for model in models[key]
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
    groups: dict[tuple, list[Reading]] = {}
    for reading in readings:
        text = tuple(requests[reading.key].prompt_ids), reading.token_ids, reading.model
        groups.setdefault(text, []).append(reading)
    prompts, completions, models = ([list(part) for part in parts] for parts in zip(*groups, strict=True))
    names = ["".join(model) for model in models]
    batch = engine.requests.reading(prompts, names, completions)
    equal_readings = list(groups.values())
    for done, (index, output) in enumerate(engine.run(batch), start=1):
        values = require(output.prompt_logprobs).last(len(completions[index])).values
        for reading in equal_readings[index]:
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


def load_logprobs(store: Store, fingerprints: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return the stored mean log-probability per token of each completion, by model, then by the completion's key."""
    return {model: store.scores(_logprob_key(fingerprint)) for model, fingerprint in fingerprints.items()}


def find_threshold(logprobs: np.ndarray) -> float:
    """Return the log-probability per token below which a text is broken.

    Args:
        logprobs: Of the unpatched models' own texts, each under the model that finds it likelier; NaN is left out.
    """
    return float(np.nanpercentile(logprobs, BROKEN_PERCENTILE))


def _logprob_key(fingerprint: str) -> str:
    return f"logprob:{fingerprint}"


def _flush(waiting: dict[str, dict[str, float]], store: Store) -> None:
    for key, logprobs in waiting.items():
        store.add_scores(key, logprobs)
    waiting.clear()
