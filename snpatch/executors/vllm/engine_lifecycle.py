"""An engine of vLLM from its start to its end, for twins and for score models alike.

Why nothing here trusts vLLM to clean up: a start that fails or is interrupted leaves processes, and an engine that dies
lets whoever waits for it wait for ever.
"""

import atexit
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from pydantic import ValidationError

from snpatch.errors import EngineCrashedError, SnpatchError, first_line
from snpatch.executors.vllm import log, processes, zeroing
from snpatch.executors.vllm.child_processes import ChildProcesses
from snpatch.executors.vllm.processes import interrupt_on_ctrl_c
from snpatch.executors.vllm.quantization import check_kernels
from snpatch.executors.vllm.settings import KEY, check_heads, refuse

CLOSE_S = 2.0  # how long vLLM has to end by itself
# oneDNN keeps compiled code for each shape that it meets, 1024 by default: hundreds of MB in a worker on a CPU.
ONEDNN_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def start_engine(engine_args, check: Callable[[object], None] = refuse):
    """A started LLMEngine of these arguments, and what closed ends it. check: of vLLM's config, before it starts."""
    from vllm.v1.engine.llm_engine import LLMEngine

    with starting(engine_args, check) as (config, end):
        engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        end.callback(engine.engine_core.shutdown, timeout=CLOSE_S)
    threading.Thread(target=_tell_of_death, args=(engine.engine_core,), daemon=True).start()
    return engine, end


def start_async_engine(engine_args, log_stats: bool = False):
    """A started AsyncLLM of these arguments, and what closed ends it. log_stats: keep vLLM's metrics."""
    from vllm.v1.engine.async_llm import AsyncLLM

    with starting(engine_args) as (config, end):
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=not log_stats)
        end.callback(engine.shutdown)
    return engine, end


def engine_dead_error() -> EngineCrashedError:
    """The error of an engine that is no more."""
    cause = log.first_error(of_engine=True)
    return EngineCrashedError(f"vLLM's engine has ended{cause and f': {cause}'}; {log.keep_log()}")


@contextmanager
def starting(engine_args, check: Callable[[object], None] = refuse) -> Iterator[tuple[object, ExitStack]]:
    """vLLM's config of these arguments, checked, to start an engine of it in this block, and what ends that engine.

    The engine's own end is to be added. What was started is ended where the block fails, and with this process.
    """
    _check_guarded()
    with log.redirect_output():
        log.mark_start()
        from vllm.usage.usage_lib import UsageContext

        offspring, end = ChildProcesses(), ExitStack()
        end.callback(offspring.end)
        variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", processes.PARENT: str(os.getpid())}
        variables |= {name: os.environ.get(name, value) for name, value in ONEDNN_CACHE.items()}
        try:
            if KEY in (engine_args.additional_config or {}):  # a twin
                variables[zeroing.ENABLED] = "1"
                zeroing.enable()
            with _variables({**variables, **log.environment(), **offspring.environment()}), interrupt_on_ctrl_c():
                config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
                # Sized by tokens, and the rows are twice that.
                config.compilation_config.pass_config.fuse_allreduce_rms = False
                check(config)
                check_heads(config)
                check_kernels(config)
                yield config, end
        except BaseException as error:
            reason = offspring.reason()
            end.close()
            if isinstance(error, SnpatchError) or not isinstance(error, Exception):
                raise
            raise SnpatchError(reason or f"vLLM does not start: {_cause(error)} ({log.keep_log()})") from error
        offspring.started()
        atexit.register(end.close)
        end.callback(atexit.unregister, end.close)


def _check_guarded() -> None:
    """Raise in a process of vLLM's that runs the user's program again, as spawned processes import it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        with processes.report_errors():
            raise SnpatchError(
                "vLLM's processes import this program, which starts an engine while it is imported: put the code under "
                'if __name__ == "__main__":'
            )


def _cause(error: Exception) -> str:
    """Return why vLLM did not start, in one line: what its log says first, or the error itself."""
    if found := log.first_error():
        is_unsaved = "'<stdin>'" in found or "/<stdin>" in found
        return found + ". Save the program as a file: vLLM's processes import it." * is_unsaved
    if isinstance(error, ValidationError):  # whose first line only counts its errors
        return "; ".join(first_line(ValueError(one["msg"])) for one in error.errors())
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with these variables."""
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


def _tell_of_death(core) -> None:
    """Wake up whoever waits for an engine process that ended without a word; vLLM's client would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources = getattr(core, "resources", None)  # an engine of this process has none
    if resources is None:
        return
    while not resources.engine_dead:
        time.sleep(0.2)
    core.outputs_queue.put_nowait(EngineDeadError())
    for future in list(core.utility_results.values()):
        if not future.done():
            future.set_exception(EngineDeadError())
