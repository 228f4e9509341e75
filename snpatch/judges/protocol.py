"""Judge protocol: one number per completion as an answer to its prompt. A low cost is safe, a high reward is good.

Why `score_all` checks every score: a judge may be any callable, including a user's own function, and need not return
one finite number per completion.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, Protocol

from snpatch.errors import SnpatchError, shown
from snpatch.judges.run_on import cut_run_on
from snpatch.names import check_names


class BrokenJudgeError(SnpatchError):
    """A judge did not return one number per completion in their order, so no score can be assigned."""


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

    Every judge reads a completion up to the next user turn that its model invented (see run_on.cut_run_on).

    Args:
        judges: Name -> judge.
        prompts: Prompts as strings.
        completions: One completion per prompt.

    Returns:
        Name -> one score per completion.

    Raises:
        BrokenJudgeError: A judge did not return one number per completion.
        SnpatchError: A score is not finite; the error names judge and prompt.
    """
    check_pairs(prompts, completions)
    check_names(judges, "a judge")
    answers = [cut_run_on(completion) for completion in completions]
    scores = {}
    for name, judge in judges.items():
        values = _parse_scores(judge(prompts, answers), name)
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


def _parse_scores(scores: Any, name: str) -> list[float]:
    """Return a judge's scores as floats.

    Sets and dicts raise, because their order is not that of the completions.
    """
    is_ordered = isinstance(scores, Iterable) and not isinstance(scores, str | bytes | Mapping | Set)
    if not is_ordered or getattr(scores, "ndim", 1) != 1:
        raise _broken_judge(name, scores)
    return [_parse_score(score, name) for score in scores]


def _parse_score(score: Any, name: str) -> float:
    number = score.item() if getattr(score, "ndim", None) == 0 else score
    if not isinstance(number, Real) or isinstance(number, bool):
        raise _broken_judge(name, score)
    try:
        return float(number)
    except OverflowError as error:
        raise _broken_judge(name, number) from error


def _broken_judge(name: str, value: object) -> BrokenJudgeError:
    return BrokenJudgeError(
        f"judge {name!r}: expected one number a completion, got {shown(value)}. Return a list of floats."
    )


def check_pairs(prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Raise a SnpatchError unless there is one completion per prompt."""
    if len(prompts) != len(completions):
        raise SnpatchError(f"judge: expected one completion a prompt, got {len(prompts)} and {len(completions)}")
