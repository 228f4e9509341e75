"""PatchedClient: vLLM's engine client with a `generate` that applies the patch of the running HTTP request.

Why composition around vLLM's client and not a server of our own: every endpoint of vLLM calls `generate`, so chats,
tools, structured output and streams stay vLLM's, and so will those of its next version.
"""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from vllm.engine.protocol import EngineClient
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from snpatch.errors import OverflowedError, ReceiptError, SnpatchError
from snpatch.executors.base import Output, Request
from snpatch.executors.request_rows import collect_resources
from snpatch.executors.vllm import versions
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.engine_settings import KEY
from snpatch.executors.vllm.slots import SlotLease
from snpatch.guard.guard import Guard
from snpatch.sampling import SEED_LIMIT, Sampling
from snpatch.server import metrics
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext, Receipt
from snpatch.server.state import ServerState
from snpatch.utils.optional import require

CONSTRAINTS = ("json", "regex", "choice", "grammar", "structural_tag")  # of vLLM's StructuredOutputsParams
GRAMMARS_SINCE = (0, 28)  # of vLLM's versions that were run, the first whose engine survives an invalid grammar
UNVERIFIED_REASONS = ("abort", "error")  # finish reasons of completions whose receipt cannot be checked


@dataclass(frozen=True, eq=False)
class _Generation:
    """Completions of one prompt to generate.

    Attributes:
        index: Index of the first one's receipt in `context.receipts`.
        params: vLLM's parameters; `n` is the number of completions.
        options: Further arguments of vLLM's `generate`.
    """

    context: PatchContext
    index: int
    request: Request
    prompt: dict
    params: SamplingParams
    request_id: str
    options: dict

    def single(self, i: int) -> "_Generation":
        """Return the generation of the i-th completion alone, with the seed that vLLM would give it."""
        params = copy.copy(self.params)
        params.n = 1
        if params.seed is not None:
            params.seed += i
        return replace(self, index=self.index + i, params=params, request_id=f"{self.request_id}-{i}")


