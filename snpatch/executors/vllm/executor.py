"""The vLLM executor: runs requests in vLLM's continuous batches, patched, at the engine's own speed.

Why it drives `LLMEngine` step by step: requests of different patches are one batch, results come as they finish, and
whatever interrupts a run can abort what is left.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from snpatch.errors import OverflowedError, SnpatchError
from snpatch.executors.base import Memory, Output, Request
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_engine
from snpatch.executors.vllm.executor_base import VllmExecutorBase, WorkerInfo
from snpatch.executors.vllm.rpc import unwrap_answers
from snpatch.executors.vllm.slots import SlotLease
from snpatch.models.model import Model
from snpatch.op.plan import encode_skip_eos
from snpatch.ranking.statistics import Statistics

BACKLOG = 4  # times as many requests are inside vLLM as run at once: it never waits for one, and none waits long
FETCH = 512  # finished requests whose receipts are fetched at once
FETCH_S = 0.25  # or so long after the first of them finished


class VllmExecutor(VllmExecutorBase):
    """Loads a causal language model into vLLM as a twin and serves `Executor`."""

    def start(self, models: Sequence[Model]) -> None:
        """Start vLLM, which takes its time, and check what it made of the model."""
        self.engine, self._end = start_engine(self.launch.engine_args(scales_kv=any(m.scales_kv for m in models)))
        self.stale: list[int] = []  # tickets of aborted requests, whose records are to be dropped
        self.owners: dict[str, _Run] = {}  # vLLM's name of what runs -> who asked for it
        try:
            self.worker_info = WorkerInfo.from_answers(self.command("snpatch_start"))
        except BaseException:
            self.close()
            raise
        self.backlog = BACKLOG * self.engine.vllm_config.scheduler_config.max_num_seqs

    @property
    def memory(self) -> Memory:
        """What all workers hold."""
        return self.worker_info.memory

    def check_request(self, request: Request) -> None:
        """An error for what this engine has no room for, however long a request waits."""
        self.slots.check_request(request)

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        """(index, output) of each request as it finishes, its receipt checked. Requests are taken as there is room."""
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
        """Every worker's answer to one of worker/commands.py."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return unwrap_answers(self.engine.collective_rpc(name, args=arguments))
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def step(self) -> None:
        """Wait for vLLM's next results, and hand each to the run that asked for it."""
        for result in self.engine.step():
            if result.finished:
                self.owners.pop(result.request_id).take(result)

    def close(self) -> None:
        """Stop vLLM and its processes."""
        engine, self.engine = self.engine, None
        if engine is not None:
            self._end.close()


class _Run:
    """One `stream`: its requests inside the engine, and what it holds there."""

    def __init__(self, executor: VllmExecutor) -> None:
        self._executor = executor
        self._running: dict[str, tuple[int, Request, EngineRequest, SlotLease]] = {}  # by vLLM's name
        self._finished: deque[tuple[int, Request, EngineRequest, Output]] = deque()  # but for their receipts
        self._groups: dict[int, tuple[Statistics, int]] = {}  # by the identity of the statistics
        self._waiting: tuple[int, Request] | None = None  # the one that there was no room for
        self._fetch_at = 0.0

    def outputs(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        from vllm.v1.engine.exceptions import EngineDeadError

        executor, rest = self._executor, enumerate(requests)
        if executor.stale:
            executor.command("snpatch_fetch", executor.stale)
            executor.stale = []
        try:
            while self._admit(rest) or self._running or self._waiting or self._finished:
                if self._is_time_to_fetch() or not (self._running or self._waiting):
                    yield from self._fetch()
                else:
                    executor.step()
            self._gather()
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def take(self, result) -> None:
        """One of this run's requests is finished."""
        index, request, sent, lease = self._running.pop(result.request_id)
        lease.release()
        if not self._finished:
            self._fetch_at = time.monotonic() + FETCH_S
        self._finished.append((index, request, sent, self._executor.codec.decode(request, result)))

    def end(self) -> None:
        """Nothing of it is left behind. Sends only, as the engine may be ending; records are dropped by the next."""
        from vllm.v1.engine.exceptions import EngineDeadError

        executor = self._executor
        executor.stale += [sent.tag.ticket for _, _, sent, _ in (*self._running.values(), *self._finished)]
        for name, (_, _, _, lease) in self._running.items():
            lease.release()
            executor.owners.pop(name, None)
        for _, group in self._groups.values():
            executor.slots.release_group(group)
        if self._running and executor.engine is not None:
            with suppress(EngineDeadError):
                executor.engine.abort_request(list(self._running))
        self._running, self._groups = {}, {}
        self._finished.clear()

    def _admit(self, rest: Iterator[tuple[int, Request]]) -> bool:
        """Hand requests to vLLM while there is room; whether any was."""
        executor, admitted = self._executor, False
        while len(self._running) < executor.backlog:
            index, request = self._waiting or next(rest, (None, None))
            if request is None:
                break
            group = self._group_of(request)
            lease = executor.slots.acquire(request, group)
            if lease is None:
                assert executor.owners, "nothing runs, and there is no room for a request that fits"
                self._waiting = index, request
                break
            self._waiting = None
            try:
                for write in lease.writes:
                    executor.command("snpatch_write", *write)
                lease.mark_written()
                sent = executor.codec.encode(request, lease)
                executor.engine.add_request(sent.name, sent.prompt, sent.params)
            except BaseException:
                lease.release()
                raise
            self._running[sent.name] = index, request, sent, lease
            executor.owners[sent.name] = self
            admitted = True
        return admitted

    def _group_of(self, request: Request) -> int:
        """The group of the request's statistics as its row has it; emptied when it is first used."""
        if request.observe is None:
            return -1
        into = request.observe.statistics
        if id(into) not in self._groups:
            group = self._executor.slots.acquire_group()
            self._groups[id(into)] = into, group
            self._executor.command("snpatch_clear_statistics", [group])
        group = self._groups[id(into)][1]
        return group if request.observe.include_eos else encode_skip_eos(group)

    def _is_time_to_fetch(self) -> bool:
        n = len(self._finished)
        return n >= FETCH or (n > 0 and time.monotonic() >= self._fetch_at)

    def _fetch(self) -> Iterator[tuple[int, Output]]:
        """What finished, with its receipts and captures."""
        executor, finished = self._executor, list(self._finished)
        answers = executor.command("snpatch_fetch", [sent.tag.ticket for _, _, sent, _ in finished])
        self._finished.clear()
        for (_, request, _, output), *shards in zip(finished, *answers, strict=True):
            try:
                executor.codec.confirm(request, output, shards)
            except OverflowedError as error:
                output.error = error
        for index, _, _, output in finished:
            yield index, output

    def _gather(self) -> None:
        """Add what was observed to the requests' statistics."""
        if not self._groups:
            return
        statistics, groups = zip(*self._groups.values(), strict=True)
        answers = self._executor.command("snpatch_statistics", list(groups))
        found = self._executor.codec.gather_statistics(self._executor.worker_info.shards, answers)
        for one, own in zip(statistics, found, strict=True):
            one.add(own.sums, own.count)
