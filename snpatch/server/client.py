"""PatchedClient: vLLM's engine client, as its handlers see it, that patches what they ask it to generate.

Why composition around vLLM's own client and not a server of our own: every endpoint of vLLM goes through `generate`,
so chats, tools, structured answers and streams stay vLLM's, and so does their next version.
"""

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from vllm.engine.protocol import EngineClient
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from snpatch.errors import OverflowedError, ReceiptError, SnpatchError
from snpatch.executors.base import Output, Request
from snpatch.executors.request_rows import collect_resources
from snpatch.executors.vllm.codec import EngineRequest
from snpatch.executors.vllm.settings import KEY
from snpatch.executors.vllm.slots import SlotLease
from snpatch.sampling import SEEDS, Sampling
from snpatch.server import metrics
from snpatch.server.patch_request import CURRENT_PATCH, PatchContext, Receipt
from snpatch.server.state import ServerState

CONSTRAINTS = ("json", "regex", "choice", "grammar", "structural_tag")  # of vLLM's StructuredOutputsParams
UNFINISHED = ("abort", "error")  # finish reasons of a text whose receipt cannot be confirmed


@dataclass(frozen=True, eq=False)
class _Text:
    """One text to write. place: of its receipt; more: further arguments of vLLM's `generate`."""

    ask: PatchContext
    place: int
    request: Request
    prompt: dict
    params: SamplingParams
    name: str
    more: dict

    def one_of(self, i: int) -> "_Text":
        """The i-th of the n texts that it stands for, as vLLM would make it."""
        params = copy.copy(self.params)
        params.n = 1
        if params.seed is not None:
            params.seed += i
        return replace(self, place=self.place + i, params=params, name=f"{self.name}-{i}")


