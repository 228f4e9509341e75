"""`snpatch serve`: vLLM's OpenAI-compatible server, with patches by name or in the request."""

import inspect
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import ENGINE_FILES, EngineOptions, FieldOptions, is_given, with_options
from snpatch.errors import SpoiledEngineError
from snpatch.server.config import ServeConfig
from snpatch.utils.parsing import parse_pairs

SERVER_OPTIONS = FieldOptions(ServeConfig, tuple(f.name for f in fields(ServeConfig) if f.metadata))
FORWARD_UNKNOWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}  # they are vLLM's flags


def _repeatable(help: str):
    return Annotated[list[str] | None, typer.Option(help=f"{help} Repeatable.")]


_NAMED_OPTIONS = {  # option -> field of ServeConfig, help
    "ranking": ("rankings", "Ranking file, or name=file."),
    "constant": ("constants", "Constant file, or name=file; used as donor `constant:NAME`."),
    "guard": ("guards", "Guard file, or name=file."),
    "judge": ("judges", "name=judge for clients' sweeps; `refusal` is built in."),
    "patch": (
        "patches",
        "name=recipient=sft,donor=dpo,ranking=safety,k=20000 (positions, strength, guard), or name=JSON.",
    ),
}


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server: a config file or a model, vLLM's own flags, and options that override the file's values."""

    def parameters(self) -> list[inspect.Parameter]:
        """Return parameters for the engine, --ranking, --constant, --guard, --judge, --patch, and the server."""
        name_options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_repeatable(help))
            for name, (_, help) in _NAMED_OPTIONS.items()
        ]
        return [*EngineOptions().parameters(), *name_options, *SERVER_OPTIONS.parameters()]

    def build(self, values: dict) -> ServeConfig:
        """Build the config from MODEL (a file or a model), the given options and vLLM's flags; later ones win.

        Raises:
            SnpatchError: vLLM is missing or unsupported, or the file, an option or a flag is invalid.
        """
        from snpatch.executors.vllm import log, versions

        versions.check(serving=True)
        with log.redirect_output():  # vLLM prints while it is imported
            from snpatch.server import vllm_args

        model = Path(values["model"])
        if model.suffix in ENGINE_FILES and model.is_file():
            config = ServeConfig.load(model, values["trust_config"])
            config = replace(config, engine=EngineOptions().changed(config.engine, values))
        else:
            config = ServeConfig(EngineOptions().build(values))
        for option, (field, _) in _NAMED_OPTIONS.items():
            entries = (
                _parse_patches(values[option])
                if option == "patch"
                else o.parse_sources(values[option], option, o.file_stem)
            )
            config = replace(config, **{field: {**getattr(config, field), **entries}})
        options = {name: value for name, value in SERVER_OPTIONS.build(values).items() if is_given(values, name)}
        vllm = vllm_args.parse_argv(values["context"].args)
        engine = config.engine.changed(**vllm.engine)
        return replace(config, **options, engine=engine, vllm_server={**config.vllm_server, **vllm.server})


@with_options(config=ServeOptions())
def serve(
    config: ServeConfig,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration as TOML and exit.")
    ] = False,
) -> None:
    """Serve a model and its patches to OpenAI clients.

    MODEL may be a file written by --print-config. All options of `vllm serve` are accepted, too: --port, --api-key,
    --max-model-len, --tensor-parallel-size, ...

    The exit code is 0 after SIGTERM or Ctrl-C and 2 if the engine crashes. A spoiled engine restarts the server.
    """
    if print_config:
        import tomli_w

        o.write(tomli_w.dumps(config.placed(Path.cwd()).to_dict()))
        return
    from snpatch.server.launcher import serve

    try:
        serve(config)
    except SpoiledEngineError as error:
        print(f"snpatch: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, sys.orig_argv)


def _parse_patches(entries: list[str] | None) -> dict[str, dict]:
    """Return name -> patch as plain data from entries name=patch."""
    from snpatch.patching import spec

    texts = parse_pairs(entries, "--patch", expected="name=patch")
    return {name: spec.parse_patch_table(text) for name, text in texts.items()}