class PatchedClient:
    """vLLM's engine client that patches what its handlers ask it to generate. The engine must have started.

    The patch comes from the request's context (CURRENT_PATCH), which install.py sets. Calls outside a wrapped handler
    are refused, so that no client sends the workers slot numbers of its own.
    """

    def __init__(self, state: ServerState) -> None:
        self.state, self.engine = state, state.engine

    def __getattr__(self, name: str):
        return getattr(self.engine.executor.engine, name)

    def generate(
        self, prompt, sampling_params: SamplingParams, request_id: str, *, lora_request=None, **options
    ) -> AsyncGenerator[RequestOutput, None]:
        """Check a request now and return vLLM's results, patched.

        lora_request: vLLM's form of a patch's name, unused.

        Raises:
            SnpatchError: Invalid prompts or parameters.
            ServerBusyError: Too many completions wait for slots.
        """
        context = CURRENT_PATCH.get()
        if context is None:
            raise SnpatchError("route: not served by snpatch. GET / lists the routes.")
        if any(name.startswith(KEY) for name in sampling_params.extra_args or ()):
            raise SnpatchError(f"{KEY}: expected an object, or its JSON in vllm_xargs, got other arguments", field=KEY)
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise SnpatchError("prompt: expected a string or token ids, got another kind of prompt")
        if context.guard is not None and sampling_params.prompt_logprobs is not None:
            raise SnpatchError("guard: cannot be combined with prompt_logprobs. Leave out one of them.", field="guard")
        self._check_constraint(sampling_params)
        n, seed = sampling_params.n, sampling_params.seed
        if seed is not None and seed + n > SEED_LIMIT:
            raise SnpatchError(f"seed: expected at most 2^63 - {n} for {n} completions, got {seed}", field="seed")
        requests, prompt_ids = self.engine.requests, list(prompt["prompt_token_ids"])
        requests.check_room(prompt_ids, 1, "the prompt")
        requests.check_ids(prompt_ids, "the prompt")
        requests.note_double_bos(prompt_ids, requests.templates[0].tokenizer, "a prompt")
        params, max_new_tokens = copy.copy(sampling_params), self.engine.geometry.context - len(prompt_ids)
        params.max_tokens = max_new_tokens if params.max_tokens is None else min(params.max_tokens, max_new_tokens)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        self._check_logprobs(context, params, len(prompt_ids))
        eos_ids = sorted(requests.model(context.recipient).weights.eos_ids)
        params.update_from_generation_config({"eos_token_id": eos_ids})
        request = requests.patched(prompt_ids, context.patch, sampling=Sampling(max_tokens=params.max_tokens))
        if not collect_resources(request).is_empty:
            self.state.check_queue(len(context.receipts) + n)
        generation = _Generation(context, len(context.receipts), request, prompt, params, request_id, options)
        context.receipts += [Receipt()] * n
        if context.guard is not None:
            return self._generate_guarded(generation, context.guard)
        return self._generate(generation)

    def shutdown(self, timeout: float | None = None) -> None:
        """Wait for running requests.

        vLLM's server calls this in a thread on SIGTERM, before it stops listening. It does not close the engine, which
        launcher.py does.
        """
        self.state.inflight.close(timeout)

    def _check_logprobs(self, context: PatchContext, params: SamplingParams, prompt_length: int) -> None:
        """Raise for more log-probabilities than can be serialized without blocking other requests."""
        assert params.max_tokens is not None  # set from the context's length
        is_whole, limit = params.output_kind != RequestOutputKind.DELTA, self.state.config.max_logprob_values
        context.num_logprobs += params.n * (
            prompt_length * self._num_logprobs(params.prompt_logprobs)
            + is_whole * params.max_tokens * self._num_logprobs(params.logprobs)
        )
        if context.num_logprobs > limit:
            raise SnpatchError(
                f"logprobs: expected at most {limit} values per response (--max-logprob-values), got "
                f"{context.num_logprobs} or more. Set max_tokens, stream, or send several requests.",
                field="logprobs",
            )

    def _num_logprobs(self, requested: int | None) -> int:
        """Return the values per position: its token and the most likely ones (-1: the whole vocabulary)."""
        if requested is None:
            return 0
        return 1 + (requested if requested >= 0 else self.engine.geometry.vocab_size)

    def _check_constraint(self, params: SamplingParams) -> None:
        """Raise for a grammar whose compilation would block the server and the engine, or end the engine."""
        limit, constraints = self.state.config.max_grammar_chars, params.structured_outputs
        for name in CONSTRAINTS if constraints is not None else ():
            grammar = getattr(constraints, name, None)
            length = len(grammar if isinstance(grammar, str) else json.dumps(grammar))
            if length > limit:
                raise SnpatchError(
                    f"structured output: expected at most {limit} characters of {name} (--max-grammar-chars), got "
                    f"{length}. Simplify it.",
                    field="structured_outputs",
                )
        if constraints is not None and (versions.minor() or GRAMMARS_SINCE) < GRAMMARS_SINCE:
            raise SnpatchError(
                f"structured output: expected vLLM {'.'.join(map(str, GRAMMARS_SINCE))} or newer, got "
                f"{versions.installed()}, whose engine ends at a grammar that it cannot compile. Update vLLM.",
                field="structured_outputs",
            )

    def _generate(self, generation: _Generation) -> AsyncGenerator[RequestOutput, None]:
        return self._generate_one(generation) if generation.params.n == 1 else self._generate_several(generation)

    async def _generate_guarded(self, generation: _Generation, guard: Guard) -> AsyncGenerator[RequestOutput, None]:
        """Let the guard read the prompt first; it may refuse it."""
        context, start, n = generation.context, generation.index, generation.params.n
        harm = await self._predict_harm(generation, guard)
        is_refused = harm > guard.threshold
        receipt = Receipt(verified=is_refused, harm=harm, refused=is_refused)
        context.receipts[start : start + n] = [receipt] * n
        if is_refused:
            metrics.REFUSED.inc()
            yield _refusal(generation, guard)
            return
        async with aclosing(self._generate(generation)) as results:
            async for result in results:
                yield result

    async def _predict_harm(self, generation: _Generation, guard: Guard) -> float:
        prompts = [generation.request.prompt_ids]
        (request,) = self.engine.requests.capturing(prompts, guard.model, guard.ranking, guard.k, "last_prompt_token")
        output = await self.engine.executor.output(request)
        return float(guard.probability(require(output.captured))[0])

    async def _generate_several(self, generation: _Generation) -> AsyncGenerator[RequestOutput, None]:
        """Generate n completions, each with its receipt.

        Yield them as vLLM does: as they grow or all at once.
        """
        n, is_final_only = generation.params.n, generation.params.output_kind == RequestOutputKind.FINAL_ONLY
        queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()

        async def generate(i: int) -> None:
            try:
                async with aclosing(self._generate_one(generation.single(i))) as results:
                    async for result in results:
                        queue.put_nowait((i, result))
                queue.put_nowait((i, None))
            except Exception as error:  # noqa: BLE001 (raised below)
                queue.put_nowait((i, error))

        tasks = [asyncio.create_task(generate(i)) for i in range(n)]
        num_running, num_finished, outputs = n, 0, []
        try:
            while num_running:
                i, result = await queue.get()
                if result is None:
                    num_running -= 1
                elif isinstance(result, Exception):
                    raise result
                else:
                    result.request_id, result.outputs[0].index = generation.request_id, i
                    outputs += result.outputs
                    num_finished += result.finished
                    result.finished = num_finished == n
                    if not is_final_only:
                        yield result
                    elif result.finished:
                        result.outputs = sorted(outputs, key=lambda output: output.index)
                        yield result
        finally:
            for task in tasks:
                task.cancel()

    async def _generate_one(self, generation: _Generation) -> AsyncGenerator[RequestOutput, None]:
        """Yield vLLM's results of one completion; the last one after its receipt was checked."""
        params, state = generation.params, self.state
        token_ids, is_delta = [], params.output_kind == RequestOutputKind.DELTA
        is_waiting = True

        def build_request(lease: SlotLease) -> EngineRequest:
            nonlocal is_waiting
            is_waiting = False
            state.num_waiting -= 1
            return self._engine_request(generation, lease)

        state.num_waiting += 1
        try:
            await state.starts.wait()
            async with aclosing(self.engine.executor.results(generation.request, build_request)) as results:
                async for result, records in results:
                    output = result.outputs[0]
                    token_ids = token_ids if is_delta else []
                    token_ids += output.token_ids
                    if output.finish_reason == "error" and params.structured_outputs is not None:
                        raise SnpatchError(
                            "structured output: expected a regex, grammar, choice or schema that vLLM can compile and "
                            "that the model's vocabulary can write. Change it.",
                            field="structured_outputs",
                        )
                    if result.finished:
                        self._check_receipt(generation, token_ids, output.finish_reason, records)
                    yield result
        finally:
            state.num_waiting -= is_waiting

    def _engine_request(self, generation: _Generation, lease: SlotLease) -> EngineRequest:
        tag = self.engine.executor.codec.tag(generation.request, lease)
        prompt, params = dict(generation.prompt), generation.params
        if tag.extra_args:
            params.extra_args = {**(params.extra_args or {}), **tag.extra_args}
        if prompt.get("cache_salt") is not None:  # a client's salt must not equal a patch's
            prompt["cache_salt"] = f"{prompt['cache_salt']}+{tag.salt}"
        elif tag.salt is not None:
            prompt["cache_salt"] = tag.salt
        return EngineRequest(generation.request_id, tag, prompt, params, generation.options)

    def _check_receipt(
        self, generation: _Generation, token_ids: list[int], reason: str | None, records: list[list[dict]] | None
    ) -> None:
        """Store the receipt of a finished completion.

        Raises:
            ReceiptError: The device's count differs from what the patch implies.
            OverflowedError: The completion has non-finite values.
        """
        request, receipts, index = generation.request, generation.context.receipts, generation.index
        output = Output(token_ids=token_ids)
        if reason in UNVERIFIED_REASONS:
            receipts[index] = replace(receipts[index], verified=False)
            return
        if records is not None:
            try:
                self.engine.executor.codec.confirm(request, output, records)
            except OverflowedError as error:
                metrics.OVERFLOWED.inc()
                raise self.state.handle_overflow(error) from error
            except ReceiptError:
                metrics.RECEIPTS_FAILED.inc()
                raise
            if request.overwrites:
                metrics.PATCHED.inc()
                metrics.OVERWRITES.inc(output.overwrites)
        num_computed = len(request.prompt_ids) + max(len(token_ids) - 1, 0)  # the last token is not fed to the model
        receipts[index] = replace(
            receipts[index],
            overwrites=output.overwrites,
            positions=_num_patched(request, num_computed),
            verified=True,
        )


EngineClient.register(PatchedClient)


def _num_patched(request: Request, num_positions: int) -> int:
    """Count the positions among the first `num_positions` that any intervention covers."""
    covered, end = 0, 0
    ranges = sorted((overwrite.start, min(overwrite.stop, num_positions)) for overwrite in request.overwrites)
    for start, stop in ranges:
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _refusal(generation: _Generation, guard: Guard) -> RequestOutput:
    """Return the guard's refusal as vLLM's result, with OpenAI's finish reason for filtered content."""
    logprobs = None if generation.params.logprobs is None else []
    output = CompletionOutput(
        index=0,
        text=guard.refusal,
        token_ids=[],
        cumulative_logprob=None,
        logprobs=logprobs,
        finish_reason="content_filter",
        stop_reason="guard",
    )
    return RequestOutput(
        request_id=generation.request_id,
        prompt=generation.prompt.get("prompt"),
        prompt_token_ids=list(generation.request.prompt_ids),
        prompt_logprobs=None,
        outputs=[replace(output, index=i) for i in range(generation.params.n)],
        finished=True,
    )
