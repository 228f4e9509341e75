"""AsyncEngine: one engine for many concurrent callers, whose completions are streamed. The server uses it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from snpatch.config import EngineConfig
from snpatch.engine.base import BaseEngine
from snpatch.engine.requests import Completion, Prompt
from snpatch.errors import OverflowedError, SnpatchError, SpoiledEngineError, shown
from snpatch.executors.base import Output, Request
from snpatch.patching.patch import Patch, recipient_name
from snpatch.sampling import GREEDY, Sampling

INCOMPLETE_CHARACTER = "\ufffd"  # decoded in place of a character whose last bytes are not generated yet


@dataclass(frozen=True)
class Delta:
    """New part of a completion.

    Attributes:
        token_ids: New token ids.
        text: New text, complete characters only; no stop string will remove it.
        completion: The finished completion, whose receipt is checked, in the last delta; else None.
    """

    token_ids: list[int]
    text: str
    completion: Completion | None = None


class AsyncEngine(BaseEngine):
    """A model and its adapters in vLLM, for many callers of one event loop. Arguments are those of Engine.

    A caller that stops iterating, or is cancelled, ends its own request only. Requests wait, first come first served,
    while all slots for their adapters, rankings or constants are used. If vLLM dies, waiting
    callers get a SnpatchError.

    Example:
        async with AsyncEngine(model, adapters) as engine:
            async for delta in engine.generate("Hello", Patch("sft", "dpo", safety, 20_000)):
                print(delta.text, end="")
    """

    def _build_executor(self, config: EngineConfig):
        if self.backend != "vllm":
            from snpatch.executors.vllm import versions

            hint = versions.missing_hint() if versions.installed() is None else "pass backend='vllm'"
            raise SnpatchError(f"AsyncEngine: expected the vllm backend, got transformers: {hint}, or use Engine")
        from snpatch.executors.vllm.streaming import StreamingExecutor

        return StreamingExecutor(config, self._opened.text_processors)

    async def start(self, log_stats: bool = False) -> None:
        """Start vLLM, which takes about a minute. `async with` starts it.

        Args:
            log_stats: Record vLLM's metrics.

        Raises:
            SnpatchError: vLLM does not start.
        """
        self._log_stats = log_stats
        await self.executor.start(list(self._opened.models.values()), log_stats)

    async def restart(self) -> None:
        """Restart vLLM, for example after an EngineCrashedError. Running requests raise; models are kept."""
        self.executor.close()
        self.executor = self._build_executor(self.config)
        await self.start(self._log_stats)

    def judge(self, error: OverflowedError) -> OverflowedError:
        """Return the error to raise for an overflow: a SpoiledEngineError if the engine must be restarted."""
        return self._spoilage.judge(error)

    def close(self) -> None:
        """Stop vLLM. Running requests raise SnpatchError."""
        self.executor.close()

    async def __aenter__(self) -> "AsyncEngine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, patch: Patch | str = "base", sampling: Sampling = GREEDY
    ) -> AsyncIterator[Delta]:
        """Stream the completion of one prompt.

        Args:
            prompt: A string, a chat, a row or token ids.
            patch: A Patch, or the name of a model to run unpatched.
            sampling: Sampling parameters, with n = 1.

        Yields:
            Deltas; the last has the completion.

        Raises:
            SnpatchError: Invalid arguments, before anything runs.
            ReceiptError: The device overwrote another number of neurons than the patch implies.
        """
        if not isinstance(sampling, Sampling):
            raise SnpatchError(f"sampling: expected a Sampling, got {shown(sampling)}")
        if sampling.n > 1:
            raise SnpatchError(f"sampling: n: expected 1, got {sampling.n}. Call generate once per completion.")
        (patch,) = self.requests.patches(patch, 1)
        ids = self.encode([prompt], recipient_name(patch))
        ((_, request),) = self.requests.writing(ids, patch, sampling)
        return self._deltas(request, sampling.stop)

    async def _deltas(self, request: Request, stop_strings: Sequence[str]) -> AsyncIterator[Delta]:
        num_held_back = max(map(len, stop_strings), default=1) - 1  # may begin a stop string
        yielded, executor = Output(), self.executor
        try:
            async with aclosing(executor.stream(request)) as outputs:
                async for output in outputs:
                    text = output.text
                    if output.finish_reason is None:
                        text = text[: len(text) - num_held_back].rstrip(INCOMPLETE_CHARACTER)
                    new_text = text[len(yielded.text) :]
                    new_ids = output.token_ids[len(yielded.token_ids) :]
                    yielded = Output(output.token_ids, yielded.text + new_text)
                    completion = Completion.of(request, output) if output.finish_reason is not None else None
                    if new_ids or completion:
                        yield Delta(new_ids, new_text, completion)
        except OverflowedError as error:
            reported = self.judge(error)
            if isinstance(reported, SpoiledEngineError) and self.executor is executor:
                await self.restart()
            raise reported from error
