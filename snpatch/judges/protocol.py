"""Judge protocol: one number per completion as an answer to its prompt. A low cost is safe, a high reward is good.

Why `score_all` checks every score: a judge may be any callable, including a user's own function, and need not return
one finite number per completion.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from snpatch.errors import SnpatchError
from snpatch.names import check_names


class BrokenJudgeError(SnpatchError):
    """A judge returned a different number of scores than completions, so no score can be assigned."""


class Judge(Protocol):
    """Callable that returns one number per completion, in the given order.

    The scores of a judge with a `fingerprint` (a content hash, str) are stored; any other judge scores again
    in each run.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        """Score each completion as an answer to the prompt at its index; scores must be finite."""
        ...


def score_all(
    judges: Mapping[str, Judge], prompts: Sequence[str], completions: Sequence[str]
) -> dict[str, list[float]]:
    """Return each judge's scores of all completions, in order.

    Args:
        judges: Name -> judge.
        prompts: Prompts as strings.
        completions: One completion per prompt.

    Returns:
        Name -> one score per completion.

    Raises:
        BrokenJudgeError: A judge returned a different number of scores than completions.
        SnpatchError: A score is not finite; the error names judge and prompt.
    """
    check_pairs(prompts, completions)
    check_names(judges, "a judge")
    scores = {}
    for name, judge in judges.items():
        values = [float(score) for score in judge(prompts, completions)]
        if len(values) != len(prompts):
            raise BrokenJudgeError(
                f"judge {name!r}: expected {len(prompts)} scores, one a completion, got {len(values)}"
            )
        for prompt, score in zip(prompts, values, strict=True):
            if not math.isfinite(score):
                raise SnpatchError(
                    f"judge {name!r}: expected a finite score, got {score} for the prompt {prompt[:80]!r}"
                )
        scores[name] = values
    return scores


def check_pairs(prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Raise a SnpatchError unless there is one completion per prompt."""
    if len(prompts) != len(completions):
        raise SnpatchError(f"judge: expected one completion a prompt, got {len(prompts)} and {len(completions)}")
