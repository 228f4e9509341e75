"""EngineConfig: models, backend and sizes of an engine, as one value; the only place of their defaults.

Command line, experiment configs, replicas and the server read and write it. The module does not import torch, so that
`--help` is instant. vLLM's own arguments are a mapping, because their names differ between vLLM's versions.
"""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from snpatch.errors import SnpatchError, shown
from snpatch.names import check_names
from snpatch.trust import ENGINE, check_arguments
from snpatch.utils import schema
from snpatch.utils.parsing import parse_pairs, split_paths
from snpatch.utils.schema import option

BACKENDS = ("auto", "vllm", "transformers")
TEMPLATES = ("auto", "tokenizer", "tulu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Variables that chat templates get from the tokenizer, or that are arguments of rendering.
RESERVED_TEMPLATE_VARIABLES = frozenset(
    "messages conversations tools documents template chat_template add_generation_prompt continue_final_message "
    "return_assistant_tokens_mask bos_token eos_token pad_token unk_token sep_token cls_token mask_token".split()
)
Folders = str | Path | Sequence[str | Path]
RESAMPLES, CONFIDENCE = 1000, 0.95  # defaults of bootstrap intervals


@dataclass(frozen=True)
class Capacity:
    """Sizes of a vLLM engine's tables, fixed when it starts. An error about a full table names the field to raise.

    Attributes:
        streams: 2, or 1 for an engine without donors at half the cost (plain generation, constants, captures).
        max_adapters: Adapters in use at once, the base model included.
        max_rankings: Rankings in use at once.
        max_constants: Constants in use at once.
        max_interventions: Interventions of a patch.
        max_groups: Statistics that are gathered at once. A contrast gathers two, one per half of its prompts.
        max_captures: Captured positions that are stored until they are fetched.
        max_captured: Neurons of a captured position.
        max_receipts: Requests whose receipts are stored until they are fetched.
        scales_kv: Whether adapters may scale k_proj and v_proj. None: if an adapter of the start does.
    """

    streams: int = field(default=2, metadata={"choices": (1, 2)})
    max_adapters: int = field(default=8, metadata={"min": 1})
    max_rankings: int = field(default=64, metadata={"min": 1})
    max_constants: int = field(default=8, metadata={"min": 1})
    max_interventions: int = field(default=1, metadata={"min": 1})
    max_groups: int = field(default=4, metadata={"min": 1})
    max_captures: int = field(default=4096, metadata={"min": 1})
    max_captured: int = field(default=2048, metadata={"min": 1})
    max_receipts: int = field(default=16384, metadata={"min": 1})
    scales_kv: bool | None = None

    def __post_init__(self) -> None:
        schema.validate(self)


@dataclass(frozen=True)
class ModelSource:
    """Checkpoint, LoRA and adapters of a model.

    Attributes:
        checkpoint: Folder, name or name@revision of the engine's architecture. None: the engine's own model.
        lora: PEFT LoRA folders, merged into the weights in order.
        adapters: PEFT IA3 folders, stacked in order. As for lora, names on the hub are owner/name,
            owner/name@revision or owner/name:subfolder.
    """

    checkpoint: str | None = None
    lora: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def placed(self, folder: Path) -> "ModelSource":
        """Return the source with relative paths resolved against a folder; names on the hub are kept."""
        parts = ((resolve_path(folder, source) for source in sources) for sources in (self.lora, self.adapters))
        return ModelSource(self.checkpoint and resolve_path(folder, self.checkpoint), *map(tuple, parts))

    @property
    def weights_source(self) -> "ModelSource":
        """Return the source without adapters."""
        return replace(self, adapters=())


PRIMARY_WEIGHTS = ModelSource()


@dataclass(frozen=True)
class EngineConfig:
    """Models, backend and sizes of an engine.

    Options that the chosen backend does not use raise an error if they are set.

    Attributes:
        model: Hugging Face folder, name or name@revision.
        adapters: Name -> PEFT IA3 folders, stacked in order, on the model's weights.
        models: Name -> ModelSource, or its checkpoint, of models on other weights. An engine has one set of secondary
            weights, see `secondary`.
        backend: "vllm", "transformers", or "auto": vllm if it is installed.
        template: Chat template: "tokenizer" (the tokenizer's), "tulu", or "auto" (that of the adapters and LoRA, else
            the tokenizer's, else that of the other weights, else tulu).
        chat_template_kwargs: Variables of the chat template, such as {"enable_thinking": False}.
        dtype: "auto" is the checkpoint's own.
        device: transformers backend only.
        batch_size: Maximum number of sequences in a batch (vLLM's max_num_seqs).
        token_budget: Maximum number of padded tokens in a batch, prompt and completion, over all streams. None: static
            batches of batch_size in the given order. transformers backend only.
        allow_untested: Try architectures and quantizations that no test covers.
        capacity: Sizes of tables; vllm backend only.
        vllm: vLLM's engine arguments (tensor_parallel_size, max_model_len, gpu_memory_utilization, ...).
    """

    model: str
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    models: Mapping[str, ModelSource] = field(default_factory=dict)
    backend: str = option("auto", "Backend: auto (vLLM if it is installed), vllm or transformers.", choices=BACKENDS)
    template: str = option("auto", "Chat template: auto, tokenizer or tulu.", choices=TEMPLATES)
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    dtype: str = option(
        "auto", "Dtype of the weights: auto (the checkpoint's), float32, bfloat16 or float16.", choices=DTYPES
    )
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, ... (transformers backend only).")
    batch_size: int | None = option(None, "Maximum number of sequences in a batch (vLLM's max_num_seqs).", min=1)
    token_budget: int | None = field(default=16384, metadata={"min": 1})
    allow_untested: bool = option(False, "Try architectures and quantizations that no test covers.")
    capacity: Capacity = Capacity()
    vllm: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for kind in ("adapters", "models"):
            if not isinstance(getattr(self, kind), Mapping):
                raise SnpatchError(f"{kind}: expected name -> folders, got {shown(getattr(self, kind))}")
            check_names(getattr(self, kind), "a model")
        object.__setattr__(self, "adapters", _parse_folders(self.adapters))
        sources = {name: self._parse_source(name, source) for name, source in self.models.items()}
        object.__setattr__(self, "models", sources)
        others = dict.fromkeys(source.weights_source for source in sources.values())
        others.pop(PRIMARY_WEIGHTS, None)
        if len(others) > 1:
            listed = "; ".join(", ".join([source.checkpoint or self.model, *source.lora]) for source in others)
            raise SnpatchError(
                f"models: expected at most one set of secondary weights, got {len(others)}: {listed}. Start one engine "
                "per pair, with one of the two as its model."
            )
        object.__setattr__(self, "chat_template_kwargs", _check_variables(self.chat_template_kwargs))
        schema.validate(self)

    def _parse_source(self, name: str, source: "ModelSource | Mapping | str | Path") -> ModelSource:
        """Return a model of `models`; a checkpoint that is the engine's own becomes None."""
        if name in self.adapters:
            raise SnpatchError(f"models: {name} is also among the adapters")
        if isinstance(source, str | Path):
            source = {"checkpoint": str(source)}
        if not isinstance(source, ModelSource | Mapping):
            raise SnpatchError(f"models: {name}: expected a checkpoint or a table, got {shown(source)}")
        if isinstance(source, ModelSource):
            parsed = source
        else:
            parts = {part: _paths_as_texts(value) for part, value in source.items()}
            parsed = schema.from_dict(ModelSource, f"models: {name}", parts)
        if parsed.checkpoint is None:
            return parsed
        is_own = resolve_path(Path(), parsed.checkpoint) == resolve_path(Path(), self.model)
        return replace(parsed, checkpoint=None) if is_own else parsed

    @property
    def sources(self) -> dict[str, ModelSource]:
        """Return the source of every model but "base", by name."""
        return {name: ModelSource(adapters=folders) for name, folders in self.adapters.items()} | dict(self.models)

    def origin(self, name: str) -> object:
        """Return a model's source as JSON data.

        This is its adapters on the primary weights, or the parts of a ModelSource.
        """
        source = self.sources.get(name, PRIMARY_WEIGHTS)
        return source.adapters if source.weights_source == PRIMARY_WEIGHTS else asdict(source)

    @property
    def secondary(self) -> ModelSource | None:
        """Return the source of the secondary weights, or None."""
        sources = (source.weights_source for source in self.models.values())
        return next((source for source in sources if source != PRIMARY_WEIGHTS), None)

    @classmethod
    def of(cls, model: str | Path, adapters: Mapping[str, Folders] | None = None, **arguments) -> "EngineConfig":
        """Build a config from fields of this class and of Capacity, and vLLM's engine arguments.

        Args:
            model: Hugging Face folder, name or name@revision.
            adapters: Name -> PEFT IA3 folders.
            arguments: Fields of EngineConfig and Capacity; all others are vLLM's engine arguments.

        Raises:
            SnpatchError: A value is invalid.
        """
        folders = cast("Mapping[str, tuple[str, ...]]", adapters or {})  # the constructor converts them
        return cls(str(model), folders).changed(**arguments)

    def changed(self, **arguments) -> "EngineConfig":
        """Return the config with other values.

        Args:
            arguments: Fields of EngineConfig and Capacity; all others are vLLM's engine arguments.

        Raises:
            SnpatchError: A value is invalid.
        """
        values = {name: arguments.pop(name) for name in _DEFAULTS if name in arguments}
        capacity = {f.name: arguments.pop(f.name) for f in fields(Capacity) if f.name in arguments}
        return replace(self, **values, capacity=replace(self.capacity, **capacity), vllm={**self.vllm, **arguments})

    def placed(self, folder: Path) -> "EngineConfig":
        """Return the config with relative paths resolved against a folder; names on the hub are kept."""
        adapters = {
            name: tuple(resolve_path(folder, source) for source in sources) for name, sources in self.adapters.items()
        }
        models = {name: source.placed(folder) for name, source in self.models.items()}
        return replace(self, model=resolve_path(folder, self.model), adapters=adapters, models=models)

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> "EngineConfig":
        """Load a config from a TOML or JSON file.

        Args:
            path: The file. Paths in it are relative to its folder.
            trust: Accept arguments that may run code or open the host; see snpatch.trust.

        Raises:
            SnpatchError: Unknown keys, wrong types, or arguments that need `trust`.
        """
        config = cls.from_dict(schema.load_table(path, "engine"), f"engine {path}")
        if not trust:
            check_arguments(config.vllm, ENGINE, f"engine {path}: vllm")
        return config.placed(Path(path).parent)

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads. Paths are not changed."""
        from snpatch.utils.files import write_text  # imports torch

        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, table: object, context: str = "engine") -> "EngineConfig":
        """Build a config from a table of `to_dict`, TOML or JSON.

        Args:
            table: The table.
            context: Name of the table in errors.

        Raises:
            SnpatchError: Unknown keys or wrong types.
        """
        if not isinstance(table, Mapping):
            raise SnpatchError(f"{context}: expected a table, got {shown(table)}")
        parts: dict[str, Any] = dict(table)
        for kind in ("adapters", "models"):
            if not isinstance(parts.get(kind, {}), Mapping):
                raise SnpatchError(f"{context}: {kind}: expected a table, got {parts[kind]!r}")
        parts["adapters"] = {
            name: schema.coerce(folders, tuple[str, ...], f"{context}: adapters.{name}")
            for name, folders in parts.get("adapters", {}).items()
        }
        parts["capacity"] = schema.from_dict(Capacity, f"{context}: capacity", parts.get("capacity", {}))
        return schema.from_dict(cls, context, parts)

    def to_dict(self) -> dict:
        """Return the fields that differ from the defaults as data for TOML and JSON."""
        default = asdict(EngineConfig(self.model))
        table = {name: value for name, value in asdict(self).items() if value != default[name] or name == "model"}
        if "capacity" in table:
            table["capacity"] = {n: v for n, v in table["capacity"].items() if v != default["capacity"][n]}
        if "models" in table:
            table["models"] = {
                name: {part: value for part, value in source.items() if value}
                for name, source in table["models"].items()
            }
        return table

    def checked_backend(self) -> str:
        """Return "vllm" or "transformers".

        Raises:
            SnpatchError: An option of the other backend is set.
        """
        backend = resolve_backend(self.backend)
        if backend == "transformers":
            capacity = {f.name for f in fields(Capacity) if getattr(self.capacity, f.name) != f.default}
            if unknown := sorted({*self.vllm, *capacity}):
                raise SnpatchError(f"backend transformers: unknown argument {', '.join(unknown)}")
        elif self.device != "auto":
            raise SnpatchError(
                f"device: expected auto with backend vllm, got {self.device}. vLLM chooses its platform."
            )
        elif self.token_budget != _DEFAULTS["token_budget"]:
            raise SnpatchError("token_budget: expected none with backend vllm. Use vLLM's max_num_batched_tokens.")
        return backend


_DEFAULTS = {f.name: f.default for f in fields(EngineConfig) if f.name not in ("model", "adapters", "capacity", "vllm")}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise for a value that is not among the choices. name: of the option, in errors."""
    if value not in choices:
        raise SnpatchError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def resolve_backend(backend: str) -> str:
    """Return "vllm" or "transformers"; "auto" is vllm if it is installed."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return backend


def parse_adapters(entries: Iterable[str], between: str, option: str, expected: str) -> dict[str, list[str]]:
    """Parse name=folder entries, where `between` separates folders that are stacked in order.

    option, expected: the option and its form, for errors.
    """
    pairs = parse_pairs(entries, option, expected=expected)
    return {name: split_paths(folders, between) for name, folders in pairs.items()}


def group_models(
    adapters: Mapping[str, list[str]], checkpoints: Mapping[str, list[str]], loras: Mapping[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """Return adapters on the primary weights, and models on other weights, as EngineConfig takes them."""
    adapters, models = dict(adapters), {}
    for name in checkpoints.keys() | loras.keys():
        if len(checkpoints.get(name, ())) > 1:
            raise SnpatchError(
                f"checkpoint: expected one checkpoint per name, got {', '.join(checkpoints[name])} for {name}. Give "
                "each its own name."
            )
        source = checkpoints.get(name, [None])[0]
        models[name] = {"checkpoint": source, "lora": loras.get(name, ()), "adapters": adapters.pop(name, ())}
    return adapters, models


def parse_json_object(text: str, context: str) -> dict[str, object]:
    """Parse a JSON object. context: names it in errors."""
    expected = 'expected a JSON object, as {"enable_thinking": false}'
    try:
        table = schema.parse_json(text)
    except ValueError as error:
        raise SnpatchError(f"{context}: {expected}: {error}") from error
    if not isinstance(table, dict):
        raise SnpatchError(f"{context}: {expected}, got {shown(table)}")
    return table


def resolve_path(folder: Path, source: str) -> str:
    """Return a path relative to a folder if it exists there; else the text, which is a name on the hub."""
    path = folder / source
    return str(path) if path.exists() else source


def _check_variables(variables: object) -> dict[str, object]:
    """Return variables of chat templates as JSON data."""
    is_table = isinstance(variables, Mapping)
    if not is_table or not all(isinstance(name, str) and name.isidentifier() for name in variables):
        raise SnpatchError(f"chat_template_kwargs: expected a table of names and values, got {shown(variables)}")
    if reserved := sorted(RESERVED_TEMPLATE_VARIABLES & variables.keys()):
        raise SnpatchError(f"chat_template_kwargs: {reserved[0]} is set by snpatch, or by the tokenizer")
    try:
        return json.loads(json.dumps(dict(variables), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SnpatchError(f"chat_template_kwargs: expected values that JSON can hold: {error}") from error


def _paths_as_texts(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_paths_as_texts(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parse_folders(adapters: Mapping[str, Folders]) -> dict[str, tuple[str, ...]]:
    return {
        name: schema.coerce(_paths_as_texts(folders), tuple[str, ...], f"adapters: {name}")
        for name, folders in adapters.items()
    }
