"""What a guard is fitted to: prompts, a model's own answers to them, and which of those a judge finds harmful.

Why the model's own answers: the same prompt is harmless in front of a model that refuses it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.sampling import GREEDY, Sampling
from snpatch.sweeps import generation, judging
from snpatch.sweeps.store import Store


@dataclass(frozen=True, eq=False)
class LabeledPrompts:
    """Prompts and a model's own answers. labels: [prompts] bool, True: harmful; scores: what the judge gave."""

    prompts: Sequence[Chat]
    labels: np.ndarray
    scores: np.ndarray
    completions: list[str]


def deduplicate(prompts: Sequence[Chat]) -> list[Chat]:
    """Each prompt once: one that stood in two folds would be fitted on and tested on."""
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


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
    """Let a model answer and the judge say which answers are harmful: those that score above the threshold.

    The defaults are the paper's: greedy, 128 tokens, cost above 0. store: a folder that keeps the answers.
    """
    if sampling.n > 1:
        raise SnpatchError("guard: a label is of one answer to each prompt; set n=1")
    with Store(store) as kept:
        (records,) = generation.generate_completions(engine, prompts, [model], sampling, store=kept, progress=progress)
        judging.judge_all(records, {"judge": judge}, kept)
    judging.check_scored(records)
    scores = np.array([record["scores"]["judge"] for record in records])
    return LabeledPrompts(prompts, scores > threshold, scores, [record["completion"] for record in records])
