"""vLLM executor for many requests: runs them patched in vLLM's continuous batches.

Why it calls `LLMEngine.step` itself: requests with different patches share a batch, outputs are yielded as they finish,
and an interrupted run can abort its remaining requests.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from snpatch.errors import OverflowedError, SnpatchError
from snpatch.executors.base import Memory, Output, Request
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_engine
from snpatch.executors.vllm.executor_base import VllmExecutorBase, WorkerInfo
from snpatch.executors.vllm.rpc import unwrap_answers
from snpatch.executors.vllm.slots import SlotLease
from snpatch.models.model import Model
from snpatch.op.plan import encode_skip_eos
from snpatch.ranking.contrast_statistics import Statistics

BACKLOG_FACTOR = 4  # requests inside vLLM per request that runs at once: vLLM never idles, and no request waits long
FETCH_BATCH_SIZE = 512  # finished requests whose receipts are fetched at once
FETCH_DELAY_SECONDS = 0.25  # longest time from the first finished request to the next fetch


class VllmExecutor(VllmExecutorBase):
    """Executor that loads a causal language model into vLLM with two streams; serves `Executor`."""

    def start(self, models: Sequence[Model]) -> None:
        """Start vLLM, which takes from seconds to minutes, and check the loaded model."""
        self.engine, self._end = start_engine(self.launch.engine_args(scales_kv=any(m.scales_kv for m in models)))
        self.stale_tickets: list[int] = []  # of aborted requests, whose records have to be dropped
        self.owners: dict[str, _Run] = {}  # vLLM's name of a running request -> its run
        try:
            self.worker_info = WorkerInfo.from_answers(self.command("snpatch_start"))
        except BaseException:
            self.close()
            raise
        self.backlog = BACKLOG_FACTOR * self.engine.vllm_config.scheduler_config.max_num_seqs

    @property
    def memory(self) -> Memory:
        """Memory of all workers."""
        return self.worker_info.memory

    def check_request(self, request: Request) -> None:
        """Raise for a request that this engine can never run, however long it waits."""
        self.slots.check_request(request)

    def stream(self, requests: Iterable[Request]) -> Generator[tuple[int, Output], None, None]:
        """Yield (index, output) of each request as it finishes, with a checked receipt.

        Requests are read from the iterable as slots become free; those of a list are all checked first.
        """
        if self.engine is None:
            raise SnpatchError("this engine is closed")
        if isinstance(requests, Sequence):
            for request in requests:
                self.check_request(request)
        run = _Run(self)
        try:
            yield from run.outputs(requests)
        finally:
            run.end()

    def command(self, name: str, *arguments) -> list:
        """Call a command of worker/commands.py in every worker and return the answers."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return unwrap_answers(self.engine.collective_rpc(name, args=arguments))
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def step(self) -> None:
        """Wait for vLLM's next results, and pass each to the run that it belongs to."""
        for result in self.engine.step():
            if result.finished:
                self.owners.pop(result.request_id).finish(result)

    def close(self) -> None:
        """Stop vLLM and its processes."""
        engine, self.engine = self.engine, None
        if engine is not None:
            self._end.close()


@dataclass(eq=False)
class _Active:
    """A request inside the engine. output: empty until it has finished; its receipt is fetched later."""

    index: int
    request: Request
    engine_request: EngineRequest
    lease: SlotLease
    output: Output = field(default_factory=Output)

    @property
    def ticket(self) -> int:
        return self.engine_request.tag.ticket


