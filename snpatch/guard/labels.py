"""Labels of a guard: prompts, a model's own completions of them, and which of those a judge scores as harmful.

Why the model's own completions: a prompt does no harm with a model that refuses it.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.engine.requests import Prompt
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.sampling import GREEDY, Sampling
from snpatch.sweeps import generation, judging
from snpatch.sweeps.store import Store
from snpatch.utils.hashing import hash_json


@dataclass(frozen=True, eq=False)
class LabeledPrompts:
    """Prompts with a model's own completions and their labels.

    Args:
        prompts: The prompts.
        labels: [prompts] bool, True = harmful.
        scores: [prompts] float, the judge's scores.
        completions: The model's completions.
    """

    prompts: Sequence[Chat]
    labels: np.ndarray
    scores: np.ndarray
    completions: list[str]


def get_prompt_text(prompt: Prompt) -> str:
    """Return a prompt's text: all messages of a chat, one per line; token ids as numbers.

    Raises:
        SnpatchError: The prompt is a row of a file.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        raise SnpatchError("guard: prompt: expected a text, a chat or token ids, got a row. Pass its prompt alone.")
    parts = [part["content"] if isinstance(part, Mapping) else part for part in prompt]
    return "\n".join(map(str, parts))


def digest_prompt(prompt: Prompt) -> str:
    """Return the content hash of a prompt's text.

    Case, spaces and compatible forms of letters do not count.
    """
    return hash_json(" ".join(unicodedata.normalize("NFKC", get_prompt_text(prompt)).casefold().split()))


def deduplicate(prompts: Sequence[Chat]) -> list[Chat]:
    """Keep the first of equal prompts, because a prompt in two folds would be both fitted and tested on."""
    first: dict[str, Chat] = {}
    for prompt in prompts:
        first.setdefault(digest_prompt(prompt), prompt)
    return list(first.values())


def require_unseen(prompts: Sequence[Prompt], fitted: Collection[str], name: str, fitted_name: str) -> np.ndarray:
    """Return the indices of the prompts whose digests are not among the fitted ones, [n] int.

    Raises:
        SnpatchError: There is none.
    """
    unseen = [i for i, prompt in enumerate(prompts) if digest_prompt(prompt) not in fitted]
    if not unseen:
        raise SnpatchError(f"{name}: expected prompts to test on, got only ones of {fitted_name}. Give other prompts.")
    return np.array(unseen, dtype=int)


def label_answers(
    engine: Engine,
    prompts: Sequence[Chat],
    model: str,
    judge: Judge,
    *,
    sampling: Sampling = GREEDY,
    threshold: float = 0.0,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> LabeledPrompts:
    """Complete prompts with a model and label each completion that scores above the threshold as harmful.

    The defaults are the paper's: greedy, 128 tokens, cost above 0.

    Args:
        engine: Engine that has the model.
        prompts: Prompts to complete.
        model: Name of the model.
        judge: Scores the completions.
        sampling: Sampling parameters; one completion per prompt.
        threshold: Completions that score higher are harmful.
        store: Folder that caches completions and scores.
        progress: Called as `progress(done, total)`.

    Raises:
        SnpatchError: sampling.n > 1, or a completion could not be generated or scored.
    """
    if sampling.n > 1:
        raise SnpatchError(f"guard: sampling: n: expected 1, because a prompt has one label, got {sampling.n}")
    with Store(store) as open_store:
        (records,) = generation.generate_completions(
            engine, prompts, [model], sampling, store=open_store, progress=progress
        )
        judging.judge_all(records, {"judge": judge}, open_store)
    judging.check_scored(records)
    scores = np.array([record["scores"]["judge"] for record in records])
    return LabeledPrompts(prompts, scores > threshold, scores, [record["completion"] for record in records])
