"""What a judge is: a number for each completion as an answer to its prompt. A low cost is safe, a high reward is good.

A judge is any callable from texts to numbers. That lets a user's own function stand beside the models, and is why
`score_all`, through which every score goes, trusts none of them to give one finite number a text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from snpatch.errors import SnpatchError
from snpatch.names import check_names


class BrokenJudgeError(SnpatchError):
    """A judge gives another number of scores than of texts: none of them can be told whose it is."""


class Judge(Protocol):
    """A number for each completion as an answer to its prompt, in the given order.

    One that has a `digest`, which names it by content, has its scores kept; any other is asked anew.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]: ...


def score_all(
    judges: Mapping[str, Judge], prompts: Sequence[str], completions: Sequence[str]
) -> dict[str, list[float]]:
    """Each judge's scores, by its name, of all completions, in their order.

    Raises SnpatchError, naming the judge and the prompt, unless each gives one finite number a completion.
    """
    check_pairs(prompts, completions)
    check_names(judges, "a judge")
    scores = {}
    for name, judge in judges.items():
        found = [float(score) for score in judge(prompts, completions)]
        if len(found) != len(prompts):
            raise BrokenJudgeError(f"judge {name!r}: wanted {len(prompts)} scores, one a completion, got {len(found)}")
        for prompt, score in zip(prompts, found, strict=True):
            if not math.isfinite(score):
                raise SnpatchError(f"judge {name!r}: wanted a finite score, got {score} for the prompt {prompt[:80]!r}")
        scores[name] = found
    return scores


def check_pairs(prompts: Sequence[str], completions: Sequence[str]) -> None:
    """An error unless there is one completion a prompt."""
    if len(prompts) != len(completions):
        raise SnpatchError(f"judge: wanted one completion a prompt, got {len(prompts)} and {len(completions)}")
