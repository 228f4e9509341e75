"""The user's side of a twin: how it is launched, its rows, and how requests travel. What both executors stand on."""

from collections.abc import Sequence

from snpatch.config import EngineConfig
from snpatch.executors.vllm.launch import DualStreamLaunch
from snpatch.executors.vllm.registry import Registry
from snpatch.executors.vllm.wire import Wire
from snpatch.models.model import Model
from snpatch.models.text_processing import TextProcessor


class UsersSide:
    """Everything that can be checked before vLLM starts is checked when it is made. engine: vLLM's, once started."""

    engine = None  # until it is started, and when it is closed

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        self.launch = DualStreamLaunch(config, text_processors)
        self.geometry = self.launch.geometry
        self.wire = Wire(
            text_processors[0].tokenizer, self.geometry, config.capacity.max_clauses, config.second is not None
        )
        self.registry = Registry(self.launch.settings)

    def check(self, name: str, model: Model) -> None:
        """An error for keys or values that this engine was started without scaling."""
        self.launch.check(name, model)
