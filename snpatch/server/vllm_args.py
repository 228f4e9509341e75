"""vLLM's own command-line flags: parsed by vLLM's parser and split into those of its engine and of its HTTP server.

Why vLLM's parser: each version of vLLM has other flags.
"""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from snpatch.errors import SnpatchError

DEFAULT_HOST = "127.0.0.1"
MIDDLEWARE = "snpatch.server.middleware.RouteMiddleware"
PLAIN_TYPES = (str, int, float, bool, list, dict)
PARSER_FIELDS = ("subparser", "dispatch_function")  # which the parser itself adds
REJECTED_FLAGS = {  # flag -> the reason why it cannot be combined with patches
    "headless": "it starts no HTTP server",
    "grpc": "its requests would not be patched",
    "lora_modules": "vLLM's LoRA adapters are not applied to the second stream. Use --lora name=folder instead.",
    "enable_fault_tolerance": "it restarts engines, which lose the patches that were sent to them",
    "enable_elastic_ep": "it restarts engines, which lose the patches that were sent to them",
    "tokens_only": "its endpoint takes vLLM's own sampling parameters",
    "enable_scale_out": "its endpoints take vLLM's own sampling parameters",
}


@dataclass(frozen=True)
class VllmArgs:
    """Values of vLLM's flags as plain data, by name: those of its engine and those of its HTTP server."""

    engine: Mapping[str, object]
    server: Mapping[str, object]


def parse_argv(argv: Sequence[str]) -> VllmArgs:
    """Parse vLLM's flags of a command line. The result holds only those that were set."""
    parser = _build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    values = vars(_parse(parser, argv))
    if values.pop("model_tag", None) is not None:
        raise SnpatchError(f"snpatch serve: expected one MODEL, got further arguments: {' '.join(argv)}")
    engine_names = {f.name for f in fields(AsyncEngineArgs)}
    texts = parser.texts
    plain = {name: _to_plain(name, value, texts) for name, value in values.items() if name not in PARSER_FIELDS}
    return VllmArgs(
        {name: value for name, value in plain.items() if name in engine_names},
        {name: value for name, value in plain.items() if name not in engine_names},
    )


def parse_config(model: str, server: Mapping[str, object], engine: Mapping[str, object]) -> argparse.Namespace:
    """Return the complete arguments of vLLM's server.

    Args:
        model: The engine's model.
        server: Flags of the HTTP server, as `parse_argv` returns them.
        engine: Flags of the engine, likewise.

    Raises:
        SnpatchError: Invalid flags, or flags that cannot be combined with patches.
    """
    values = {**server, **engine}
    for name, reason in REJECTED_FLAGS.items():
        if values.get(name):
            raise SnpatchError(f"--{name.replace('_', '-')} cannot be combined with patches: {reason}")
    if server.get("api_server_count", 1) != 1:
        raise SnpatchError("--api-server-count must be 1: patch state is not shared between API server processes")
    parser = _build_parser()
    args = _parse(parser, [model, *_to_argv(parser, server)])
    for name, value in engine.items():
        if isinstance(value, PLAIN_TYPES) and not isinstance(value, dict):  # vLLM's configs come from the engine
            setattr(args, name, value)
    try:
        ServeSubcommand().validate(args)
    except (ValueError, TypeError, KeyError) as error:
        raise SnpatchError(f"vLLM's server: invalid flags: {error}") from error
    args.model = model
    if args.host is None and args.uds is None:
        args.host = DEFAULT_HOST
    args.middleware = [*args.middleware, MIDDLEWARE]
    return args


class _Parser(FlexibleArgumentParser):
    """Parser that keeps the text of each value, and raises where argparse exits."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.texts: dict[str, str] = {}

    def _get_value(self, action, arg_string):
        self.texts[action.dest] = arg_string
        return super()._get_value(action, arg_string)

    def error(self, message: str):
        raise SnpatchError(f"vLLM's server: {message}")


def _build_parser() -> _Parser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = _Parser(add_help=False)
        commands = parser.add_subparsers(parser_class=_Parser, dest="subparser")
        return cast(_Parser, ServeSubcommand().subparser_init(commands))  # made by `commands`


def _parse(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    try:
        return cast(argparse.Namespace, parser.parse_args(list(argv)))  # never None
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise SnpatchError(f"vLLM's server: invalid flags: {error}") from error


def _to_plain(name: str, value: object, texts: Mapping[str, str]) -> object:
    """Return a value that TOML and JSON can hold.

    For an object of vLLM's it is parsed from the flag's text.
    """
    if type(value) in PLAIN_TYPES:
        return value
    try:
        return json.loads(texts[name])
    except (KeyError, ValueError) as error:
        raise SnpatchError(f"--{name.replace('_', '-')}: expected JSON, got {texts.get(name)!r}") from error


def _to_argv(parser: _Parser, table: Mapping[str, object]) -> list[str]:
    """Return the command-line arguments that set these values."""
    argv = []
    for name, value in table.items():
        flag = f"--{name.replace('_', '-')}"
        action = parser._option_string_actions.get(flag)
        if isinstance(value, bool):
            argument = flag if value else f"--no-{flag[2:]}"
            is_needed = value or argument in parser._option_string_actions  # other flags are off by default
            argv += [argument] if is_needed else []
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            argv += [f"{flag}={item}" for item in value]
        elif isinstance(value, list) and action is not None and action.nargs:
            argv += [flag, *map(str, value)]
        else:
            argv.append(f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}")
    return argv
