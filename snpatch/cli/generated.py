"""Options that come from dataclasses: each field's name, type, default and help are said there and nowhere else.

A command that takes `config: EngineConfig` or `sampling: Fields` is given options in their place: adding a field adds
the option to every command that has the others.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args, get_origin, get_type_hints

import typer

from snpatch.config import EngineConfig, group_models, parse_adapters, parse_json_object
from snpatch.errors import SnpatchError

if TYPE_CHECKING:
    from snpatch.data import Dataset

Fields = dict[str, object]  # what was chosen of a dataclass's fields, to be handed to it
ENGINE_FILES = (".toml", ".json")
FORM = "--{} wants name=folder or name=folder,folder"


@dataclass(frozen=True)
class Some:
    """Options for some fields of a dataclass. of: it, or an instance, whose values are then the defaults."""

    of: object
    names: tuple[str, ...]

    def parameters(self) -> list[inspect.Parameter]:
        kind = self.of if isinstance(self.of, type) else type(self.of)
        declared, hints = {f.name: f for f in fields(kind)}, get_type_hints(kind)
        return [_parameter(declared[name], hints[name], getattr(self.of, name)) for name in self.names]

    def made(self, values: dict) -> Fields:
        chosen = {n: getattr(self.of, n) if values[n] is None else values[n] for n in self.names}
        return {n: tuple(value) if isinstance(value, list) else value for n, value in chosen.items()}


@dataclass(frozen=True)
class Engine:
    """Options for everything that an engine is started with. has_model: also the model and its adapters."""

    has_model: bool = True

    def parameters(self) -> list[inspect.Parameter]:
        own = tuple(f.name for f in fields(EngineConfig) if f.metadata)
        model = [("model", _MODEL, inspect.Parameter.empty)] if self.has_model else []
        model += [(name, hint, None) for name, hint in _ON_TOP.items()] if self.has_model else []
        model += [("trust_config", TrustConfig, False)] if self.has_model else []
        return [
            inspect.Parameter("context", _BY_NAME, annotation=typer.Context),
            *(inspect.Parameter(n, _BY_NAME, default=default, annotation=hint) for n, hint, default in model),
            *Some(EngineConfig, own).parameters(),
            inspect.Parameter("chat_template_kwargs", _BY_NAME, default=None, annotation=_TEMPLATE_KWARGS),
            inspect.Parameter("engine_arg", _BY_NAME, default=None, annotation=_SETTINGS),
        ]

    def made(self, values: dict) -> EngineConfig | Fields:
        """The config, of which options that were given go before the file's; without a model: what was given."""
        if not self.has_model:
            return _given(values)
        model = values["model"]
        is_file = Path(model).suffix in ENGINE_FILES and Path(model).is_file()
        config = EngineConfig.load(model, values["trust_config"]) if is_file else EngineConfig(model)
        return self.changed(config, values)

    def changed(self, config: EngineConfig, values: dict) -> EngineConfig:
        """The same but for what was given."""
        adapters, models = _on_top(**{name: values[name] or () for name in _ON_TOP})
        both = {"adapters": {**config.adapters, **adapters}, "models": {**config.models, **models}}
        return replace(config, **both).changed(**_given(values))


@dataclass(frozen=True)
class Prompts:
    """What was read. name: as it was asked for; limit: of prompts, if there is one."""

    name: str
    data: "Dataset"
    limit: int | None


@dataclass(frozen=True)
class Data:
    """Options for a set of prompts: what to read, in which format, and how much of it."""

    def parameters(self) -> list[inspect.Parameter]:
        empty = inspect.Parameter.empty
        given = (
            ("prompts", _PROMPTS, empty),
            ("form", Format, None),
            ("column", Column, None),
            ("skip_invalid", SkipInvalid, False),
            ("limit", _LIMIT, None),
        )
        return [inspect.Parameter(n, _BY_NAME, default=d, annotation=a) for n, a, d in given]

    def made(self, values: dict) -> Prompts:
        """Read the prompts; print how many rows were left out, and why."""
        from snpatch.data import load_dataset

        name, limit = values["prompts"], values["limit"]
        data = load_dataset(
            name, format=values["form"], column=values.get("column"), skip_invalid=values["skip_invalid"]
        )
        data.print_row_notes(name)
        return Prompts(name, data if limit is None else data.first(min(limit, len(data))), limit)


