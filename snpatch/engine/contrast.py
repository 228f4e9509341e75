"""Contrasts: both models of a pair read the same texts, and neurons are ranked by how much they differ (Eq. 3).

Statistics of the completion's own tokens are gathered during generation. The positions that predict them need a second
pass, because only a finished completion shows which position predicted an EOS.

The op sums each request into a group. Two random halves of the prompts are two groups, so that the reliability of a
ranking (ranking.reliability) is known without another pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import transformers

from snpatch import __version__
from snpatch.config import check_choice
from snpatch.engine.requests import Prompt
from snpatch.errors import ReceiptError, SnpatchError, shown
from snpatch.executors.base import Observation, Progress
from snpatch.names import CONTRAST_POSITIONS, ROLES
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.methods import METHODS
from snpatch.ranking.ranking import Ranking, check_excluded
from snpatch.sampling import Sampling
from snpatch.utils import schema
from snpatch.utils.hashing import hash_json

EXCLUDED_LAYERS = (-1,)  # the last layer's difference is the answer itself
COMPLETION_POSITIONS = ("completion", "completion_shifted")
HALVES_SEED = 0


def contrast(
    engine,  # the Engine that runs it
    prompts: Sequence[Prompt],
    *,
    recipient: str,
    donor: str | None,
    generate_with: str,
    positions: str,
    completions: Sequence[str | Sequence[int]] | None,
    sampling: Sampling,
    exclude_layers: Sequence[int],
    method: str,
    progress: Progress | Literal[False],
) -> Ranking:
    """Rank neurons; see Engine.contrast, which has the defaults."""
    schema.check_argument(recipient, str, "recipient")
    schema.check_argument(donor, str | None, "donor")
    _check_arguments(positions, method, sampling, generate_with, donor)
    check_excluded(exclude_layers, engine.geometry.n_layers)
    pair = recipient, donor
    generator = recipient if generate_with == "recipient" else donor
    ids = engine.encode(prompts, generator)
    models = {name: engine.fingerprint(name) for name in pair if name is not None}
    if donor is not None and engine.requests.model(recipient).fingerprint == engine.requests.model(donor).fingerprint:
        raise SnpatchError(f"contrast: expected two models, got {recipient} and {donor}, which are equal by content")
    halves = split_prompts(ids) if engine.config.capacity.max_groups > 1 else [0] * len(ids)
    parts = [Statistics.zeros(*engine.geometry.shape) for _ in range(2)]
    gathered = [parts[half] for half in halves]
    observes_writing = positions == "completion" and completions is None and not sampling.stop
    if observes_writing and generate_with == "recipient":
        observed = _observe_writing(engine, ids, gathered, pair, sampling, progress)
    else:
        token_ids: Sequence[list[int]] = [[] for _ in ids]
        if positions in COMPLETION_POSITIONS:
            token_ids = _completions(engine, ids, generator, completions, sampling, progress)
        observed = _observe_reading(engine, ids, gathered, token_ids, pair, positions, progress)
    for index, part in enumerate(parts):
        expected = sum(n for n, half in zip(observed, halves, strict=True) if half == index)
        if (part.count != expected).any():
            raise ReceiptError(f"contrast: expected {expected} counted tokens per layer, got {part.count.tolist()}")
    if donor is None:
        parts = [part.recipient_only() for part in parts]
    statistics = parts[0].plus(parts[1])
    has_halves = all(part.count.any() for part in parts)
    meta = {
        "model": engine.weights.name,
        "weights": engine.weights.checkpoint_fingerprint,
        "revision": engine.weights.revision,
        "models": models,
        "recipient": recipient,
        "donor": donor,
        "generate_with": generate_with,
        "positions": positions,
        "tokens": sum(observed),
        "prompts": len(ids),
        "empty": observed.count(0),
        "prompts_digest": hash_json(ids),
        "versions": {"snpatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if engine.notes:
        meta["notes"] = list(engine.notes)
    return Ranking.from_statistics(statistics, method, exclude_layers, meta, parts[1] if has_halves else None)


def split_prompts(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the random half, 0 or 1, of each prompt. Equal prompts are in one half; the seed is fixed."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(HALVES_SEED)).tolist()
    second = {distinct[index] for index in order[: len(distinct) // 2]}
    return [int(tuple(prompt) in second) for prompt in prompts]


def _check_arguments(positions: str, method: str, sampling: Sampling, generate_with: str, donor: str | None) -> None:
    check_choice("positions", positions, CONTRAST_POSITIONS)
    check_choice("method", method, tuple(METHODS))
    check_choice("generate_with", generate_with, ROLES)
    if generate_with == "donor" and donor is None:
        raise SnpatchError("generate_with: expected recipient without a donor, got donor. Name a donor.")
    if not isinstance(sampling, Sampling):
        raise SnpatchError(f"sampling: expected a Sampling, got {shown(sampling)}")
    if sampling.n > 1:
        raise SnpatchError(f"sampling: n: expected 1, got {sampling.n}. Repeat a prompt to get several completions.")
    if sampling.ignore_eos:
        raise SnpatchError("sampling: ignore_eos: expected false, got true. A contrast never counts EOS.")


def _observe_writing(engine, ids, gathered, pair, sampling, progress) -> list[int]:
    """Observe the recipient's completions during generation.

    Return the number of positions of each prompt, which are added to its `gathered` statistics. The position of the
    last token is run by generating one more token, which is dropped, unless an EOS ended the text.
    """
    limits, requests = [], []
    for prompt, statistics in zip(ids, gathered, strict=True):
        max_tokens = engine.requests.fitted(prompt, sampling).max_tokens
        observe = Observation(statistics, len(prompt), len(prompt) + max_tokens, include_eos=False)
        longer = replace(engine.requests.fitted(prompt, sampling), max_tokens=max_tokens + 1)
        requests.append(engine.requests.observing(prompt, pair, observe, sampling=longer))
        limits.append(max_tokens)
    outputs = engine.execute(requests, progress)
    lengths = [len(o.token_ids) - (o.finish_reason == "eos") for o in outputs]
    return _check_not_empty(list(map(min, lengths, limits)))


def _observe_reading(engine, ids, gathered, completions, pair, positions, progress) -> list[int]:
    """Observe `positions` of finished texts; return the number of positions of each text."""
    requests, observed = [], []
    for prompt, statistics, completion in zip(ids, gathered, completions, strict=True):
        start, stop = _position_range(positions, len(prompt), len(completion))
        text = [*prompt, *completion][:stop]
        engine.requests.check_room(text, room=0)
        observed.append(max(0, stop - start))
        if stop > start:
            requests.append(engine.requests.observing(text, pair, Observation(statistics, start, stop)))
    _check_not_empty(observed)
    engine.execute(requests, progress)
    return observed


def _completions(engine, ids, generator, completions, sampling, progress) -> list[list[int]]:
    """Return token ids of each completion, without an ending EOS."""
    if completions is None:
        generated = engine.generate(ids, generator, sampling, progress)
        return [c.token_ids[:-1] if c.finish_reason == "eos" else c.token_ids for c in generated]
    token_ids = engine.requests.completions(completions, len(ids))
    eos_ids = engine.requests.model(generator).weights.eos_ids
    for index, completion in enumerate(token_ids):
        while completion and completion[-1] in eos_ids:
            completion.pop()
        if not eos_ids.isdisjoint(completion):
            raise SnpatchError(f"completion {index}: expected no token after EOS, got some")
    return token_ids


def _check_not_empty(observed: list[int]) -> list[int]:
    if not any(observed):
        raise SnpatchError("contrast: expected a position to observe, got only empty completions")
    return observed


def _position_range(positions: str, prompt: int, completion: int) -> tuple[int, int]:
    """Return the half-open range of positions that count, from the numbers of tokens."""
    return {
        "completion": (prompt, prompt + completion),
        "completion_shifted": (prompt - 1, prompt + completion - 1),
        "prompt": (0, prompt),
        "last_prompt_token": (prompt - 1, prompt),
    }[positions]
