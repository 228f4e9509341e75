"""How a request travels to vLLM and what it gives comes back; everything that comes back is checked.

What it names has become integers (rows.py); what names it by content is the salt of the prefix cache, so that no
request reads keys and values that another patch has made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors import receipts
from snpatch.executors.base import Geometry, Logprobs, Output, Request
from snpatch.executors.receipts import WorkerReceipt
from snpatch.executors.request_rows import build_request_row, stream_models
from snpatch.executors.vllm.rpc import unpack
from snpatch.executors.vllm.settings import KEY, SAME_WEIGHTS
from snpatch.executors.vllm.slots import SlotLease
from snpatch.op.plan import RequestRow
from snpatch.op.reference import SUMS
from snpatch.patching.patch import digest_of
from snpatch.ranking.statistics import Statistics


@dataclass(frozen=True, eq=False)
class RequestTag:
    """What of a request vLLM carries to the workers.

    ticket: what its record goes by. salt: of its keys and values in the prefix cache; None for a plain request.
    extra_args: of its SamplingParams.
    """

    ticket: int
    salt: str | None
    extra_args: dict


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """A request as vLLM gets it. more: further arguments of vLLM's `generate`."""

    name: str
    tag: RequestTag
    prompt: dict
    params: object
    more: dict = field(default_factory=dict)


class RequestCodec:
    """The translation for one engine."""

    def __init__(self, tokenizer, geometry: Geometry, clauses: int, has_secondary: bool) -> None:
        self._tokenizer, self._geometry = tokenizer, geometry
        self._clauses, self._has_second = clauses, has_secondary
        self._tickets = count(1)

    def tag(self, request: Request, lease: SlotLease) -> RequestTag:
        """What goes with the request, once what it names has its rows."""
        # With a second set of weights each stream has its own, and the recipient speaks on its own weights' stream.
        speaker = request.recipient.weights.index if self._has_second else 0
        is_flipped = self._has_second and has_same_weights(request)
        ticket, salt = next(self._tickets), cache_salt(request, speaker, is_flipped)
        columns = build_request_row(request, lease.places, self._clauses, speaker)
        extra_args = {KEY: RequestRow(ticket, columns).pack()}
        if is_flipped:
            extra_args[SAME_WEIGHTS] = True
        return RequestTag(ticket, salt, extra_args)

    def encode(self, request: Request, lease: SlotLease, streaming: bool = False) -> EngineRequest:
        """The request as vLLM gets it."""
        from vllm.inputs import tokens_input

        tag = self.tag(request, lease)
        return EngineRequest(
            f"snpatch-{tag.ticket}",
            tag,
            tokens_input(list(request.prompt_ids), cache_salt=tag.salt),
            _sampling_params(request, tag.extra_args, streaming),
        )

    def decode(self, request: Request, result) -> Output:
        """What vLLM's result (so far) says; receipts and captures are not yet in it."""
        return _output(request, result, self._tokenizer)

    def confirm(self, request: Request, output: Output, shards: Sequence[list[dict]]) -> None:
        """Complete an output with the workers' records of it; see receipts.confirm."""
        if any(len(records) != 1 for records in shards):
            raise ReceiptError(f"a request has {[len(records) for records in shards]} records, not one a worker")
        receipts.confirm(request, output, [_record(records[0]) for records in shards], self._geometry)

    def gather_statistics(self, shards: Sequence[tuple[int, int]], answers: list[list]) -> list[Statistics]:
        """Statistics of all workers, by global neuron, from their answers to snpatch_statistics.

        shards: (first neuron, neurons) of each worker.
        """
        parts = [[unpack(packed) for packed in answer] for answer in answers]
        counts = parts[0][1]
        sums = torch.zeros(len(counts), self._geometry.n_layers, SUMS, self._geometry.n_neurons, dtype=torch.float64)
        for (first, n), (part, own) in zip(shards, parts, strict=True):
            sums[..., first : first + n] = part
            if not torch.equal(own, counts):
                raise ReceiptError(f"the workers counted different tokens: {own.tolist()} and {counts.tolist()}")
        return [Statistics(s, c) for s, c in zip(sums, counts, strict=True)]


