"""A server from its start to its end."""

import inspect
import os
import socket
import sys
import warnings
from argparse import Namespace
from contextlib import closing
from math import ceil
from pathlib import Path

from snpatch.async_engine import AsyncEngine
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.vllm import log, versions
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error
from snpatch.judges.factory import REFUSAL, is_model_judge, open_judge
from snpatch.judges.protocol import Judge
from snpatch.judges.refusal import RefusalWords
from snpatch.models.clock import uses_clock
from snpatch.server import vllm_args
from snpatch.server.client import PatchedClient
from snpatch.server.config import ServeConfig
from snpatch.server.registry import PatchRegistry
from snpatch.server.request_limits import protocol_with_deadline
from snpatch.server.state import InflightRequests, ServerState
from snpatch.server.uploads import Uploads

GRACE_S = 5  # for connections whose requests were ended


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, after which running requests end first.

    Raises:
        SpoiledEngineError: the engine must be restarted, and the server with it.
        EngineCrashedError: the engine ended.
    """
    import uvloop

    uvloop.run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its new place is none in vLLM 0.24
        from vllm.entrypoints.openai.api_server import build_and_serve, setup_server

    if config.engine.checked_backend() != "vllm":
        raise SnpatchError("a server runs in vLLM: install snpatch[cpu] or snpatch[cuda]")
    versions.check(serving=True)
    args = vllm_args.namespace(config.engine.model, config.vllm_server, config.engine.vllm)
    served = _served_names(args, config.engine.model)
    # vLLM's metrics say the first of the names, and without any the model's folder.
    engine = AsyncEngine.from_config(config.engine.changed(served_model_name=[*served, "base"]))
    catalogue = PatchRegistry(engine, config, served)
    serving = ServerState(
        config,
        engine,
        catalogue,
        InflightRequests(config.drain_s),
        judges=_judges(config),
        uploads=None if config.allow_upload is None else Uploads(config.allow_upload, catalogue),
        keys=tuple(filter(None, args.api_key or [os.environ.get("VLLM_API_KEY")])),
        has_own_template=args.chat_template is not None,
    )
    try:
        with log.redirect_output():
            address, sock = setup_server(args, **_only_one(setup_server))
    except (OSError, KeyError) as error:
        raise SnpatchError(f"vLLM's server does not start: {first_line(error)}") from error
    if sock.family != socket.AF_UNIX:  # gate.py ends the work for a client that does not read; this its connection
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ceil(1000 * config.send_timeout_s))
    with closing(sock), closing(engine):
        await engine.start(log_stats=True)
        seats = engine.executor.engine.vllm_config.scheduler_config.max_num_seqs
        serving.config = config.resolve_limits(engine.geometry.context, seats)
        _complete(args, serving, served)
        models, patches = ", ".join(engine.models), ", ".join(catalogue.patches) or "none"
        print(f"snpatch: serving at {address}: models {models}; patches {patches}", file=sys.stderr, flush=True)
        # Past the drain's limit whoever still listens is cut off: uvicorn would wait for them for ever. In vLLM 0.24 it
        # hears of SIGTERM itself, and counts from there.
        client, limit = PatchedClient(serving), {"timeout_graceful_shutdown": ceil(config.drain_s) + GRACE_S}
        http = protocol_with_deadline(config.body_timeout_s)
        ending = await build_and_serve(client, address, sock, args, http=http, **limit)
        is_dead = engine.executor.engine.errored
        engine.close()
        await ending
    if serving.spoiled is not None:
        raise serving.spoiled
    if is_dead:
        raise engine_dead_error()


def _served_names(args: Namespace, model: str) -> tuple[str, ...]:
    """Return the names of the engine's own model besides "base". The path of a folder is not for clients."""
    names = args.served_model_name or ([] if Path(model).is_dir() else [model])
    return (names,) if isinstance(names, str) else tuple(names)


def _complete(args: Namespace, serving: ServerState, served: tuple[str, ...]) -> None:
    """What vLLM's server takes from an engine that it starts itself."""
    engine = serving.engine
    args.served_model_name = [*served, "base"]
    args.disable_log_stats = False
    args.structured_outputs_config = engine.executor.engine.vllm_config.structured_outputs_config
    read_as_engine(args, serving)


def read_as_engine(args: Namespace, serving: ServerState) -> None:
    """Have vLLM's server render chats by the engine's own template and with its variables."""
    template = serving.engine.requests.templates[0]
    if not serving.has_own_template and (template.name != "tokenizer" or uses_clock(template.source)):
        args.chat_template = template.source
    if variables := serving.config.engine.chat_template_kwargs:
        args.default_chat_template_kwargs = {**variables, **(args.default_chat_template_kwargs or {})}


def _only_one(setup_server) -> dict:
    """One server listens to one port; vLLM 0.24 has no word for it."""
    return {"reuse_port": False} if "reuse_port" in inspect.signature(setup_server).parameters else {}


def _judges(config: ServeConfig) -> dict[str, Judge]:
    opened = {
        name: open_judge(source, **({"backend": "transformers"} if is_model_judge(source) else {}))
        for name, source in config.judges.items()
    }
    return {REFUSAL: RefusalWords()} | opened
