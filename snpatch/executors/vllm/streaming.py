"""The streaming executor: one request at a time from many callers, over vLLM's AsyncLLM. What a server builds on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from snpatch.errors import SnpatchError
from snpatch.executors.base import Output, Request
from snpatch.executors.vllm.client import Client, answers_of, starting


class StreamingExecutor(Client):
    """Loads a causal language model into vLLM as a twin. Arguments: see Client. To be started before it is used."""

    async def start(self) -> None:
        """Start vLLM, which takes its time, and check what it made of the model."""
        from vllm.v1.engine.async_llm import AsyncLLM

        with starting(self.engine_args()) as config:
            self.engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        self._registering = asyncio.Lock()
        try:
            self.started(await self.command("snpatch_start", self.name))
        except SnpatchError:
            self.close()
            raise

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """The output so far, each time it grew; the last one has its receipt, which was checked.

        A caller who stops listening aborts the request. Statistics need `VllmExecutor`.
        """
        if request.observe:
            raise SnpatchError("statistics cannot be streamed")
        held, is_written, is_fetched = None, False, True
        try:
            async with self._registering:  # what a request names arrives before it does
                held, writes = self.take([request])
                for write in writes:
                    await self.command("snpatch_write", *write)
                is_written = True
            sent = self.sent(request, held, streaming=True)
            is_fetched = not sent.has_record
            # Closed here and now, so that a request nobody listens to is aborted before its record goes.
            async with aclosing(self.engine.generate(sent.prompt, sent.params, sent.name)) as results:
                async for result in results:
                    output = self.output(request, result)
                    if result.finished and not is_fetched:
                        shards = [answer[0] for answer in await self.command("snpatch_fetch", [sent.ticket])]
                        is_fetched = True
                        self.confirm(request, output, shards)
                    yield output
        finally:
            try:
                if not is_fetched:
                    await self.command("snpatch_fetch", [sent.ticket])
            finally:
                if held is not None:
                    held.release(is_written)

    async def command(self, name: str, *arguments) -> list:
        """Every worker's answer to one of worker.py's commands."""
        return answers_of(await self.engine.collective_rpc(name, args=arguments))

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self.engine.shutdown()
