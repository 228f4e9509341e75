"""Start and end of a vLLM engine, for dual-stream models and score models.

Why vLLM is not trusted to clean up: it leaves worker processes when a start fails or is interrupted, and callers block
forever when its engine process dies.
"""

import atexit
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from snpatch.errors import EngineCrashedError, SnpatchError, first_line
from snpatch.executors.vllm import log, processes, zeroing
from snpatch.executors.vllm.child_processes import ChildProcesses
from snpatch.executors.vllm.engine_settings import KEY, check_heads, check_supported
from snpatch.executors.vllm.processes import interrupt_on_ctrl_c
from snpatch.executors.vllm.quantization import check_kernels

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SHUTDOWN_SECONDS = 2.0  # how long vLLM may take to end its processes
POLL_SECONDS = 0.2
# oneDNN caches compiled code for each new shape, 1024 by default: hundreds of MB in a worker on a CPU.
ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def start_engine(engine_args, check: Callable[["VllmConfig"], None] = check_supported):
    """Start an LLMEngine; return it and an ExitStack that ends it.

    check: called with vLLM's config beforehand.
    """
    from vllm.v1.engine.llm_engine import LLMEngine

    with engine_startup(engine_args, check) as (config, end):
        engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        end.callback(engine.engine_core.shutdown, timeout=SHUTDOWN_SECONDS)
    threading.Thread(target=_fail_calls_of_dead_engine, args=(engine.engine_core,), daemon=True).start()
    return engine, end


def start_async_engine(engine_args, log_stats: bool = False):
    """Start an AsyncLLM; return it and an ExitStack that ends it. log_stats: keep vLLM's metrics."""
    from vllm.v1.engine.async_llm import AsyncLLM

    with engine_startup(engine_args) as (config, end):
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=not log_stats)
        end.callback(engine.shutdown)
    return engine, end


def engine_dead_error() -> EngineCrashedError:
    """Return the error for calls to an engine whose process has ended, with the first error in its log."""
    cause = log.first_error(of_engine=True)
    return EngineCrashedError(f"vLLM's engine has ended{cause and f': {cause}'}; {log.keep_log()}")


@contextmanager
def engine_startup(
    engine_args, check: Callable[["VllmConfig"], None] = check_supported
) -> Iterator[tuple["VllmConfig", ExitStack]]:
    """Build and check vLLM's config; start an engine of it in this block.

    Yields the config and an ExitStack that ends the engine's processes, to which the caller adds the engine's own
    shutdown. The stack is closed if the block fails, and when this process exits.
    """
    _check_main_guard()
    with log.redirect_output():
        log.mark_start()
        from vllm.usage.usage_lib import UsageContext

        children, end = ChildProcesses(), ExitStack()
        end.callback(children.end)
        variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", processes.PARENT_VARIABLE: str(os.getpid())}
        variables |= {name: os.environ.get(name, value) for name, value in ONEDNN_CACHE.items()}
        try:
            if KEY in (engine_args.additional_config or {}):  # a dual-stream model
                variables[zeroing.ENABLED] = "1"
                zeroing.enable()
            with (
                _environment_variables({**variables, **log.environment(), **children.environment()}),
                interrupt_on_ctrl_c(),
            ):
                config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
                # Its buffers have one row per token, and a dual-stream model has two.
                config.compilation_config.pass_config.fuse_allreduce_rms = False
                check(config)
                check_heads(config)
                check_kernels(config)
                yield config, end
        except BaseException as error:
            reported = children.read_error()
            end.close()
            if isinstance(error, SnpatchError) or not isinstance(error, Exception):
                raise
            raise SnpatchError(reported or f"vLLM does not start: {_cause(error)} ({log.keep_log()})") from error
        children.finish_start()
        atexit.register(end.close)
        end.callback(atexit.unregister, end.close)


def _check_main_guard() -> None:
    """Raise if a process of vLLM imports the client's program.

    The program starts an engine while it is imported.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        with processes.report_errors():
            raise SnpatchError(
                "vLLM's processes import this program, which starts an engine while it is imported: put the code under "
                'if __name__ == "__main__":'
            )


def _cause(error: Exception) -> str:
    """Return why vLLM did not start, as one line: the first error in its log, or else the exception."""
    if logged := log.first_error():
        is_unsaved = "'<stdin>'" in logged or "/<stdin>" in logged
        return logged + ". Save the program as a file: vLLM's processes import it." * is_unsaved
    if isinstance(error, ValidationError):  # its first line has only the number of errors
        return "; ".join(first_line(ValueError(detail["msg"])) for detail in error.errors())
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in this block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _fail_calls_of_dead_engine(core) -> None:
    """Raise EngineDeadError in waiting calls after the engine process has ended.

    vLLM's client would wait forever.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    resources = getattr(core, "resources", None)  # an engine in this process has none
    if resources is None:
        return
    while not resources.engine_dead:
        time.sleep(POLL_SECONDS)
    core.outputs_queue.put_nowait(EngineDeadError())
    for future in list(core.utility_results.values()):
        if not future.done():
            future.set_exception(EngineDeadError())