@dataclass(frozen=True)
class Source(Data):
    """The same options, not read yet; there may be no prompts."""

    def parameters(self) -> list[inspect.Parameter]:
        prompts, *others = super().parameters()
        hint = Annotated[str | None, *prompts.annotation.__metadata__]
        return [prompts.replace(default=None, annotation=hint), *others]

    def made(self, values: dict) -> Fields | None:
        """The fields of a PromptSet, and skip_invalid."""
        if values["prompts"] is None:
            return None
        names = {
            "source": "prompts",
            "format": "form",
            "column": "column",
            "first": "limit",
            "skip_invalid": "skip_invalid",
        }
        return {name: values[option] for name, option in names.items()}


def _given(values: dict) -> Fields:
    """What was said of an engine besides its models."""
    given = {f.name: values[f.name] for f in fields(EngineConfig) if f.metadata and is_given(values, f.name)}
    if values["chat_template_kwargs"] is not None:
        given["chat_template_kwargs"] = parse_json_object(values["chat_template_kwargs"], "--chat-template-kwargs")
    return given | pairs(values["engine_arg"], "--engine-arg")


def is_given(values: dict, name: str) -> bool:
    """Whether an option or argument of a command stood on the command line."""
    return values["context"].get_parameter_source(name).name == "COMMANDLINE"


def generated(**kinds: Some | Engine | Data) -> Callable:
    """Decorates a command: parameters of these names are made from options that stand in their places."""

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        parameters = []
        for parameter in signature.parameters.values():
            found = kinds[parameter.name].parameters() if parameter.name in kinds else [parameter]
            parameters += [p.replace(kind=_BY_NAME) for p in found]

        @functools.wraps(command)
        def run(**values):
            own = {name: values[name] for name in signature.parameters if name not in kinds}
            return command(**own, **{name: kind.made(values) for name, kind in kinds.items()})

        run.__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def pairs(texts: list[str] | None, option: str) -> dict[str, object]:
    """name=value of a repeated option; a value is JSON where it is JSON, else as it stands."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SnpatchError(f"{option} wants name=value, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _on_top(adapter: Iterable[str], checkpoint: Iterable[str], lora: Iterable[str]) -> tuple[dict, dict]:
    """Adapters on the model's own weights, and the models that have others: both as EngineConfig takes them."""
    return group_models(
        *(
            parse_adapters(given, ",", FORM.format(name))
            for name, given in (("adapter", adapter), ("checkpoint", checkpoint), ("lora", lora))
        )
    )


_BY_NAME = inspect.Parameter.KEYWORD_ONLY
TrustConfig = Annotated[
    bool,
    typer.Option(
        "--trust-config",
        help="Take from a config file what may run code or open this host: judges that are Python functions, vLLM's "
        "arguments outside the harmless ones. Read the file first.",
    ),
]
_MODEL = Annotated[str, typer.Argument(help="Hugging Face folder or model name, or an engine's config (.toml, .json).")]
_PROMPTS = Annotated[
    str,
    typer.Argument(help="File (JSONL, CSV, parquet, a text with a prompt a line), or a data set's name: beavertails."),
]
Format = Annotated[str | None, typer.Option("--format", help="The data set whose published format the file has.")]
Column = Annotated[str | None, typer.Option(help="The column that holds the prompt.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Leave broken rows out, and say how many.")]
_LIMIT = Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")]
_ADAPTERS = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="name=folder, or name=folder,folder stacked in order. Folders of the hub: owner/name. May be repeated.",
    ),
]
_CHECKPOINTS = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="name=checkpoint: a model with other weights than MODEL's. May be repeated."),
]
_LORA = Annotated[
    list[str] | None,
    typer.Option("--lora", help="name=folder: a model with a LoRA merged into its weights. May be repeated."),
]
_ON_TOP = {"adapter": _ADAPTERS, "checkpoint": _CHECKPOINTS, "lora": _LORA}
_TEMPLATE_KWARGS = Annotated[
    str | None,
    typer.Option(help='Variables that chat templates read, as JSON: {"enable_thinking": false}.'),
]
_SETTINGS = Annotated[
    list[str] | None,
    typer.Option("--engine-arg", help="name=value for the backend, as tensor_parallel_size=2. May be repeated."),
]


def _parameter(field, hint, default) -> inspect.Parameter:
    least = {"min": field.metadata["min"]} if "min" in field.metadata else {}
    name = field.name.replace("_", "-")
    flags = [f"--{name}/--no-{name}" if default else f"--{name}"] if hint is bool else []
    if get_origin(hint) is tuple:
        hint, default = list[str] | None, None
    elif str in get_args(hint) and int in get_args(hint):  # a word or a number: read as a word
        hint = str
    annotation = Annotated[hint, typer.Option(*flags, help=field.metadata["help"], **least)]
    return inspect.Parameter(field.name, _BY_NAME, default=default, annotation=annotation)