class _Run:
    """One call of `stream`: its requests inside the engine and the slots that they use."""

    def __init__(self, executor: VllmExecutor) -> None:
        self._executor = executor
        self._running: dict[str, _Active] = {}  # by vLLM's name
        self._finished: deque[_Active] = deque()  # without their receipts
        self._groups: dict[int, tuple[Statistics, int]] = {}  # id of the statistics -> (statistics, group)
        self._waiting: tuple[int, Request] | None = None  # next request, for which no slots were free
        self._fetch_time = 0.0

    def outputs(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        from vllm.v1.engine.exceptions import EngineDeadError

        executor, remaining = self._executor, enumerate(requests)
        if executor.stale_tickets:
            executor.command("snpatch_fetch", executor.stale_tickets)
            executor.stale_tickets = []
        try:
            while self._admit(remaining) or self._running or self._waiting or self._finished:
                if self._is_fetch_due() or not (self._running or self._waiting):
                    yield from self._fetch()
                else:
                    executor.step()
            self._gather_statistics()
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def finish(self, result) -> None:
        """Decode the result of a finished request and release its slots."""
        active = self._running.pop(result.request_id)
        active.lease.release()
        if not self._finished:
            self._fetch_time = time.monotonic() + FETCH_DELAY_SECONDS
        active.output = self._executor.codec.decode(active.request, result)
        self._finished.append(active)

    def end(self) -> None:
        """Abort what still runs and release all slots.

        The engine may be ending, so this waits for no answer: the next run drops the records.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        executor = self._executor
        executor.stale_tickets += [active.ticket for active in (*self._running.values(), *self._finished)]
        for name, active in self._running.items():
            active.lease.release()
            executor.owners.pop(name, None)
        for _, group in self._groups.values():
            executor.slots.release_group(group)
        if self._running and executor.engine is not None:
            with suppress(EngineDeadError):
                executor.engine.abort_request(list(self._running))
        self._running, self._groups = {}, {}
        self._finished.clear()

    def _admit(self, remaining: Iterator[tuple[int, Request]]) -> bool:
        """Pass requests to vLLM while there are free slots; return whether any was passed."""
        executor, has_admitted = self._executor, False
        while len(self._running) < executor.backlog:
            following = self._waiting or next(remaining, None)
            if following is None:
                break
            index, request = following
            group = self._group_column(request)
            lease = executor.slots.acquire(request, group)
            if lease is None:
                assert executor.owners, "nothing runs, and no slots are free for a request that fits"
                self._waiting = following
                break
            self._waiting = None
            self._send(_Active(index, request, self._write(request, lease), lease))
            has_admitted = True
        return has_admitted

    def _write(self, request: Request, lease: SlotLease) -> EngineRequest:
        """Write what the workers lack for a request, and encode it."""
        try:
            for write in lease.writes:
                self._executor.command("snpatch_write", *write)
            lease.mark_written()
            return self._executor.codec.encode(request, lease)
        except BaseException:
            lease.release()
            raise

    def _send(self, active: _Active) -> None:
        executor, engine_request = self._executor, active.engine_request
        try:
            executor.engine.add_request(engine_request.name, engine_request.prompt, engine_request.params)
        except BaseException:
            active.lease.release()
            raise
        self._running[engine_request.name] = active
        executor.owners[engine_request.name] = self

    def _group_column(self, request: Request) -> int:
        """Return the request row's column GROUP; clear a group before its first use."""
        if request.observe is None:
            return -1
        statistics = request.observe.statistics
        if id(statistics) not in self._groups:
            group = self._executor.slots.acquire_group()
            self._groups[id(statistics)] = statistics, group
            self._executor.command("snpatch_clear_statistics", [group])
        group = self._groups[id(statistics)][1]
        return group if request.observe.include_eos else encode_skip_eos(group)

    def _is_fetch_due(self) -> bool:
        n = len(self._finished)
        return n >= FETCH_BATCH_SIZE or (n > 0 and time.monotonic() >= self._fetch_time)

    def _fetch(self) -> Iterator[tuple[int, Output]]:
        """Yield the finished outputs with their receipts and captures."""
        executor, finished = self._executor, list(self._finished)
        answers = executor.command("snpatch_fetch", [active.ticket for active in finished])
        self._finished.clear()
        for active, *shards in zip(finished, *answers, strict=True):
            try:
                executor.codec.confirm(active.request, active.output, shards)
            except OverflowedError as error:
                active.output.error = error
        for active in finished:
            yield active.index, active.output

    def _gather_statistics(self) -> None:
        """Add the observations of this run to the requests' statistics."""
        if not self._groups:
            return
        targets, groups = zip(*self._groups.values(), strict=True)
        answers = self._executor.command("snpatch_statistics", list(groups))
        observed = self._executor.codec.gather_statistics(self._executor.worker_info.shards, answers)
        for target, added in zip(targets, observed, strict=True):
            target.add(added.sums, added.count)
