"""What both engines are before they run anything: a config, a tokenizer, models by name, and what makes requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig, Folders
from snpatch.engine.requests import Prompt, Requests
from snpatch.executors.spoilage import Spoilage
from snpatch.models.loaded_models import LoadedModels
from snpatch.names import BASE


class BaseEngine:
    """Opened as its config says. `_build_executor` gives what runs the requests, not yet started."""

    def __init__(self, model: str | Path, adapters: Mapping[str, Folders] | None = None, **arguments) -> None:
        self._open(EngineConfig.of(model, adapters, **arguments))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """The engine that a config describes."""
        engine = cls.__new__(cls)
        engine._open(config)
        return engine

    def _open(self, config: EngineConfig) -> None:
        self.config, self.backend, self._spoilage = config, config.checked_backend(), Spoilage()
        self._opened = opened = LoadedModels(config)
        self.tokenizer = opened.tokenizer
        self.executor = self._build_executor(config)
        self.geometry, self.weights = self.executor.geometry, opened.weights[PRIMARY_WEIGHTS]
        opened.add(config.sources, self.geometry, self.executor.check_model)  # before what takes long
        self.requests = Requests(opened.templates, self.geometry, opened.models, opened.notes)

    def _build_executor(self, config: EngineConfig):
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what may matter and is no error, as a LoRA that changes nothing."""
        return self._opened.notes.messages

    @property
    def models(self) -> tuple[str, ...]:
        """The names that can be recipients and donors."""
        return tuple(self._opened.models)

    @property
    def template(self) -> str:
        """How chats become text for the engine's own weights: "tokenizer", "tulu", or "adapter"."""
        return self._opened.templates[0].name

    def fingerprint(self, model: str) -> str:
        """Names one model by content, whatever it is called: weights, adapters, template and tokenizer.

        What kept texts, rankings and guards are bound to.
        """
        return self._opened.fingerprint(self.requests.model(model))

    def add_adapter(self, name: str, folders: Folders) -> None:
        """Make the model with these adapters available as `name`."""
        source = EngineConfig(self.config.model, {name: folders}).sources[name]
        self._opened.check_late_adapter(source)
        self._opened.add({name: source}, self.geometry, self.executor.check_model)

    def encode(self, prompts: Sequence[Prompt], model: str | Sequence[str] = BASE, room: int = 1) -> list[list[int]]:
        """Token ids of each prompt, as they are run; `room`: how many tokens must still fit the context.

        model: the recipient, whose chat template counts; one for all or one for each.
        """
        return self.requests.encode(prompts, model, room)
