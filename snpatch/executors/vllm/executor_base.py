"""State of a vLLM executor in the client process, shared by VllmExecutor and StreamingExecutor.

Why it is built before vLLM starts: everything that can be checked without vLLM fails within a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snpatch.config import EngineConfig
from snpatch.executors.base import Memory
from snpatch.executors.vllm.codec import RequestCodec
from snpatch.executors.vllm.launch import DualStreamLaunch
from snpatch.executors.vllm.slots import SlotAllocator
from snpatch.models.compatibility import module_kinds
from snpatch.models.model import Model
from snpatch.models.text_processing import TextProcessor


@dataclass(frozen=True)
class WorkerInfo:
    """Answers of all workers to snpatch_start.

    shards: (first neuron, number of neurons) of each worker. runner: vLLM's model runner, "v1" or "v2".
    """

    shards: tuple[tuple[int, int], ...]
    runner: str
    memory: Memory

    @classmethod
    def from_answers(cls, answers: list[dict]) -> "WorkerInfo":
        """Combine the workers' answers: memory is summed over them, and `runner` is the first worker's."""
        duplicated = module_kinds(name for answer in answers for name in answer["duplicated"])
        weights, secondary, kv_cache = map(sum, zip(*(a["memory"] for a in answers), strict=True))
        memory = Memory(weights, secondary, kv_cache, duplicated)
        return cls(tuple((a["first_neuron"], a["n_neurons"]) for a in answers), answers[0]["runner"], memory)


class VllmExecutorBase:
    """Launch arguments, slots and request codec of an engine. engine: vLLM's; None before `start` and after `close`."""

    engine: Any = None  # vLLM's names are checked in api_check.py

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        self.launch = DualStreamLaunch(config, text_processors)
        self.geometry = self.launch.geometry
        has_secondary = config.secondary is not None
        self.codec = RequestCodec(
            text_processors[0].tokenizer, self.geometry, config.capacity.max_interventions, has_secondary
        )
        self.slots = SlotAllocator(self.launch.settings)

    def check_model(self, name: str, model: Model) -> None:
        """Raise if a model scales keys or values and this engine was started without that."""
        self.launch.check_model(name, model)
