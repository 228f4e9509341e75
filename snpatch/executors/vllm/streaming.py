"""vLLM executor for a server: one request at a time from many callers, over vLLM's AsyncLLM.

Why requests wait for slots in a queue of their own: they are served in order of arrival, and what a request names has
reached the workers before the request does.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from snpatch.errors import SnpatchError, first_line
from snpatch.executors.base import Output, Request
from snpatch.executors.request_rows import collect_resources
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_async_engine
from snpatch.executors.vllm.executor_base import VllmExecutorBase, WorkerInfo
from snpatch.executors.vllm.rpc import unwrap_answers
from snpatch.executors.vllm.slots import SlotLease
from snpatch.models.model import Model
from snpatch.utils.optional import require

ENGINE_CHECK_SECONDS = 0.2


class StreamingExecutor(VllmExecutorBase):
    """Executor that loads a causal language model into vLLM with two streams; call `start` first."""

    async def start(self, models: Sequence[Model], log_stats: bool = False) -> None:
        """Start vLLM, which takes from seconds to minutes, and check the loaded model.

        log_stats: keep vLLM's metrics.
        """
        args = self.launch.engine_args(scales_kv=any(m.scales_kv for m in models))
        self.engine, self._end = start_async_engine(args, log_stats)
        self._admission, self._released = asyncio.Lock(), asyncio.Event()
        self._queued, self._is_full = (
            0,
            False,
        )  # requests that wait for the lock or slots; whether the first lacks slots
        self._unfetched: dict[int, asyncio.Future] = {}  # ticket -> its records
        self._tasks: set[asyncio.Task] = set()  # background tasks
        self._engine_end = asyncio.create_task(self._wait_for_engine_end())
        try:
            self.worker_info = WorkerInfo.from_answers(await self.command("snpatch_start"))
        except BaseException:
            self.close()
            raise

    async def stream(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yield the output so far each time it grows; the last one has a checked receipt.

        Closing the iterator aborts the request. Requests with statistics need `VllmExecutor`.
        """
        results = self.results(request, lambda lease: self.codec.encode(request, lease, streaming=True))
        async with aclosing(results):
            async for result, records in results:
                output = self.codec.decode(request, result)
                if records is not None:
                    self.codec.confirm(request, output, records)
                yield output

    async def output(self, request: Request) -> Output:
        """Return a request's finished output with a checked receipt."""
        output: Output | None = None
        async with aclosing(self.results(request, lambda lease: self.codec.encode(request, lease))) as results:
            async for result, records in results:
                output = self.codec.decode(request, result)
                if records is not None:
                    self.codec.confirm(request, output, records)
        assert output is not None, "vLLM ended a request without a result"
        return output

    async def results(
        self, request: Request, encode: Callable[[SlotLease], EngineRequest]
    ) -> AsyncGenerator[tuple[Any, list[list[dict]] | None], None]:
        """Yield vLLM's own results of a request; the last one comes with each worker's records of it.

        encode: returns the arguments for vLLM after the request's slots are leased.
        """
        if self.engine is None:
            raise SnpatchError("this engine is closed")
        if request.observe:
            raise SnpatchError("statistics cannot be streamed")
        self.slots.check_request(request)
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        lease = await self._admit(request)
        unfetched: int | None = None  # the request's ticket, until its records are fetched
        try:
            encoded = encode(lease)
            unfetched = encoded.tag.ticket
            # aclosing aborts the request of a caller that stops iterating before its record is dropped below.
            async with aclosing(
                self.engine.generate(encoded.prompt, encoded.params, encoded.name, **encoded.more)
            ) as results:
                async for result in results:
                    records = None
                    if result.finished and unfetched is not None:
                        records = await self._fetch_records(unfetched)
                        unfetched = None
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
            if unfetched is not None:  # in a background task, because a cancelled caller must not wait
                self._start_background(self._drop_record(unfetched))

    async def command(self, name: str, *arguments) -> list:
        """Call a command of worker/commands.py in every worker and return the answers."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return unwrap_answers(await self._unless_engine_ends(self.engine.collective_rpc(name, args=arguments)))
        except EngineDeadError as error:
            raise engine_dead_error() from error

    def close(self) -> None:
        """Stop vLLM and its processes."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, self.engine = self.engine, None
        if engine is not None:
            engine.output_processor.propagate_error(EngineDeadError())  # otherwise running requests would wait forever
            self._engine_end.cancel()
            self._end.close()

    async def _admit(self, request: Request) -> SlotLease:
        """Lease slots for a request in order of arrival, and write what the workers lack.

        A request that names no adapter, ranking or constant does not wait.
        """
        if collect_resources(request).is_empty:
            return require(self.slots.acquire(request))
        self._queued += 1
        try:
            async with self._admission:
                while (lease := self.slots.acquire(request)) is None:
                    self._released.clear()
                    self._is_full = True
                    await self._unless_engine_ends(self._released.wait())
                self._is_full = False
                if lease.writes:
                    writing = self._start_background(self._write(lease))
                    try:
                        await asyncio.shield(writing)
                    except BaseException:
                        # Slots are released after their last write, which would change those of another request.
                        writing.add_done_callback(lambda _: self._release(lease))
                        raise
                return lease
        finally:
            self._queued -= 1

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for slots."""
        return self._queued if self._is_full else 0

    def _release(self, lease: SlotLease) -> None:
        lease.release()
        self._released.set()

    async def _write(self, lease: SlotLease) -> None:
        for write in lease.writes:
            await self.command("snpatch_write", *write)
        lease.mark_written()

    async def _fetch_records(self, ticket: int) -> list[list[dict]]:
        """Return each worker's records of a ticket; requests that finish meanwhile share the next fetch."""
        self._unfetched[ticket] = records = asyncio.get_running_loop().create_future()
        if len(self._unfetched) == 1:
            self._start_background(self._fetch())
        return await records

    async def _fetch(self) -> None:
        await asyncio.sleep(0)  # include all requests that finished in the same step
        futures, self._unfetched = self._unfetched, {}
        try:
            answers = await self.command("snpatch_fetch", list(futures))
            for future, *shards in zip(futures.values(), *answers, strict=True):
                if not future.done():
                    future.set_result(shards)
        except Exception as error:  # noqa: BLE001 (raised in the callers that wait)
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    async def _drop_record(self, ticket: int) -> None:
        """Drop the workers' record of an aborted request, unless the engine is closed."""
        if self.engine is not None:
            with suppress(SnpatchError):
                await self.command("snpatch_fetch", [ticket])

    def _start_background(self, coroutine) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait_for_engine_end(self) -> None:
        """Return when vLLM's engine has ended, because calls of vLLM itself would then wait forever."""
        while self.engine is not None and not self.engine.errored:
            await asyncio.sleep(ENGINE_CHECK_SECONDS)

    async def _unless_engine_ends(self, awaitable: Awaitable):
        """Await something; raise if the engine ends before."""
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({task, self._engine_end}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            return task.result()
        raise engine_dead_error()