class PatchedClient:
    """What it does not say itself is vLLM's own client's. To be used once the engine has started.

    What a request asks for comes with its context (asks.ASK), which handlers.py sets; requests of any other way into
    vLLM are refused, so that no client reaches the workers with integers of ours.
    """

    def __init__(self, serving: ServerState) -> None:
        self.serving, self.engine = serving, serving.engine

    def __getattr__(self, name: str):
        return getattr(self.engine.executor.engine, name)

    def generate(
        self, prompt, sampling_params: SamplingParams, request_id: str, *, lora_request=None, **more
    ) -> AsyncIterator[RequestOutput]:
        """vLLM's `generate`, patched. Bad input is a SnpatchError here and now. lora_request: but a name, done with."""
        ask = CURRENT_PATCH.get()
        if ask is None:
            raise SnpatchError("this way of generating is not served by snpatch")
        if any(name.startswith(KEY) for name in sampling_params.extra_args or ()):
            raise SnpatchError(f"{KEY}: wanted an object, or its JSON in vllm_xargs", field=KEY)
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise SnpatchError("prompts are texts or token ids")
        if ask.guard is not None and sampling_params.prompt_logprobs is not None:
            raise SnpatchError("a guard does not go with log-probabilities of the prompt", field="guard")
        self._check_constraint(sampling_params)
        n, seed = sampling_params.n, sampling_params.seed
        if seed is not None and seed + n > SEEDS:
            raise SnpatchError(f"seed: those of {n} texts go past 2^63-1", field="seed")
        requests, ids = self.engine.requests, list(prompt["prompt_token_ids"])
        requests.check_room(ids, 1, "the prompt")
        requests.check_ids(ids, "the prompt")
        requests.tell_double_bos(ids, requests.templates[0].tokenizer, "a prompt")
        params, room = copy.copy(sampling_params), self.engine.geometry.context - len(ids)
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        self._check_logprobs(ask, params, len(ids))
        params.update_from_generation_config({"eos_token_id": sorted(requests.model(ask.recipient).weights.eos_ids)})
        request = requests.patched(ids, ask.patch, sampling=Sampling(max_tokens=params.max_tokens))
        if not collect_resources(request).is_empty:
            self.serving.check_waiting(len(ask.receipts) + n)
        text = _Text(ask, len(ask.receipts), request, prompt, params, request_id, more)
        ask.receipts += [Receipt()] * n
        if ask.guard is not None:
            return self._guarded(text)
        return self._results(text)

    def shutdown(self, timeout: float | None = None) -> None:
        """What vLLM's server calls in a thread on SIGTERM, before it stops listening: lets what runs end. The engine is
        closed by whoever started it."""
        self.serving.inflight.close(timeout)

    def _check_logprobs(self, ask: PatchContext, params: SamplingParams, prompt_length: int) -> None:
        """Raise for more log-probabilities than an answer can be made of while others are served."""
        is_whole, limit = params.output_kind != RequestOutputKind.DELTA, self.serving.config.max_logprob_values
        ask.logprobs += params.n * (
            prompt_length * self._num_logprobs(params.prompt_logprobs)
            + is_whole * params.max_tokens * self._num_logprobs(params.logprobs)
        )
        if ask.logprobs > limit:
            raise SnpatchError(
                f"logprobs: expected at most {limit} values in an answer (--max-logprob-values), got {ask.logprobs} or "
                "more. Set max_tokens, stream, or send several requests.",
                field="logprobs",
            )

    def _num_logprobs(self, asked: int | None) -> int:
        """Return the values of a position: its own token's and the likeliest ones'; -1 asks for the vocabulary's."""
        if asked is None:
            return 0
        return 1 + (asked if asked >= 0 else self.engine.geometry.vocab_size)

    def _check_constraint(self, params: SamplingParams) -> None:
        """Raise for a grammar whose compilation would hold up the server and the engine."""
        limit, given = self.serving.config.max_grammar_chars, params.structured_outputs
        for name in CONSTRAINTS if given is not None else ():
            grammar = getattr(given, name, None)
            letters = len(grammar if isinstance(grammar, str) else json.dumps(grammar))
            if letters > limit:
                raise SnpatchError(
                    f"structured output: expected at most {limit} letters of {name} (--max-grammar-chars), got "
                    f"{letters}. Simplify it.",
                    field="structured_outputs",
                )

    def _results(self, text: _Text) -> AsyncIterator[RequestOutput]:
        return self._one(text) if text.params.n == 1 else self._several(text)

    async def _guarded(self, text: _Text) -> AsyncIterator[RequestOutput]:
        """The guard reads the prompt first, and may refuse it."""
        ask, n = text.ask, text.params.n
        harm = await self._harm(text)
        refused = harm > ask.guard.threshold
        ask.receipts[text.place : text.place + n] = [Receipt(verified=refused, harm=harm, refused=refused)] * n
        if refused:
            metrics.REFUSED.inc()
            yield _refusal(text)
            return
        async with aclosing(self._results(text)) as results:
            async for result in results:
                yield result

    async def _harm(self, text: _Text) -> float:
        guard = text.ask.guard
        prompts = [text.request.prompt_ids]
        (request,) = self.engine.requests.capturing(prompts, guard.model, guard.ranking, guard.k, "prompt_last")
        output = await self.engine.executor.output(request)
        return float(guard.probability(output.captured)[0])

    async def _several(self, text: _Text) -> AsyncIterator[RequestOutput]:
        """The n texts of a prompt, each with a receipt of its own, as vLLM gives them: as they grow, or all at once."""
        n, is_final = text.params.n, text.params.output_kind == RequestOutputKind.FINAL_ONLY
        news: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()

        async def tell(i: int) -> None:
            try:
                async with aclosing(self._one(text.one_of(i))) as results:
                    async for result in results:
                        news.put_nowait((i, result))
                news.put_nowait((i, None))
            except Exception as error:  # noqa: BLE001 (raised below)
                news.put_nowait((i, error))

        tasks, left, done, whole = [asyncio.create_task(tell(i)) for i in range(n)], n, 0, []
        try:
            while left:
                i, result = await news.get()
                if result is None:
                    left -= 1
                elif isinstance(result, Exception):
                    raise result
                else:
                    result.request_id, result.outputs[0].index = text.name, i
                    whole += result.outputs
                    done += result.finished
                    result.finished = done == n
                    if not is_final:
                        yield result
                    elif result.finished:
                        result.outputs = sorted(whole, key=lambda output: output.index)
                        yield result
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, text: _Text) -> AsyncIterator[RequestOutput]:
        """vLLM's results of one text; the last one comes when its receipt is confirmed."""
        params, serving = text.params, self.serving
        ids, is_delta = [], params.output_kind == RequestOutputKind.DELTA
        is_waiting = True

        def send(lease: SlotLease) -> EngineRequest:
            nonlocal is_waiting
            is_waiting = False
            serving.waiting -= 1
            return self._sent(text, lease)

        serving.waiting += 1
        try:
            async with serving.beginning:  # one text of all requests in a turn of the event loop
                await asyncio.sleep(0)
            async with aclosing(self.engine.executor.results(text.request, send)) as results:
                async for result, records in results:
                    output = result.outputs[0]
                    ids = ids if is_delta else []
                    ids += output.token_ids
                    if output.finish_reason == "error" and params.structured_outputs is not None:
                        raise SnpatchError(
                            "structured output: expected a regex, grammar, choice or schema that vLLM can compile and "
                            "that the model's vocabulary can write. Change it.",
                            field="structured_outputs",
                        )
                    if result.finished:
                        self._confirm(text, ids, output.finish_reason, records)
                    yield result
        finally:
            serving.waiting -= is_waiting

    def _sent(self, text: _Text, lease: SlotLease) -> EngineRequest:
        tag = self.engine.executor.codec.tag(text.request, lease)
        prompt, params = dict(text.prompt), text.params
        if tag.extra_args:
            params.extra_args = {**(params.extra_args or {}), **tag.extra_args}
        if prompt.get("cache_salt") is not None:  # a client's own may not be that of a patch
            prompt["cache_salt"] = f"{prompt['cache_salt']}+{tag.salt}"
        elif tag.salt is not None:
            prompt["cache_salt"] = tag.salt
        return EngineRequest(text.name, tag, prompt, params, text.more)

    def _confirm(self, text: _Text, ids: list[int], reason: str | None, records: list[list[dict]] | None) -> None:
        """Keep the receipt of a finished text; one that differs from the patch is a ReceiptError."""
        request, receipts = text.request, text.ask.receipts
        found = Output(token_ids=ids)
        if reason in UNFINISHED:
            receipts[text.place] = replace(receipts[text.place], verified=False)
            return
        if records is not None:
            try:
                self.engine.executor.codec.confirm(request, found, records)
            except OverflowedError as error:
                metrics.OVERFLOWED.inc()
                raise self.serving.judge(error) from error
            except ReceiptError:
                metrics.RECEIPTS_FAILED.inc()
                raise
            if request.overwrites:
                metrics.PATCHED.inc()
                metrics.OVERWRITES.inc(found.overwrites)
        fed = len(request.prompt_ids) + max(len(ids) - 1, 0)
        receipts[text.place] = replace(
            receipts[text.place], overwrites=found.overwrites, positions=_patched(request, fed), verified=True
        )


EngineClient.register(PatchedClient)


def _patched(request: Request, fed: int) -> int:
    """How many of a text's first `fed` positions any clause covers."""
    covered, end = 0, 0
    for start, stop in sorted((one.start, min(one.stop, fed)) for one in request.overwrites):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _refusal(text: _Text) -> RequestOutput:
    """What a guard has vLLM answer. finish_reason: OpenAI's own value for what a filter keeps back."""
    logprobs = None if text.params.logprobs is None else []
    choice = CompletionOutput(
        index=0,
        text=text.ask.guard.refusal,
        token_ids=[],
        cumulative_logprob=None,
        logprobs=logprobs,
        finish_reason="content_filter",
        stop_reason="guard",
    )
    return RequestOutput(
        request_id=text.name,
        prompt=text.prompt.get("prompt"),
        prompt_token_ids=list(text.request.prompt_ids),
        prompt_logprobs=None,
        outputs=[replace(choice, index=i) for i in range(text.params.n)],
        finished=True,
    )
