"""AsyncEngine: one engine for many callers at once; texts arrive while they are written. What a server builds on."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from snpatch.config import EngineConfig
from snpatch.engine.base import BaseEngine
from snpatch.engine.requests import Completion, Prompt
from snpatch.errors import OverflowedError, SnpatchError, SpoiledEngineError, shown
from snpatch.executors.base import Output, Request
from snpatch.patching.patch import Patch
from snpatch.sampling import GREEDY, Sampling

BROKEN = "\ufffd"  # what stands for a character whose last bytes are not written yet


@dataclass(frozen=True)
class Delta:
    """What a text grew by: token_ids, and text of whole characters that no stop string will take back.

    completion: the finished text, its receipt checked, in the last delta; None in all others.
    """

    token_ids: list[int]
    text: str
    completion: Completion | None = None


class AsyncEngine(BaseEngine):
    """A model and its adapters in vLLM, for many callers of one event loop. Arguments: Engine's.

        async with AsyncEngine(model, adapters) as engine:
            async for delta in engine.generate("Hello", Patch("sft", "dpo", safety, 20_000)):
                print(delta.text, end="")

    A caller that stops listening, or is cancelled, ends its own request and nothing else. Where vLLM has no room for
    what a request names, it waits, first come first served. The end of vLLM is a SnpatchError for whoever waits.
    """

    def _build_executor(self, config: EngineConfig):
        if self.backend != "vllm":
            raise SnpatchError("AsyncEngine runs in vLLM: install snpatch[cpu] or snpatch[cuda], or use Engine")
        from snpatch.executors.vllm.streaming import StreamingExecutor

        return StreamingExecutor(config, self._opened.text_processors)

    async def start(self, log_stats: bool = False) -> None:
        """Start vLLM, which takes its time; `async with` does it. log_stats: keep vLLM's metrics."""
        self._log_stats = log_stats
        await self.executor.start(list(self._opened.models.values()), log_stats)

    async def restart(self) -> None:
        """Restart vLLM, as after an EngineCrashedError; open requests end with an error, models and adapters stay."""
        self.executor.close()
        self.executor = self._build_executor(self.config)
        await self.start(self._log_stats)

    def judge(self, error: OverflowedError) -> OverflowedError:
        """Return the error to report of a text that overflowed: a SpoiledEngineError asks for a restart."""
        return self._spoilage.judge(error)

    def close(self) -> None:
        """Stop vLLM; open requests end with a SnpatchError."""
        self.executor.close()

    async def __aenter__(self) -> "AsyncEngine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, patch: Patch | str = "base", sampling: Sampling = GREEDY
    ) -> AsyncIterator[Delta]:
        """A completion of one prompt as it is written, patched; bad input is an error before anything runs."""
        if not isinstance(sampling, Sampling):
            raise SnpatchError(f"sampling: wanted a Sampling, got {shown(sampling)}")
        if sampling.n > 1:
            raise SnpatchError("AsyncEngine.generate: one text a call; call it several times for several")
        ids = self.encode([prompt], self.requests.recipients(patch, 1))
        ((_, request),) = self.requests.writing(ids, patch, sampling)
        return self._deltas(request)

    async def _deltas(self, request: Request) -> AsyncIterator[Delta]:
        held_back = max((len(stop) for stop in request.sampling.stop), default=1) - 1
        sent, executor = Output(), self.executor
        try:
            async with aclosing(executor.stream(request)) as outputs:
                async for output in outputs:
                    text = output.text
                    if output.finish_reason is None:
                        text = text[: len(text) - held_back].rstrip(BROKEN)
                    new = text[len(sent.text) :]
                    tokens = output.token_ids[len(sent.token_ids) :]
                    sent = Output(output.token_ids, sent.text + new)
                    completion = Completion.of(request, output) if output.finish_reason is not None else None
                    if tokens or completion:
                        yield Delta(tokens, new, completion)
        except OverflowedError as error:
            reported = self.judge(error)
            if isinstance(reported, SpoiledEngineError) and self.executor is executor:
                await self.restart()
            raise reported from error
