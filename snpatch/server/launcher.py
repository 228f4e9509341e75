"""Start and shutdown of a server."""

import inspect
import logging
import os
import socket
import warnings
from argparse import Namespace
from contextlib import closing
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from snpatch.engine.async_engine import AsyncEngine
from snpatch.errors import SnpatchError, first_line
from snpatch.executors.vllm import log, versions
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error
from snpatch.judges.factory import is_model_judge, open_judge
from snpatch.judges.protocol import Judge
from snpatch.judges.refusal import REFUSAL_JUDGE, RefusalWords
from snpatch.models.clock import uses_clock
from snpatch.server import vllm_args
from snpatch.server.client import PatchedClient
from snpatch.server.config import ServeConfig
from snpatch.server.registry import PatchRegistry
from snpatch.server.request_limits import build_protocol
from snpatch.server.state import InflightRequests, ServerState
from snpatch.server.uploads import Uploads

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

GRACE_S = 5  # seconds for connections to close after their requests were ended


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish.

    Raises:
        SnpatchError: The config or the machine cannot run this server.
        SpoiledEngineError: The engine must be restarted, and the server with it.
        EngineCrashedError: The engine process died.
    """
    import uvloop

    uvloop.run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the new module is missing in vLLM 0.24
        from vllm.entrypoints.openai.api_server import build_and_serve, setup_server

    if config.engine.checked_backend() != "vllm":
        raise SnpatchError("snpatch serve: expected the vllm backend, got transformers. Pass --backend vllm.")
    versions.check(serving=True)
    args = vllm_args.parse_config(config.engine.model, config.vllm_server, config.engine.vllm)
    base_names = _base_names(args, config.engine.model)
    # vLLM's metrics use the first of these names; without any they would use the model's folder.
    engine = AsyncEngine.from_config(config.engine.changed(served_model_name=[*base_names, "base"]))
    registry = PatchRegistry(engine, config, base_names)
    state = ServerState(
        config,
        engine,
        registry,
        InflightRequests(config.drain_s),
        judges=_open_judges(config),
        uploads=None if config.allow_upload is None else Uploads(config.allow_upload, registry),
        api_keys=tuple(filter(None, args.api_key or [os.environ.get("VLLM_API_KEY")])),
        has_own_template=args.chat_template is not None,
    )
    try:
        with log.redirect_output():
            address, sock = setup_server(args, **_setup_options(setup_server))
    except (OSError, KeyError) as error:
        raise SnpatchError(f"vLLM's server cannot start: {first_line(error)}") from error
    if sock.family != socket.AF_UNIX:
        # middleware.py cancels the work for a client that does not read; this closes its connection.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ceil(1000 * config.send_timeout_s))
    with closing(sock), closing(engine):
        await engine.start(log_stats=True)
        max_num_seqs = engine.executor.engine.vllm_config.scheduler_config.max_num_seqs
        state.config = config.resolve_limits(engine.geometry.context, max_num_seqs)
        _complete_args(args, state, base_names)
        models, patches = ", ".join(engine.models), ", ".join(registry.patches) or "none"
        logger.info("snpatch: serving at %s: models %s; patches %s", address, models, patches)
        # Clients that still read after the drain are disconnected, because uvicorn would wait for them forever. In vLLM
        # 0.24 uvicorn handles SIGTERM itself and counts from there.
        client, timeout_s = PatchedClient(state), ceil(config.drain_s) + GRACE_S
        protocol = build_protocol(config.body_timeout_s)
        shutdown = await build_and_serve(
            cast("EngineClient", client), address, sock, args, http=protocol, timeout_graceful_shutdown=timeout_s
        )
        has_crashed = engine.executor.engine.errored
        engine.close()
        await shutdown
    if state.spoiled_error is not None:
        raise state.spoiled_error
    if has_crashed:
        raise engine_dead_error()


def _base_names(args: Namespace, model: str) -> tuple[str, ...]:
    """Return the base model's names besides "base".

    A folder is not one, because its path is not for clients.
    """
    names = args.served_model_name or ([] if Path(model).is_dir() else [model])
    return (names,) if isinstance(names, str) else tuple(names)


def _complete_args(args: Namespace, state: ServerState, base_names: tuple[str, ...]) -> None:
    """Set what vLLM's server would take from an engine that it starts itself."""
    args.served_model_name = [*base_names, "base"]
    args.disable_log_stats = False
    args.structured_outputs_config = state.engine.executor.engine.vllm_config.structured_outputs_config
    set_chat_template(args, state)


def set_chat_template(args: Namespace, state: ServerState) -> None:
    """Make vLLM's server render chats with the engine's template and template variables."""
    template = state.engine.requests.templates[0]
    if not state.has_own_template and (template.name != "tokenizer" or uses_clock(template.source)):
        args.chat_template = template.source
    if variables := state.config.engine.chat_template_kwargs:
        args.default_chat_template_kwargs = {**variables, **(args.default_chat_template_kwargs or {})}


def _setup_options(setup_server) -> dict:
    """Return the option that keeps other servers off the port; vLLM 0.24 does not have it."""
    return {"reuse_port": False} if "reuse_port" in inspect.signature(setup_server).parameters else {}


def _open_judges(config: ServeConfig) -> dict[str, Judge]:
    judges = {
        name: open_judge(source, **({"backend": "transformers"} if is_model_judge(source) else {}))
        for name, source in config.judges.items()
    }
    return {REFUSAL_JUDGE: RefusalWords()} | judges
