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
GATE = "snpatch.server.gate.Gate"
PLAIN = (str, int, float, bool, type(None), list, dict, tuple)
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
    engine = {f.name for f in fields(AsyncEngineArgs)}
    plain = {name: _plain(name, value, parser.texts) for name, value in given.items() if name not in _IGNORED}
    return Flags(
        {name: value for name, value in plain.items() if name in engine},
        {name: value for name, value in plain.items() if name not in engine},
    )


def namespace(model: str, server: Mapping[str, object], engine: Mapping[str, object]) -> argparse.Namespace:
    """What vLLM's server is started with, all of it. What cannot be right is an error."""
    for name, reason in REFUSED.items():
        if server.get(name):
            raise SnpatchError(f"--{name.replace('_', '-')} is not served: {reason}")
    if server.get("api_server_count", 1) != 1:
        raise SnpatchError("--api-server-count: one: rows and receipts belong to one process")
    args = _parsed(_parser(), [model, *_argv(server)])
    for name, value in engine.items():
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


_IGNORED = ("model_tag", "subparser", "config", "dispatch_function")


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
    if isinstance(value, PLAIN) and not (hasattr(value, "value") and not isinstance(value, PLAIN)):
        return list(value) if isinstance(value, tuple) else value
    try:
        return json.loads(texts[name])
    except (KeyError, ValueError) as error:
        raise SnpatchError(f"--{name.replace('_', '-')}: wanted JSON, got {texts.get(name)!r}") from error


def _argv(table: Mapping[str, object]) -> list[str]:
    """The words that stand for name -> value."""
    words = []
    for name, value in table.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
