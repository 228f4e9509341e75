"""What vLLM's workers answer to the commands of worker/commands.py."""

from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.executors.base import Memory
from snpatch.models.compatibility import module_kinds


def answers_of(answers: list[dict]) -> list:
    """What each worker returned; an error of one of them is raised."""
    for answer in answers:
        if "error" in answer:
            raise SnpatchError(answer["error"])
    return [answer["ok"] for answer in answers]


@dataclass(frozen=True)
class Started:
    """What the workers told when they had started. shards: (first neuron, neurons) of each; runner: "v1" or "v2"."""

    shards: tuple[tuple[int, int], ...]
    runner: str
    memory: Memory

    @classmethod
    def of(cls, answers: list[dict]) -> "Started":
        twice = module_kinds(name for answer in answers for name in answer["twice"])
        memory = Memory(*map(sum, zip(*(a["memory"] for a in answers), strict=True)), twice)
        return cls(tuple((a["first_neuron"], a["n_neurons"]) for a in answers), answers[0]["runner"], memory)
