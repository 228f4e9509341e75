"""`snpatch serve`: vLLM's OpenAI-compatible server, with patches by name and by request."""

import inspect
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.generated import ENGINE_FILES, Engine, Some, generated, is_given
from snpatch.errors import SnpatchError, SpoiledEngineError
from snpatch.server.config import ServeConfig

LIMITS = Some(ServeConfig, tuple(f.name for f in fields(ServeConfig) if f.metadata))
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}  # the words that are vLLM's own flags


def _repeated(help: str):
    return Annotated[list[str] | None, typer.Option(help=f"{help} May be repeated.")]


_NAMED = {  # option -> ServeConfig's field, and its help
    "ranking": ("rankings", "Ranking file, or name=file."),
    "constant": ("constants", "Constant's file, or name=file: a donor `constant:NAME`."),
    "guard": ("guards", "Guard file, or name=file."),
    "judge": ("judges", "name=judge, for sweeps that clients ask for; `refusal` is always there."),
    "patch": ("patches", "name=recipient=sft,donor=dpo,ranking=safety,k=20000 (where, strength, guard), or its JSON."),
}


@dataclass(frozen=True)
class ServeOptions:
    """What is served: a file, or a model with options; options go before the file's. With vLLM's own flags."""

    def parameters(self) -> list[inspect.Parameter]:
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_repeated(help))
            for name, (_, help) in _NAMED.items()
        ]
        return [*Engine().parameters(), *own, *LIMITS.parameters()]

    def made(self, values: dict) -> ServeConfig:
        from snpatch.executors.vllm import log

        with log.redirect_output():  # what vLLM says while it is imported
            from snpatch.server import vllm_args

        model = Path(values["model"])
        if model.suffix in ENGINE_FILES and model.is_file():
            config = ServeConfig.load(model, values["trust_config"])
            config = replace(config, engine=Engine().changed(config.engine, values))
        else:
            config = ServeConfig(Engine().made(values))
        for option, (field, _) in _NAMED.items():
            given = _tables(values[option]) if option == "patch" else o.named(values[option], option, o.stem)
            config = replace(config, **{field: {**getattr(config, field), **given}})
        given = {name: value for name, value in LIMITS.made(values).items() if is_given(values, name)}
        own = vllm_args.read(values["context"].args)
        engine = config.engine.changed(**own.engine)
        return replace(config, **given, engine=engine, vllm_server={**config.vllm_server, **own.server})


@generated(config=ServeOptions())
def serve(
    config: ServeConfig,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all of this as TOML, and end.")] = False,
) -> None:
    """Serve a model and its patches to OpenAI's clients. MODEL may be a file that --print-config wrote. Further options
    are those of `vllm serve`: --port, --api-key, --max-model-len, --tensor-parallel-size, ...

    Exit code 0 after SIGTERM or Ctrl-C, 2 if the engine has ended. A spoiled engine restarts the server.
    """
    if print_config:
        import tomli_w

        o.write(tomli_w.dumps(config.placed(Path.cwd()).as_table()))
        return
    from snpatch.server.launcher import serve

    try:
        serve(config)
    except SpoiledEngineError as error:
        print(f"snpatch: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, sys.orig_argv)


def _tables(entries: list[str] | None) -> dict[str, dict]:
    """Named patches from name=patch."""
    from snpatch.patching import spec

    tables = {}
    for entry in entries or ():
        name, equals, text = entry.partition("=")
        if not equals or not name or name in tables:
            raise SnpatchError(f"--patch wants name=patch, each name once; got {entry!r}")
        tables[name] = spec.table_of(text)
    return tables
