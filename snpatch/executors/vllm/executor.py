"""The vLLM executor: runs requests in vLLM's continuous batches, patched, at the engine's own speed.

Why it drives `LLMEngine` step by step: requests of different patches are one batch, results come as they finish, and
whatever interrupts a run can abort what is left.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from snpatch.errors import SnpatchError
from snpatch.executors.base import Output, Progress, Request, Statistics
from snpatch.executors.vllm.client import Client, Sent, answers_of, starting
from snpatch.executors.vllm.settings import refuse

DEAD = "vLLM's engine has ended; its own messages above say why"
CLOSE_S = 2.0  # how long vLLM has to end by itself
FETCH = 512  # finished requests whose receipts are fetched at once


class VllmExecutor(Client):
    """Loads a causal language model into vLLM as a twin and serves `Executor`. Arguments: see Client."""

    engine = None  # until it is started, and when it is closed

    def start(self) -> None:
        """Start vLLM, which takes its time, and check what it made of the model."""
        self.engine = start_engine(self.engine_args())
        self.stale: list[int] = []  # tickets of aborted requests, whose records are to be dropped
        try:
            self.started(self.command("snpatch_start", self.name))
        except SnpatchError:
            self.close()
            raise

    def execute(
        self, requests: Sequence[Request], groups: int = 0, progress: Progress | None = None
    ) -> tuple[list[Output], list[Statistics]]:
        """Run all requests; outputs in their order, and one Statistics for each of `groups` groups."""
        if self.engine is None:
            raise SnpatchError("this engine is closed")
        held, writes = self.take(requests)
        written = False
        try:
            if self.stale:
                self.command("snpatch_fetch", self.stale)
                self.stale = []
            for write in writes:
                self.command("snpatch_write", *write)
            written = True
            with self._groups(groups) as taken:
                run = _Run(self, [(request, self.sent(request, held, taken)) for request in requests], progress)
                outputs = run.finish()
                return outputs, self.gathered(self.command("snpatch_statistics", taken)) if taken else []
        finally:
            held.release(written)

    def command(self, name: str, *arguments) -> list:
        """Every worker's answer to one of worker.py's commands."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return answers_of(self.engine.collective_rpc(name, args=arguments))
        except EngineDeadError as error:
            raise SnpatchError(DEAD) from error

    def close(self) -> None:
        """Stop vLLM and its processes."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.engine_core.shutdown(timeout=CLOSE_S)

    @contextmanager
    def _groups(self, n: int) -> Iterator[list[int]]:
        """n of the engine's statistics groups, empty."""
        if n > len(self.free_groups):
            raise SnpatchError(f"{n} statistics groups are needed, {len(self.free_groups)} are free: raise max_groups")
        taken = [self.free_groups.pop() for _ in range(n)]
        try:
            if n:
                self.command("snpatch_clear_statistics", taken)
            yield taken
        finally:
            self.free_groups += taken


class _Run:
    """One `execute`: the requests inside the engine, and their outputs."""

    def __init__(
        self, executor: VllmExecutor, requests: Sequence[tuple[Request, Sent]], progress: Progress | None
    ) -> None:
        self._executor, self._requests, self._progress = executor, requests, progress
        self._outputs: list[Output | None] = [None] * len(requests)
        self._running: dict[str, int] = {}  # vLLM's name -> index
        self._unfetched: list[int] = []  # finished, but for their receipts

    def finish(self) -> list[Output]:
        """Add all, and step until every one is done. Whatever interrupts this, nothing of it is left behind."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._executor.engine
        try:
            for index, (_, sent) in enumerate(self._requests):
                self._running[sent.name] = index
                engine.add_request(sent.name, sent.prompt, sent.params)
            while self._running:
                for result in engine.step():
                    if result.finished:
                        self._take(result)
                if len(self._unfetched) >= FETCH:
                    self._fetch()
            self._fetch()
            return self._outputs
        except EngineDeadError as error:
            raise SnpatchError(DEAD) from error
        except BaseException:
            with suppress(EngineDeadError):
                self._abort()
            raise

    def _take(self, result) -> None:
        index = self._running.pop(result.request_id)
        request, sent = self._requests[index]
        self._outputs[index] = self._executor.output(request, result)
        if sent.has_record:
            self._unfetched.append(index)
        if self._progress:
            self._progress(len(self._requests) - len(self._running), len(self._requests))

    def _fetch(self) -> None:
        """Receipts and captures of what finished."""
        if not self._unfetched:
            return
        tickets = [self._requests[index][1].ticket for index in self._unfetched]
        answers = self._executor.command("snpatch_fetch", tickets)
        finished, self._unfetched = self._unfetched, []
        for index, *shards in zip(finished, *answers, strict=True):
            self._executor.confirm(self._requests[index][0], self._outputs[index], shards)

    def _abort(self) -> None:
        """Abort what runs. Sends only, as the engine may be ending, too; the records are dropped by the next run."""
        left = [*self._running.values(), *self._unfetched]
        self._executor.stale += [self._requests[index][1].ticket for index in left]
        if self._running:
            self._executor.engine.abort_request(list(self._running))


def start_engine(engine_args, check: Callable[[object], None] = refuse):
    """A started LLMEngine of these arguments; check: of vLLM's config, before it starts."""
    from vllm.v1.engine.llm_engine import LLMEngine

    with starting(engine_args, check) as config:
        engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    threading.Thread(target=_tell_of_death, args=(engine.engine_core,), daemon=True).start()
    return engine


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
