"""Contrast: both models of a pair read the same texts, and neurons are ranked by how much they differ (Eq. 3).

Why the positions that hold a completion's tokens are counted while it is written, but the finished texts are read once
more for those that emit them: which of these emitted an EOS is known only afterwards.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers

from snpatch import __version__
from snpatch.errors import ReceiptError, SnpatchError, shown
from snpatch.executors.base import Observation, Progress
from snpatch.names import POSITIONS
from snpatch.ranking.methods import METHODS
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.statistics import Statistics
from snpatch.requests import Prompt
from snpatch.sampling import Sampling

EXCLUDED = (-1,)  # layers that are not ranked; the last one's difference is the answer itself


def contrast(
    engine,  # the Engine that runs it
    prompts: Sequence[Prompt],
    pair: tuple[str, str | None],  # the generator, and the model that it is compared with
    at: str,
    completions: Sequence[str | Sequence[int]] | None,
    sampling: Sampling,
    exclude_layers: Sequence[int],
    method: str,
    progress: Progress | None,
) -> Ranking:
    """See Engine.contrast, which has the defaults."""
    if at not in POSITIONS:
        raise SnpatchError(f"at must be one of {', '.join(POSITIONS)}, got {at!r}")
    if method not in METHODS:
        raise SnpatchError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(sampling, Sampling):
        raise SnpatchError(f"sampling: wanted a Sampling, got {shown(sampling)}")
    if sampling.n > 1:
        raise SnpatchError("contrast: one completion a prompt; give a prompt several times for several")
    if sampling.ignore_eos:
        raise SnpatchError("contrast: EOS never counts, so sampling cannot ignore it")
    ids, (generator, against) = engine.encode(prompts, pair[0]), pair
    models = {name: engine.fingerprint(name) for name in pair if name is not None}
    if (
        against is not None
        and engine.requests.model(generator).fingerprint == engine.requests.model(against).fingerprint
    ):
        raise SnpatchError(f"contrast: {generator} and {against} are the same model by content: no neuron can differ")
    if at == "emitted" and completions is None and not sampling.stop:
        statistics, observed = _observe_writing(engine, ids, pair, sampling, progress)
    else:
        written: Sequence[list[int]] = [[] for _ in ids]
        if at.startswith("emit"):
            written = _completions(engine, ids, generator, completions, sampling, progress)
        statistics, observed = _observe_reading(engine, ids, written, pair, at, progress)
    expected = sum(observed)
    if (statistics.count != expected).any():
        raise ReceiptError(
            f"contrast: {expected} tokens should have counted in each layer, got {statistics.count.tolist()}"
        )
    if against is None:
        statistics = statistics.recipient_only()
    meta = {
        "model": engine.weights.name,
        "weights": engine.weights.checkpoint_fingerprint,
        "revision": engine.weights.revision,
        "models": models,
        "generator": generator,
        "against": against,
        "at": at,
        "tokens": expected,
        "prompts": len(ids),
        "empty": observed.count(0),
        "prompts_digest": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
        "versions": {"snpatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if engine.notes:
        meta["notes"] = list(engine.notes)
    return Ranking.from_statistics(statistics, method, exclude_layers, meta)


def _observe_writing(engine, ids, pair, sampling, progress) -> tuple[Statistics, list[int]]:
    """Statistics over the positions that hold the first model's completions, gathered while it writes them, and how
    many positions each has.

    The position of the last token is run for one more token, which is dropped, unless an EOS ended the text.
    """
    statistics, most, requests = _empty(engine), [], []
    for prompt in ids:
        own = engine.requests.fitted(prompt, sampling)
        observe = Observation(statistics, len(prompt), len(prompt) + own.max_tokens, include_eos=False)
        longer = replace(own, max_tokens=own.max_tokens + 1)
        requests.append(engine.requests.observing(prompt, pair, observe, sampling=longer))
        most.append(own.max_tokens)
    outputs = engine.execute(requests, progress)
    kept = [len(o.token_ids) - (o.finish_reason == "eos") for o in outputs]
    return statistics, _some(list(map(min, kept, most)))


def _observe_reading(engine, ids, written, pair, at, progress) -> tuple[Statistics, list[int]]:
    """Statistics over the positions that `at` names of finished texts, and how many positions each has."""
    statistics, requests, observed = _empty(engine), [], []
    for prompt, completion in zip(ids, written, strict=True):
        start, stop = _observed(at, len(prompt), len(completion))
        text = [*prompt, *completion][:stop]
        engine.requests.check_room(text, room=0)
        observed.append(max(0, stop - start))
        if stop > start:
            requests.append(engine.requests.observing(text, pair, Observation(statistics, start, stop)))
    _some(observed)
    engine.execute(requests, progress)
    return statistics, observed


def _completions(engine, ids, generator, completions, sampling, progress) -> list[list[int]]:
    """Token ids of each completion, without an ending EOS."""
    if completions is None:
        written = engine.generate(ids, generator, sampling, progress)
        return [c.token_ids[:-1] if c.finish_reason == "eos" else c.token_ids for c in written]
    given = engine.requests.completions(completions, len(ids))
    ends = engine.requests.model(generator).weights.eos_ids
    for index, written in enumerate(given):
        while written and written[-1] in ends:
            written.pop()
        if not ends.isdisjoint(written):
            raise SnpatchError(f"completion {index} goes on after an EOS")
    return given


def _empty(engine) -> Statistics:
    return Statistics.zeros(engine.geometry.n_layers, engine.geometry.n_neurons)


def _some(positions: list[int]) -> list[int]:
    if not any(positions):
        raise SnpatchError("contrast: there is no position to observe: every completion is empty")
    return positions


def _observed(at: str, prompt: int, completion: int) -> tuple[int, int]:
    """The half-open range of positions that count."""
    return {
        "emitted": (prompt, prompt + completion),
        "emitting": (prompt - 1, prompt + completion - 1),
        "prompt": (0, prompt),
        "prompt_last": (prompt - 1, prompt),
    }[at]