def has_same_weights(request: Request) -> bool:
    """Whether its donor is on the recipient's set of weights."""
    return request.donor is not None and request.donor.weights.index == request.recipient.weights.index


def cache_salt(request: Request, speaker: int = 0, is_flipped: bool = False) -> str | None:
    """Names everything that a request's keys and values hang on besides its tokens; None for a plain request.

    is_flipped: the donor's rows go through the set of weights that is not its stream's.
    """
    models = stream_models(request, speaker)
    if not request.overwrites:
        is_plain = all(m.is_unscaled for m in models) and not is_flipped
        return None if is_plain else digest_of([*(m.scales.fingerprint for m in models), is_flipped and speaker])
    clauses = [overwrite.content for overwrite in request.overwrites]
    return digest_of([*(m.scales.fingerprint for m in models), speaker, is_flipped, clauses])


def _record(data: dict) -> WorkerReceipt:
    return WorkerReceipt(**{**data, "captured": None if data["captured"] is None else unpack(data["captured"])})


def _sampling_params(request: Request, extra_args: dict, streaming: bool):
    """vLLM's SamplingParams for a request. One that writes nothing still samples a token, which is dropped."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    common = {
        "extra_args": extra_args,
        "output_kind": RequestOutputKind.CUMULATIVE if streaming else RequestOutputKind.FINAL_ONLY,
        "prompt_logprobs": 1 if request.prompt_logprobs else None,  # the likeliest token's beside the given one's
        # Positions that come from the cache are not run, so nothing of them could be observed.
        "skip_reading_prefix_cache": bool(
            (request.observe and request.observe.start < len(request.prompt_ids))
            or request.capture
            or request.prompt_logprobs
        ),
    }
    s = request.sampling
    if s is None:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **common)
    own = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "max_tokens": s.max_tokens,
        "min_tokens": s.min_tokens,
        "stop": list(s.stop) or None,
        "stop_token_ids": None if s.ignore_eos else sorted(request.recipient.weights.eos_ids),
        "ignore_eos": s.ignore_eos,
        "seed": s.seed,
        "logprobs": 0 if s.logprobs else None,
        "detokenize": bool(s.stop or s.vllm.get("bad_words")),
        **common,
    }
    taken = {*own, "n"} & s.vllm.keys()
    if taken:
        raise SnpatchError(f"sampling: {', '.join(sorted(taken))} cannot be set through vllm=")
    try:
        return SamplingParams(**own, **s.vllm)
    except (TypeError, ValueError, VLLMValidationError) as error:
        raise SnpatchError(f"sampling: vLLM does not take {dict(s.vllm)}: {error}") from error


def _output(request: Request, result, tokenizer) -> Output:
    output = Output()
    if request.prompt_logprobs:
        given = zip(result.prompt_logprobs[1:], request.prompt_ids[1:], strict=True)
        pairs = [(at[token].logprob, max(other.logprob for other in at.values())) for at, token in given]
        values, best = torch.tensor(pairs, dtype=torch.float32).view(-1, 2).unbind(1)
        output.prompt_logprobs = Logprobs(values, values >= best)
    if request.sampling is None:
        return output
    written = result.outputs[0]
    output.token_ids = list(written.token_ids)
    output.finish_reason = written.finish_reason
    if written.finish_reason == "stop":
        is_string = isinstance(written.stop_reason, str)
        output.finish_reason = "stop" if is_string else "eos"
        output.stop_reason = written.stop_reason if is_string else None
    # Not vLLM's own text, which hangs on the prompt's last tokens; the stop string that ended it is its last one.
    output.text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
    if output.stop_reason is not None:
        at = max(output.text.rfind(output.stop_reason), output.text.rfind(output.stop_reason.lstrip()))
        output.text = output.text[: at if at >= 0 else None]
    if request.sampling.logprobs:
        output.logprobs = [at[token].logprob for at, token in zip(written.logprobs, output.token_ids, strict=True)]
    return output
