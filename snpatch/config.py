"""EngineConfig: everything that an engine is started with, as one value. Its defaults are the only ones.

The CLI's options, experiment configs, replicas and servers read and write it. Kept free of torch, so that they need
not wait for it. Why vLLM's own arguments are a mapping: they are vLLM's to name, and differ between its versions.
"""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from snpatch.errors import SnpatchError, shown
from snpatch.names import check_names, split_name, split_paths
from snpatch.trust import ENGINE, check_arguments
from snpatch.utils import schema
from snpatch.utils.schema import option

KNOWN = {
    "backend": ("auto", "vllm", "transformers"),
    "template": ("auto", "tokenizer", "tulu"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
# Names that a chat template gets from elsewhere, or that are arguments of its rendering.
TEMPLATE_OWN = frozenset(
    "messages conversations tools documents template chat_template add_generation_prompt continue_final_message "
    "return_assistant_tokens_mask bos_token eos_token pad_token unk_token sep_token cls_token mask_token".split()
)
Folders = str | Path | Sequence[str | Path]
RESAMPLES, CONFIDENCE = 1000, 0.95  # of every bootstrap interval, where nothing else is said


@dataclass(frozen=True)
class Capacity:
    """What a vLLM engine has room for. Fixed when it starts; an error at one of them says which to raise.

    streams: 2, or 1 for an engine without donors at half the cost (plain generation, constants, captures).
    max_adapters, max_rankings, max_constants: how many can be in use at once, the base model among the adapters.
    max_interventions: of one patch. max_groups: statistics of that many contrasts at once. max_captures x max_captured:
    positions and neurons of each position that can be held until they are fetched. max_receipts: requests whose
    receipts can be.
    scales_kv: whether adapters may scale k_proj and v_proj; None: if one of those that the engine starts with does.
    """

    streams: int = 2
    max_adapters: int = 8
    max_rankings: int = 64
    max_constants: int = 8
    max_interventions: int = 1
    max_groups: int = 4
    max_captures: int = 4096
    max_captured: int = 2048
    max_receipts: int = 16384
    scales_kv: bool | None = None

    def __post_init__(self) -> None:
        if self.streams not in (1, 2):
            raise SnpatchError(f"streams must be 1 or 2, got {self.streams}")
        for f in fields(Capacity):
            if f.name.startswith("max_") and getattr(self, f.name) < 1:
                raise SnpatchError(f"{f.name} must be at least 1, got {getattr(self, f.name)}")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: weights, and what is put on them.

    checkpoint: of the engine's architecture, folder, name or name@revision; None: the engine's own. lora:
    PEFT LoRA folders, merged into the weights in order. adapters: PEFT IA3 folders, stacked in order. Both may be
    names on the hub: owner/name, owner/name@revision, owner/name:subfolder.
    """

    checkpoint: str | None = None
    lora: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def placed(self, folder: Path) -> "ModelSource":
        """The same with paths that are relative to a folder; what is no file there stays as it is."""
        parts = ((resolve_path(folder, one) for one in folders) for folders in (self.lora, self.adapters))
        return ModelSource(self.checkpoint and resolve_path(folder, self.checkpoint), *map(tuple, parts))

    @property
    def set(self) -> "ModelSource":
        """The set of weights alone."""
        return replace(self, adapters=())


PRIMARY_WEIGHTS = ModelSource()


@dataclass(frozen=True)
class EngineConfig:
    """model: Hugging Face folder, name or name@revision. adapters: name -> PEFT IA3 folders, stacked, on its weights.

    models: name -> ModelSource, or its weights, for models on other weights than the engine's own: an engine runs one
    further set, see `second`.

    backend: "vllm", "transformers", or "auto": vllm where it is installed. template: how chats become text:
    "tokenizer" (its own), "tulu", or "auto" (what the adapters and LoRA of a set of weights were trained with, else the
    tokenizer's, else the other set's, else tulu).
    chat_template_kwargs: variables that chat templates read, as {"enable_thinking": False}.
    dtype "auto" is the checkpoint's own. batch_size: most sequences of a batch (vllm: its max_num_seqs). token_budget:
    most padded tokens of a batch, prompt and generated, counting every stream; None: static batches of batch_size in
    the given order. allow_untested: try architectures and quantisations outside the tested ones. capacity: sizes, see
    Capacity. vllm: vLLM's own engine arguments (tensor_parallel_size, max_model_len, gpu_memory_utilization, ...).
    device and token_budget are for the transformers backend, capacity and vllm for the other: what is set for one that
    does not run is an error.
    """

    model: str
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    models: Mapping[str, ModelSource] = field(default_factory=dict)
    backend: str = option("auto", "auto, vllm or transformers. auto: vllm where it is installed.")
    template: str = option("auto", "How chats become text: auto, tokenizer or tulu.")
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    dtype: str = option("auto", "auto, float32, bfloat16 or float16.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... (transformers only).")
    batch_size: int | None = option(None, "Most sequences of a batch (vllm: its max_num_seqs).", min=1)
    token_budget: int | None = 16384
    allow_untested: bool = option(False, "Try architectures that were not tested.")
    capacity: Capacity = Capacity()
    vllm: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        for kind in ("adapters", "models"):
            if not isinstance(getattr(self, kind), Mapping):
                raise SnpatchError(f"{kind}: expected name -> folders, got {shown(getattr(self, kind))}")
            check_names(getattr(self, kind), "a model")
        object.__setattr__(self, "adapters", {name: _folders(one) for name, one in self.adapters.items()})
        object.__setattr__(self, "models", {name: self._source(name, one) for name, one in self.models.items()})
        sets = list(dict.fromkeys(source.set for source in self.models.values() if source.set != PRIMARY_WEIGHTS))
        if len(sets) > 1:
            named = "; ".join(", ".join([one.checkpoint or self.model, *one.lora]) for one in sets)
            raise SnpatchError(
                f"models: an engine runs its own weights and one further set, and these are {len(sets)}: {named}; "
                "start one engine for each pair, with one of the two as its model"
            )
        object.__setattr__(self, "chat_template_kwargs", _variables(self.chat_template_kwargs))
        for name in KNOWN:
            check_known(name, getattr(self, name))
        for name in ("batch_size", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SnpatchError(f"{name} must be at least 1, got {value}")

    def _source(self, name: str, given: "ModelSource | Mapping | str | Path") -> ModelSource:
        """A model as `models` names it; weights that are the engine's own are None."""
        if name in self.adapters:
            raise SnpatchError(f"models: {name} is also among the adapters")
        if isinstance(given, str | Path):
            given = {"checkpoint": str(given)}
        if not isinstance(given, ModelSource):
            given = schema.from_dict(ModelSource, f"models: {name}", {part: _texts(one) for part, one in given.items()})
        own = given.checkpoint is not None and resolve_path(Path(), given.checkpoint) == resolve_path(
            Path(), self.model
        )
        return replace(given, checkpoint=None) if own else given

    @property
    def sources(self) -> dict[str, ModelSource]:
        """Every model but the engine's own, by name."""
        return {name: ModelSource(adapters=one) for name, one in self.adapters.items()} | dict(self.models)

    def origin(self, name: str) -> object:
        """Where a model comes from, as data: its adapters on the engine's own weights, or a ModelSource's parts."""
        source = self.sources.get(name, PRIMARY_WEIGHTS)
        return source.adapters if source.set == PRIMARY_WEIGHTS else asdict(source)

    @property
    def secondary(self) -> ModelSource | None:
        """The engine's second set of weights, if its models need one."""
        return next((source.set for source in self.models.values() if source.set != PRIMARY_WEIGHTS), None)

    @classmethod
    def of(cls, model: str | Path, adapters: Mapping[str, Folders] | None = None, **arguments) -> "EngineConfig":
        """From arguments side by side: this class's own, Capacity's and vLLM's, each by its name."""
        return cls(str(model), adapters or {}).changed(**arguments)

    def changed(self, **arguments) -> "EngineConfig":
        """The same but for these arguments, each by its name: this class's own, Capacity's or vLLM's."""
        own = {name: arguments.pop(name) for name in _OWN if name in arguments}
        capacity = {f.name: arguments.pop(f.name) for f in fields(Capacity) if f.name in arguments}
        return replace(self, **own, capacity=replace(self.capacity, **capacity), vllm={**self.vllm, **arguments})

    def placed(self, folder: Path) -> "EngineConfig":
        """The same with paths that are relative to a folder; what is no file there is a name and stays as it is."""
        adapters = {
            name: tuple(resolve_path(folder, one) for one in folders) for name, folders in self.adapters.items()
        }
        models = {name: source.placed(folder) for name, source in self.models.items()}
        return replace(self, model=resolve_path(folder, self.model), adapters=adapters, models=models)

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> "EngineConfig":
        """From a TOML or JSON file, whose paths are relative to its folder.

        trust: take arguments that may run code or open the host, see snpatch.trust; otherwise they are an error.
        """
        config = cls.from_dict(schema.load_table(path, "engine"), f"engine {path}")
        if not trust:
            check_arguments(config.vllm, ENGINE, f"engine {path}: vllm")
        return config.placed(Path(path).parent)

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads; paths as they are."""
        from snpatch.utils.files import write_text  # which loads torch

        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, table: Mapping[str, object], where: str = "engine") -> "EngineConfig":
        """Read what `to_dict` wrote (or a user, in TOML or JSON); unknown keys and wrong types are errors."""
        if not isinstance(table, Mapping):
            raise SnpatchError(f"{where}: wanted a table, got {shown(table)}")
        parts = dict(table)
        adapters = parts.get("adapters", {})
        if not isinstance(adapters, Mapping):
            raise SnpatchError(f"{where}: adapters: wanted a table, got {adapters!r}")
        folders = tuple[str, ...]
        parts["adapters"] = {n: schema.coerce(f, folders, f"{where}: adapters.{n}") for n, f in adapters.items()}
        if not isinstance(parts.get("models", {}), Mapping):
            raise SnpatchError(f"{where}: models: wanted a table, got {parts['models']!r}")
        parts["capacity"] = schema.from_dict(Capacity, f"{where}: capacity", parts.get("capacity", {}))
        return schema.from_dict(cls, where, parts)

    def to_dict(self) -> dict:
        """As plain data for TOML and JSON: what differs from the defaults."""
        default = asdict(EngineConfig(self.model))
        table = {name: value for name, value in asdict(self).items() if value != default[name] or name == "model"}
        if "capacity" in table:
            table["capacity"] = {n: v for n, v in table["capacity"].items() if v != default["capacity"][n]}
        if "models" in table:
            table["models"] = {n: {k: v for k, v in one.items() if v} for n, one in table["models"].items()}
        return table

    def checked_backend(self) -> str:
        """ "vllm" or "transformers"; an error for what is set for the other one alone."""
        backend = resolve_backend(self.backend)
        if backend == "transformers":
            capacity = {f.name for f in fields(Capacity) if getattr(self.capacity, f.name) != f.default}
            if unknown := sorted({*self.vllm, *capacity}):
                raise SnpatchError(f"backend transformers: there is no argument {', '.join(unknown)}")
        elif self.device != "auto":
            raise SnpatchError("device is for the transformers backend; vllm runs on its own platform")
        elif self.token_budget != _OWN["token_budget"]:
            raise SnpatchError("token_budget is for the transformers backend; vllm has max_num_batched_tokens")
        return backend


_OWN = {f.name: f.default for f in fields(EngineConfig) if f.name not in ("model", "adapters", "capacity", "vllm")}


def check_known(name: str, value: object) -> None:
    """An error for a backend, template or dtype that there is not."""
    if value not in KNOWN[name]:
        raise SnpatchError(f"{name} must be one of {', '.join(KNOWN[name])}, got {value!r}")


def resolve_backend(backend: str) -> str:
    """ "vllm" or "transformers": what `backend` names, or for "auto" the faster one that is installed."""
    check_known("backend", backend)
    if backend == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return backend


def parse_adapters(entries: Iterable[str], between: str, form: str) -> dict[str, list[str]]:
    """Adapters from text: name=folder each, or folders stacked in order with `between` between them; each name once.

    What of them exists is one folder, whatever its name holds. form: what is wanted, for errors.
    """
    adapters = {}
    for entry in entries:
        name, folders = split_name(entry)
        if not name or not folders:
            raise SnpatchError(f"{form}, each name once; got {entry!r}")
        if name in adapters:
            raise SnpatchError(f"{form}, each name once; got {name!r} twice")
        adapters[name] = split_paths(folders, between)
    return adapters


def group_models(
    adapters: Mapping[str, list[str]], checkpoints: Mapping[str, list[str]], loras: Mapping[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """Adapters on a model's own weights, and the models that have others, as EngineConfig takes them."""
    adapters, models = dict(adapters), {}
    for name in checkpoints.keys() | loras.keys():
        if len(checkpoints.get(name, ())) > 1:
            raise SnpatchError(f"checkpoint: wanted one a name, got {','.join(checkpoints[name])} for {name}")
        source = checkpoints.get(name, [None])[0]
        models[name] = {"checkpoint": source, "lora": loras.get(name, ()), "adapters": adapters.pop(name, ())}
    return adapters, models


def parse_json_object(text: str, where: str) -> dict[str, object]:
    """Return the object that a JSON text holds."""
    try:
        table = schema.parse_json(text)
    except ValueError as error:
        raise SnpatchError(f'{where}: wanted a JSON object, as {{"enable_thinking": false}}: {error}') from error
    if not isinstance(table, dict):
        raise SnpatchError(f'{where}: wanted a JSON object, as {{"enable_thinking": false}}, got {shown(table)}')
    return table


def _variables(given: object) -> dict[str, object]:
    """Variables for chat templates, as JSON holds them."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise SnpatchError(f"chat_template_kwargs: wanted a table of names and values, got {shown(given)}")
    if taken := sorted(TEMPLATE_OWN & given.keys()):
        raise SnpatchError(f"chat_template_kwargs: {taken[0]} is set by snpatch, or by the tokenizer")
    try:
        return json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SnpatchError(f"chat_template_kwargs: wanted values that JSON can hold: {error}") from error


def _texts(given: object) -> object:
    """Paths as texts."""
    if isinstance(given, list | tuple):
        return [_texts(one) for one in given]
    return str(given) if isinstance(given, Path) else given


def _folders(given: Folders) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def resolve_path(folder: Path, source: str) -> str:
    """A path relative to a folder as it is seen from here; what is no file there is a name and stays as it is."""
    path = folder / source
    return str(path) if path.exists() else source
