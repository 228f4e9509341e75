"""The streaming executor: one request at a time from many callers, over vLLM's AsyncLLM. What a server builds on.

Why admission is a queue of its own: a request that finds no row waits, first come first served, and what it names has
reached the workers before it does.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress

from snpatch.errors import SnpatchError, first_line
from snpatch.executors.base import Output, Request
from snpatch.executors.request_rows import collect_resources
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_async_engine
from snpatch.executors.vllm.executor_base import VllmExecutorBase, WorkerInfo
from snpatch.executors.vllm.rpc import unwrap_answers
from snpatch.executors.vllm.slots import SlotLease
from snpatch.models.model import Model

LOOK_S = 0.2  # between two looks at whether vLLM's engine lives


class StreamingExecutor(VllmExecutorBase):
    """Loads a causal language model into vLLM as a twin. To be started before it is used."""

    async def start(self, models: Sequence[Model], log_stats: bool = False) -> None:
        """Start vLLM, which takes its time, and check what it made of the model. log_stats: keep vLLM's metrics."""
        args = self.launch.engine_args(scales_kv=any(m.scales_kv for m in models))
        self.engine, self._end = start_async_engine(args, log_stats)
        self._admission, self._freed = asyncio.Lock(), asyncio.Event()
        self._queued, self._is_full = 0, False  # requests on their way to the lock's end; whether the first one waits
        self._unfetched: dict[int, asyncio.Future] = {}  # ticket -> its records
        self._tasks: set[asyncio.Task] = set()  # that nobody waits for
        self._death = asyncio.create_task(self._watch())
        try:
            self.worker_info = WorkerInfo.from_answers(await self.command("snpatch_start"))
        except BaseException:
            self.close()
            raise

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """The output so far, each time it grew; the last one has its receipt, which was checked.

        A caller who stops listening aborts the request. Statistics need `VllmExecutor`.
        """
        results = self.results(request, lambda lease: self.codec.encode(request, lease, streaming=True))
        async with aclosing(results):
            async for result, records in results:
                output = self.codec.decode(request, result)
                if records is not None:
                    self.codec.confirm(request, output, records)
                yield output

    async def output(self, request: Request) -> Output:
        """What a request gave, once it is finished, its receipt checked."""
        async with aclosing(self.results(request, lambda lease: self.codec.encode(request, lease))) as results:
            async for result, records in results:
                output = self.codec.decode(request, result)
                if records is not None:
                    self.codec.confirm(request, output, records)
        return output

    async def results(
        self, request: Request, send: Callable[[SlotLease], EngineRequest]
    ) -> AsyncIterator[tuple[object, list[list[dict]] | None]]:
        """vLLM's own results of a request, and with the last one each worker's records of it.

        send: how vLLM gets it, once what it names has its rows.
        """
        if self.engine is None:
            raise SnpatchError("this engine is closed")
        if request.observe:
            raise SnpatchError("statistics cannot be streamed")
        self.slots.check_request(request)
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        lease = await self._admit(request)
        sent, is_fetched = None, True
        try:
            sent, is_fetched = send(lease), False
            # Closed here and now, so that a request nobody listens to is aborted before its record goes.
            async with aclosing(self.engine.generate(sent.prompt, sent.params, sent.name, **sent.more)) as results:
                async for result in results:
                    records = None
                    if result.finished and not is_fetched:
                        records = await self._records(sent.tag.ticket)
                        is_fetched = True
                    yield result, records
        except EngineDeadError as error:
            raise engine_dead_error() from error
        except EngineGenerateError as error:  # of this request alone, unless the engine is dead as well
            raise (
                engine_dead_error()
                if self.engine is None or self.engine.errored
                else SnpatchError(f"vLLM does not run this request: {first_line(error.__cause__ or error)}")
            ) from error
        finally:
            self._release(lease)
            if not is_fetched:  # in a task of its own: a caller that is cancelled may not wait
                self._in_background(self._drop(sent.tag.ticket))

    async def command(self, name: str, *arguments) -> list:
        """Every worker's answer to one of worker/commands.py."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return unwrap_answers(await self._or_death(self.engine.collective_rpc(name, args=arguments)))
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def close(self) -> None:
        """Stop vLLM and its processes."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, self.engine = self.engine, None
        if engine is not None:
            engine.output_processor.propagate_error(EngineDeadError())  # vLLM would let them wait for ever
            self._death.cancel()
            self._end.close()

    async def _admit(self, request: Request) -> SlotLease:
        """Wait for rows for what a request names, and write what is not there. Callers are served in their order;
        who names nothing does not wait."""
        if collect_resources(request).is_empty:
            return self.slots.acquire(request)
        self._queued += 1
        try:
            async with self._admission:
                while (lease := self.slots.acquire(request)) is None:
                    self._freed.clear()
                    self._is_full = True
                    await self._or_death(self._freed.wait())
                self._is_full = False
                if lease.writes:
                    writing = self._in_background(self._write(lease))
                    try:
                        await asyncio.shield(writing)
                    except BaseException:
                        # Its rows are nobody else's before its last write was made, which would change theirs.
                        writing.add_done_callback(lambda _: self._release(lease))
                        raise
                return lease
        finally:
            self._queued -= 1

    @property
    def num_waiting(self) -> int:
        """How many requests wait for others to give up what they name a place of."""
        return self._queued if self._is_full else 0

    def _release(self, lease: SlotLease) -> None:
        lease.release()
        self._freed.set()

    async def _write(self, lease: SlotLease) -> None:
        for write in lease.writes:
            await self.command("snpatch_write", *write)
        lease.mark_written()

    async def _records(self, ticket: int) -> list[list[dict]]:
        """Each worker's records of a ticket. What finishes while others are fetched is fetched together."""
        self._unfetched[ticket] = found = asyncio.get_running_loop().create_future()
        if len(self._unfetched) == 1:
            self._in_background(self._fetch())
        return await found

    async def _fetch(self) -> None:
        await asyncio.sleep(0)  # all that finished in the same step are in it
        asked, self._unfetched = self._unfetched, {}
        try:
            answers = await self.command("snpatch_fetch", list(asked))
            for found, *shards in zip(asked.values(), *answers, strict=True):
                if not found.done():
                    found.set_result(shards)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is theirs who wait)
            for found in asked.values():
                if not found.done():
                    found.set_exception(error)

    async def _drop(self, ticket: int) -> None:
        """Free the places of an aborted request; with the engine they are gone anyway."""
        if self.engine is not None:
            with suppress(SnpatchError):
                await self.command("snpatch_fetch", [ticket])

    def _in_background(self, work) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        """Ends when vLLM's engine does: vLLM itself would let whoever waits for an answer wait for ever."""
        while self.engine is not None and not self.engine.errored:
            await asyncio.sleep(LOOK_S)

    async def _or_death(self, awaited: Awaitable):
        """What is awaited, unless the engine ends before."""
        task = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            return task.result()
        raise engine_dead_error()
