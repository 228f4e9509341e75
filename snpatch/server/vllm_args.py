"""vLLM's own flags of its server: read by vLLM's parser, and told apart: its engine's, and its HTTP server's.

Why its parser and none of ours: every version of vLLM has flags of its own.
"""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from snpatch.errors import SnpatchError

HOST = "127.0.0.1"  # where nothing else is said
GATE = "snpatch.server.middleware.RouteMiddleware"
PLAIN = (str, int, float, bool, list, dict)
INNER = ("subparser", "dispatch_function")  # of the parser's own
REFUSED = {  # what a server of patches cannot be, and why
    "headless": "it has no server",
    "grpc": "its requests would not be patched",
    "lora_modules": "LoRA adapters do not know of the second stream: give them as models, --lora name=folder",
    "enable_fault_tolerance": "it starts engines anew, which forget what they were sent",
    "enable_elastic_ep": "it starts engines anew, which forget what they were sent",
    "tokens_only": "its endpoint takes vLLM's own sampling parameters",
    "enable_scale_out": "its endpoints take vLLM's own sampling parameters",
}


@dataclass(frozen=True)
class Flags:
    """What was given: name -> value. engine: of vLLM's engine; server: of its HTTP server. Both plain data."""

    engine: Mapping[str, object]
    server: Mapping[str, object]


def read(argv: Sequence[str]) -> Flags:
    """What a command line gave of vLLM's flags, among them only those that are given."""
    parser = _parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(_parsed(parser, argv))
    if given.pop("model_tag", None) is not None:
        raise SnpatchError(f"one MODEL is served, and these are words beside it: {' '.join(argv)}")
    engine = {f.name for f in fields(AsyncEngineArgs)}
    plain = {name: _plain(name, value, parser.texts) for name, value in given.items() if name not in INNER}
    return Flags(
        {name: value for name, value in plain.items() if name in engine},
        {name: value for name, value in plain.items() if name not in engine},
    )


def namespace(model: str, server: Mapping[str, object], engine: Mapping[str, object]) -> argparse.Namespace:
    """What vLLM's server is started with, all of it. What cannot be right is an error."""
    given = {**server, **engine}
    for name, reason in REFUSED.items():
        if given.get(name):
            raise SnpatchError(f"--{name.replace('_', '-')} is not served: {reason}")
    if server.get("api_server_count", 1) != 1:
        raise SnpatchError("--api-server-count: one: rows and receipts belong to one process")
    parser = _parser()
    args = _parsed(parser, [model, *_argv(parser, server)])
    for name, value in engine.items():
        if isinstance(value, PLAIN) and not isinstance(value, dict):  # vLLM's own configs come from the engine
            setattr(args, name, value)
    try:
        ServeSubcommand().validate(args)
    except (ValueError, TypeError, KeyError) as error:
        raise SnpatchError(f"vLLM's server does not take its flags: {error}") from error
    args.model = model
    if args.host is None and args.uds is None:
        args.host = HOST
    args.middleware = [*args.middleware, GATE]
    return args


class _Parser(FlexibleArgumentParser):
    """Keeps the words that it reads, and raises where others exit."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.texts: dict[str, str] = {}

    def _get_value(self, action, text):
        self.texts[action.dest] = text
        return super()._get_value(action, text)

    def error(self, message: str):
        raise SnpatchError(f"vLLM's server: {message}")


def _parser() -> _Parser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = _Parser(add_help=False)
        commands = parser.add_subparsers(parser_class=_Parser, dest="subparser")
        return ServeSubcommand().subparser_init(commands)


def _parsed(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(list(argv))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise SnpatchError(f"vLLM's server does not take its flags: {error}") from error


def _plain(name: str, value: object, texts: Mapping[str, str]) -> object:
    """A value as TOML and JSON have it: of vLLM's own types what was written."""
    if type(value) in PLAIN:
        return value
    try:
        return json.loads(texts[name])
    except (KeyError, ValueError) as error:
        raise SnpatchError(f"--{name.replace('_', '-')}: wanted JSON, got {texts.get(name)!r}") from error


def _argv(parser: _Parser, table: Mapping[str, object]) -> list[str]:
    """The words that stand for name -> value."""
    words = []
    for name, value in table.items():
        flag = f"--{name.replace('_', '-')}"
        action = parser._option_string_actions.get(flag)
        if isinstance(value, bool):
            word = flag if value else f"--no-{flag[2:]}"
            words += [word] if value or word in parser._option_string_actions else []  # else it is off by itself
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            words += [f"{flag}={one}" for one in value]
        elif isinstance(value, list) and action is not None and action.nargs:
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}")
    return words
