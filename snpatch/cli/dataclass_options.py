"""Command-line options made from dataclass fields, which hold name, type, default and help.

A command that takes `config: EngineConfig` or `sampling: Fields` gets options in place of the parameter, so that a new
field becomes an option of every command that has the others.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_args, get_origin, get_type_hints

import typer

from snpatch.config import EngineConfig, group_models, parse_adapters, parse_json_object
from snpatch.errors import SnpatchError
from snpatch.utils.parsing import parse_pairs

if TYPE_CHECKING:
    from snpatch.data import Dataset

Fields = dict[str, Any]  # values of a dataclass's fields
ENGINE_FILES = (".toml", ".json")
FOLDERS_FORM = "name=folder or name=folder,folder"


class Options(Protocol):
    """Options in place of a parameter of a command."""

    def parameters(self) -> list[inspect.Parameter]:
        """Return the options as keyword parameters with typer's annotations."""
        ...

    def build(self, values: dict) -> Any:
        """Return the parameter's value. values: of all options of the command."""
        ...


@dataclass(frozen=True)
class FieldOptions:
    """Options for fields of a dataclass. of: the class, or an instance, whose values are then the defaults."""

    of: Any
    names: tuple[str, ...]

    def parameters(self) -> list[inspect.Parameter]:
        """Return a parameter for each field in `names`, with help and limits from the field's metadata."""
        kind = self.of if isinstance(self.of, type) else type(self.of)
        declared, hints = {f.name: f for f in fields(self.of)}, get_type_hints(kind)
        return [_parameter(declared[name], hints[name], getattr(self.of, name)) for name in self.names]

    def build(self, values: dict) -> Fields:
        """Return the fields' values; options that were not given have the defaults."""
        chosen = {n: getattr(self.of, n) if values[n] is None else values[n] for n in self.names}
        return {n: tuple(value) if isinstance(value, list) else value for n, value in chosen.items()}


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine. has_model: with the model and its adapters."""

    has_model: bool = True

    def parameters(self) -> list[inspect.Parameter]:
        """Return parameters for the click context, the model (if `has_model`), and the fields of EngineConfig."""
        names = tuple(f.name for f in fields(EngineConfig) if "help" in f.metadata)
        model = [("model", _MODEL, inspect.Parameter.empty)] if self.has_model else []
        model += [(name, hint, None) for name, hint in _MODEL_OPTIONS.items()] if self.has_model else []
        model += [("trust_config", TrustConfig, False)] if self.has_model else []
        return [
            inspect.Parameter("context", _BY_NAME, annotation=typer.Context),
            *(inspect.Parameter(n, _BY_NAME, default=default, annotation=hint) for n, hint, default in model),
            *FieldOptions(EngineConfig, names).parameters(),
            inspect.Parameter("chat_template_kwargs", _BY_NAME, default=None, annotation=_TEMPLATE_KWARGS),
            inspect.Parameter("engine_arg", _BY_NAME, default=None, annotation=_ENGINE_ARGUMENTS),
        ]

    def build(self, values: dict) -> Any:
        """Return the config: given options replace those of a file.

        Without a model, return the given fields.
        """
        if not self.has_model:
            return _given_fields(values)
        model = values["model"]
        is_file = Path(model).suffix in ENGINE_FILES and Path(model).is_file()
        config = EngineConfig.load(model, values["trust_config"]) if is_file else EngineConfig(model)
        return self.changed(config, values)

    def changed(self, config: EngineConfig, values: dict) -> EngineConfig:
        """Return the config with the given options."""
        adapters, models = _parse_models(**{name: values[name] or () for name in _MODEL_OPTIONS})
        both = {"adapters": {**config.adapters, **adapters}, "models": {**config.models, **models}}
        return replace(config, **both).changed(**_given_fields(values))


@dataclass(frozen=True)
class Prompts:
    """Prompts of a command. name: as the user gave it; limit and column: as far as they were given."""

    name: str
    data: "Dataset"
    limit: int | None
    column: str | None


@dataclass(frozen=True)
class DatasetOptions:
    """Options of a set of prompts: source, format and number. takes_text: prompts can be given as --prompt TEXT."""

    takes_text: bool = False

    def parameters(self) -> list[inspect.Parameter]:
        """Return parameters that select and read prompts.

        `takes_text` adds --prompt and makes PROMPTS optional.
        """
        empty = inspect.Parameter.empty
        options = [
            ("prompts", _PROMPTS, empty),
            ("form", Format, None),
            ("column", Column, None),
            ("skip_invalid", SkipInvalid, False),
            ("limit", _LIMIT, None),
        ]
        if self.takes_text:
            options[0] = ("prompts", Annotated[str | None, *get_args(_PROMPTS)[1:]], None)
            options.insert(1, ("prompt", _TEXT, None))
        return [inspect.Parameter(n, _BY_NAME, default=d, annotation=a) for n, a, d in options]

    def build(self, values: dict) -> Prompts:
        """Read the prompts; print how many rows were dropped, and why."""
        name, texts, limit = values["prompts"], values.get("prompt"), values["limit"]
        if (name is None) == (not texts):
            raise SnpatchError(
                "PROMPTS: expected a file or dataset, or --prompt TEXT, got " + ("both" if name else "none")
            )
        if texts:
            from snpatch.data.dataset import Dataset, Example

            examples = tuple(Example([{"role": "user", "content": text}]) for text in texts)
            data = Dataset("--prompt", examples, 0, {})
        else:
            from snpatch.data import load_dataset

            options = {"format": values["form"], "column": values.get("column"), "skip_invalid": values["skip_invalid"]}
            data = load_dataset(name, **options)
            data.log_row_notes(name)
        data = data if limit is None else data.first(min(limit, len(data)))
        return Prompts(name or "--prompt", data, limit, values.get("column"))


@dataclass(frozen=True)
class DatasetSourceOptions:
    """The options of DatasetOptions for prompts that are read later; there may be none."""

    def parameters(self) -> list[inspect.Parameter]:
        """Return the parameters of DatasetOptions, of which PROMPTS may be left out."""
        prompts, *others = DatasetOptions().parameters()
        hint = Annotated[str | None, *prompts.annotation.__metadata__]
        return [prompts.replace(default=None, annotation=hint), *others]

    def build(self, values: dict) -> Fields | None:
        """Return the fields of a PromptSet, and skip_invalid; None without prompts."""
        if values["prompts"] is None:
            return None
        options = {"source": "prompts", "format": "form", "first": "limit"}
        return {name: values[options.get(name, name)] for name in (*options, "column", "skip_invalid")}


def _given_fields(values: dict) -> Fields:
    """Return the engine's fields that were given on the command line, without its models."""
    given_fields = {
        f.name: values[f.name] for f in fields(EngineConfig) if "help" in f.metadata and is_given(values, f.name)
    }
    if values["chat_template_kwargs"] is not None:
        given_fields["chat_template_kwargs"] = parse_json_object(
            values["chat_template_kwargs"], "--chat-template-kwargs"
        )
    return given_fields | parse_values(values["engine_arg"], "--engine-arg")


