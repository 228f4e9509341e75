"""The common part of both engines: config, tokenizer, models by name, and the builder of requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig, Folders
from snpatch.engine.requests import Prompt, Requests
from snpatch.errors import SnpatchError, shown
from snpatch.executors.spoilage import Spoilage
from snpatch.models.adapters import IA3Scales
from snpatch.models.loaded_models import LoadedModels
from snpatch.models.model import Model
from snpatch.names import BASE, check_name
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window


class BaseEngine:
    """Models that a config describes, and an executor that is not started yet (`_build_executor`)."""

    def __init__(self, model: str | Path, adapters: Mapping[str, Folders] | None = None, **arguments) -> None:
        if not isinstance(model, str | Path):
            raise SnpatchError(
                f"model: expected a folder or name, got {shown(model)}. Arguments are (model, adapters)."
            )
        self._open(EngineConfig.of(model, adapters, **arguments))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Open the engine that a config describes.

        Args:
            config: Models, backend and sizes of the engine.

        Raises:
            SnpatchError: The config is invalid, or a model cannot be loaded.
        """
        engine = cls.__new__(cls)
        engine._open(config)
        return engine

    def _open(self, config: EngineConfig) -> None:
        self.config, self.backend, self._spoilage = config, config.checked_backend(), Spoilage()
        self._opened = opened = LoadedModels(config)
        self.tokenizer = opened.tokenizer
        self.executor = self._build_executor(config)
        self.geometry, self.weights = self.executor.geometry, opened.weights[PRIMARY_WEIGHTS]
        opened.add(config.sources, self.geometry, self.executor.check_model)  # before weights are loaded
        self.requests = Requests(opened.templates, self.geometry, opened.models, opened.notes)

    def _build_executor(self, config: EngineConfig):
        raise NotImplementedError

    def __repr__(self) -> str:
        layers, neurons = self.geometry.shape
        return (
            f"{type(self).__name__}({self.config.model!r}, models {', '.join(self.models)}, backend {self.backend}, "
            f"{layers} layers of {neurons} neurons)"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Return warnings about valid but surprising input, such as a LoRA that changes nothing."""
        return self._opened.notes.messages

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names that can be recipients and donors."""
        return tuple(self._opened.models)

    @property
    def template(self) -> str:
        """Return the chat template of the primary weights: "tokenizer", "tulu" or "adapter"."""
        return self._opened.templates[0].name

    def fingerprint(self, model: str) -> str:
        """Return the content hash of a model's weights, adapters, template and tokenizer.

        Stored completions, rankings and guards belong to the fingerprint, whatever the model's name.

        Args:
            model: Name of the model.

        Raises:
            SnpatchError: The engine has no such model.
        """
        return self._opened.fingerprint(self.requests.model(model))

    def add_adapter(self, name: str, folders: Folders) -> None:
        """Add a model: the primary weights with PEFT IA3 adapters, stacked in order.

        Args:
            name: Name of the model in patches.
            folders: Folder or name on the hub, or several.

        Raises:
            SnpatchError: The name is taken or reserved, or the adapter does not fit the model.
        """
        source = EngineConfig.of(self.config.model, {name: folders}).sources[name]
        self._opened.check_late_adapter(source)
        self._opened.add({name: source}, self.geometry, self.executor.check_model)

    def add_masked_adapter(
        self, name: str, recipient: str, donor: str, ranking: Ranking, window: Window | int | tuple[int, int]
    ) -> None:
        """Add a model: the recipient with the donor's IA3 factors on a window's neurons alone.

        It is the static counterpart of a patch: it needs no donor during generation. How far it equals the patch says
        how much of the patch is the neurons' own factors.

        Args:
            name: Name of the model in patches.
            recipient: Model whose weights and other factors it has.
            donor: Model whose factors the neurons get.
            ranking: Order of the neurons.
            window: Ranks to change: k for the top k, (lo, hi) or a Window.

        Raises:
            SnpatchError: The name is taken or reserved, the models have different weights, or the ranking is another
                model's or shorter than the window.
        """
        check_name(name, "a model")
        models = [self.requests.model(one) for one in (recipient, donor)]
        if models[0].weights.fingerprint != models[1].weights.fingerprint:
            raise SnpatchError(
                f"masked adapter: expected IA3 adapters on the same weights, got {recipient} and {donor} on different "
                "ones. Use a patch."
            )
        own, donated = (model.scales.vectors for model in models)
        if ranking.shape != own["down_proj"].shape:
            raise SnpatchError(
                f"masked adapter: expected a ranking of {list(own['down_proj'].shape)}, got {list(ranking.shape)}"
            )
        window = Window.of(window)
        layers, neurons = ranking.top(window.hi)[window.lo :].unbind(1)
        factors = own["down_proj"].clone()
        factors[layers, neurons] = donated["down_proj"][layers, neurons]
        scales = IA3Scales({**own, "down_proj": factors})
        self._opened.add_model(name, Model(models[0].weights, scales), self.executor.check_model)

    def encode(self, prompts: Sequence[Prompt], model: str | Sequence[str] = BASE, room: int = 1) -> list[list[int]]:
        """Return the token ids of each prompt.

        Args:
            prompts: Strings, chats, rows or token ids.
            model: Name of the recipient, whose chat template is used; one for all or one per prompt.
            room: Number of further tokens that must fit into the context.

        Returns:
            Token ids per prompt.

        Raises:
            SnpatchError: Invalid prompts, an unknown model, or a prompt that is too long.
        """
        return self.requests.encode(prompts, model, room)
