"""Splits: which prompts test the guards of each training set, by one of two protocols.

Why texts are compared and not token ids: a prompt that differs from a fitted one in its spaces alone is no new prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpatch.data import Chat
from snpatch.errors import SnpatchError
from snpatch.guard.labels import LabeledPrompts, digest_prompt, require_unseen

PROTOCOLS = {
    "pairwise": "one set trains, each other set is a test set",
    "merged": "one set trains, the others merged are the test set (published protocol)",
}
CROSS_VALIDATED = "one set trains and tests, by cross-validation"
MERGED = "merged"  # name of the test set of the merged protocol


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """A training set, and the prompts that its guards are tested on.

    Args:
        train: Name of the training set.
        test: Name of the test set. If it is the training set, out-of-fold probabilities are tested.
        parts: Set -> [n] int, indices of its prompts that are tested.
        labels: [prompts] bool, True = harmful, of all parts in order.
    """

    train: str
    test: str
    parts: dict[str, np.ndarray]
    labels: np.ndarray


def build_splits(
    sets: Mapping[str, LabeledPrompts], train: Sequence[str], protocol: str, notes: list[str]
) -> list[EvaluationSplit]:
    """Return the splits of each training set. A single set is tested on itself, by cross-validation.

    Args:
        sets: Labeled prompts, by name.
        train: Names of the training sets.
        protocol: One of PROTOCOLS.
        notes: Receives how many prompts are left out, because they are in the training set too.

    Raises:
        SnpatchError: A set repeats a prompt, or every prompt of a test set is in the training set.
    """
    digests = {name: _digest_distinct(labeled.prompts, name) for name, labeled in sets.items()}
    if len(sets) == 1:
        return [_build_split(sets, train[0], train[0], {train[0]: np.arange(len(digests[train[0]]))})]
    splits = []
    for source in train:
        seen, parts = set(digests[source]), {}
        for target in sets:
            if target == source:
                continue
            prompts = sets[target].prompts
            parts[target] = require_unseen(prompts, seen, target, f"{source}, which trains")
            if num_seen := len(prompts) - len(parts[target]):
                others = "or an earlier set, and" if protocol == "merged" and parts.keys() - {target} else "and"
                notes.append(f"{target}: {num_seen} prompts are also in {source} {others} left out")
            if protocol == "merged":
                seen.update(digests[target])
        if protocol == "merged":
            splits.append(_build_split(sets, source, MERGED, parts))
        else:
            splits += [_build_split(sets, source, name, {name: indices}) for name, indices in parts.items()]
    return splits


def _build_split(
    sets: Mapping[str, LabeledPrompts], train: str, test: str, parts: dict[str, np.ndarray]
) -> EvaluationSplit:
    return EvaluationSplit(
        train, test, parts, np.concatenate([sets[name].labels[indices] for name, indices in parts.items()])
    )


def _digest_distinct(prompts: Sequence[Chat], name: str) -> list[str]:
    """Return the digest of each prompt. Raise for a repeated prompt, which could be in two folds."""
    digests = [digest_prompt(prompt) for prompt in prompts]
    if len(set(digests)) < len(digests):
        raise SnpatchError(f"guard: {name} has {len(digests)} prompts, only {len(set(digests))} different ones")
    return digests