def is_given(values: dict, name: str) -> bool:
    """Return whether an option or argument was given on the command line."""
    return values["context"].get_parameter_source(name).name == "COMMANDLINE"


def with_options(**kinds: Options) -> Callable:
    """Decorate a command: replace parameters of these names by options, and pass what the options build."""

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        parameters = []
        for parameter in signature.parameters.values():
            options = kinds[parameter.name].parameters() if parameter.name in kinds else [parameter]
            parameters += [option.replace(kind=_BY_NAME) for option in options]

        @functools.wraps(command)
        def run(**values):
            own = {name: values[name] for name in signature.parameters if name not in kinds}
            return command(**own, **{name: kind.build(values) for name, kind in kinds.items()})

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def parse_values(entries: list[str] | None, option: str) -> dict[str, object]:
    """Parse repeated name=value options, whose values are JSON if they can be read as JSON, else text."""
    return {name: _parse_json(value) for name, value in parse_pairs(entries, option).items()}


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parse_models(adapter: Iterable[str], checkpoint: Iterable[str], lora: Iterable[str]) -> tuple[dict, dict]:
    """Return adapters on the primary weights, and models on other weights, as EngineConfig takes them."""
    options = (("--adapter", adapter), ("--checkpoint", checkpoint), ("--lora", lora))
    return group_models(*(parse_adapters(entries, ",", option, FOLDERS_FORM) for option, entries in options))


_BY_NAME = inspect.Parameter.KEYWORD_ONLY
TrustConfig = Annotated[
    bool,
    typer.Option(
        "--trust-config",
        help="Accept settings of a config file that may run code or open this host: judges that are Python functions, "
        "and vLLM arguments that are not on the allow-list. Read the file first.",
    ),
]
_MODEL = Annotated[str, typer.Argument(help="Hugging Face folder or name, or an engine config (.toml, .json).")]
_PROMPTS = Annotated[
    str,
    typer.Argument(help="File (JSONL, CSV, Parquet, or text with a prompt per line) or dataset, such as beavertails."),
]
Format = Annotated[
    str | None, typer.Option("--format", help="Published dataset whose format the file uses, such as harmbench.")
]
Column = Annotated[str | None, typer.Option(help="Column with the prompt. Default: detected by its name.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Drop invalid rows and print their number.")]
_TEXT = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt as text, instead of PROMPTS. Repeatable.")]
_LIMIT = Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.")]
_ADAPTERS = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="Add a model: name=folder of a PEFT IA3 adapter (or owner/name on the hub). name=folder,folder stacks "
        "several adapters in order. Repeatable.",
    ),
]
_CHECKPOINTS = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", help="Add a model on other weights than MODEL's: name=checkpoint. Repeatable."),
]
_LORA = Annotated[
    list[str] | None,
    typer.Option("--lora", help="Add a model: name=folder of a PEFT LoRA, merged into MODEL's weights. Repeatable."),
]
_MODEL_OPTIONS = {"adapter": _ADAPTERS, "checkpoint": _CHECKPOINTS, "lora": _LORA}
_TEMPLATE_KWARGS = Annotated[
    str | None,
    typer.Option(help='Variables of the chat template as JSON, such as {"enable_thinking": false}.'),
]
_ENGINE_ARGUMENTS = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg", help="Argument of the backend: name=value, such as tensor_parallel_size=2. Repeatable."
    ),
]


def _parameter(field, hint, default) -> inspect.Parameter:
    limits = {name: field.metadata[name] for name in ("min", "max") if name in field.metadata}
    name = field.name.replace("_", "-")
    flags = [f"--{name}/--no-{name}" if default else f"--{name}"] if hint is bool else []
    if get_origin(hint) is tuple:
        hint, default = list[str] | None, None
    elif str in get_args(hint) and int in get_args(hint):  # a word or a number is parsed later
        hint = str
    annotation = Annotated[hint, typer.Option(*flags, help=field.metadata["help"], **limits)]
    return inspect.Parameter(field.name, _BY_NAME, default=default, annotation=annotation)
