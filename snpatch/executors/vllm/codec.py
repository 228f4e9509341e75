"""Conversion of requests to vLLM's arguments and of vLLM's results to checked outputs.

A request names adapters, rankings and constants by integers (request_rows.py). Their fingerprints are its salt in the
prefix cache, so that no request reads keys and values that another patch has made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors import receipts
from snpatch.executors.base import Logprobs, Output, Request
from snpatch.executors.receipts import WorkerReceipt
from snpatch.executors.request_rows import build_request_row, stream_models
from snpatch.executors.vllm.engine_settings import KEY, SAME_WEIGHTS
from snpatch.executors.vllm.rpc import unpack
from snpatch.executors.vllm.slots import SlotLease
from snpatch.models.geometry import Geometry
from snpatch.op.plan import RequestRow
from snpatch.op.reference import SUMS
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.utils.hashing import REQUEST_DIGITS, hash_json


@dataclass(frozen=True, eq=False)
class RequestTag:
    """Data of a request that vLLM passes on to the workers.

    ticket: id of its record in the workers. salt: of its keys and values in the prefix cache, None for a plain request.
    extra_args: of its SamplingParams.
    """

    ticket: int
    salt: str | None
    extra_args: dict


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """Arguments of vLLM's `generate` for a request. more: further keyword arguments."""

    name: str
    tag: RequestTag
    prompt: Mapping[str, Any]
    params: Any
    more: dict = field(default_factory=dict)


class RequestCodec:
    """Converter of one engine. max_interventions: of a patch; has_secondary: the engine has secondary weights."""

    def __init__(self, tokenizer, geometry: Geometry, max_interventions: int, has_secondary: bool) -> None:
        self._tokenizer, self._geometry = tokenizer, geometry
        self._max_interventions, self._has_secondary = max_interventions, has_secondary
        self._tickets = count(1)

    def tag(self, request: Request, lease: SlotLease) -> RequestTag:
        """Build the tag of a request whose slots are leased."""
        # With secondary weights each stream has its own weights, and the recipient runs in the stream of its weights.
        recipient_stream = request.recipient.weights.index if self._has_secondary else 0
        swaps_donor = self._has_secondary and has_same_weights(request)
        ticket, salt = next(self._tickets), cache_salt(request, recipient_stream, swaps_donor)
        columns = build_request_row(request, lease.slots, self._max_interventions, recipient_stream)
        extra_args: dict[str, Any] = {KEY: RequestRow(ticket, columns).pack()}
        if swaps_donor:
            extra_args[SAME_WEIGHTS] = True
        return RequestTag(ticket, salt, extra_args)

    def encode(self, request: Request, lease: SlotLease, streaming: bool = False) -> EngineRequest:
        """Return the arguments of vLLM's `generate` for a request."""
        from vllm.inputs import tokens_input

        tag = self.tag(request, lease)
        return EngineRequest(
            f"snpatch-{tag.ticket}",
            tag,
            tokens_input(list(request.prompt_ids), cache_salt=tag.salt),
            _sampling_params(request, tag.extra_args, streaming),
        )

    def decode(self, request: Request, result) -> Output:
        """Return the output of vLLM's result so far, without receipt and captures; see `confirm`."""
        return _decode(request, result, self._tokenizer)

    def confirm(self, request: Request, output: Output, shards: Sequence[list[dict]]) -> None:
        """Add receipt and captures from each worker's records to an output; see receipts.confirm."""
        if any(len(records) != 1 for records in shards):
            raise ReceiptError(f"a request has {[len(records) for records in shards]} records, expected one per worker")
        receipts.confirm(request, output, [_record(records[0]) for records in shards], self._geometry)

    def gather_statistics(self, shards: Sequence[tuple[int, int]], answers: list[list]) -> list[Statistics]:
        """Join the workers' answers to snpatch_statistics into statistics of all neurons.

        shards: (first neuron, number of neurons) of each worker.
        """
        parts = [[unpack(packed) for packed in answer] for answer in answers]
        counts = parts[0][1]
        sums = torch.zeros(len(counts), self._geometry.n_layers, SUMS, self._geometry.n_neurons, dtype=torch.float64)
        for (first, n), (part, worker_counts) in zip(shards, parts, strict=True):
            sums[..., first : first + n] = part
            if not torch.equal(worker_counts, counts):
                raise ReceiptError(
                    f"the workers counted different tokens: {worker_counts.tolist()} and {counts.tolist()}"
                )
        return [Statistics(s, c) for s, c in zip(sums, counts, strict=True)]


def has_same_weights(request: Request) -> bool:
    """Return whether recipient and donor are on the same set of weights."""
    return request.donor is not None and request.donor.weights.index == request.recipient.weights.index


def cache_salt(request: Request, recipient_stream: int = 0, swaps_donor: bool = False) -> str | None:
    """Return the hash of everything but tokens that keys and values depend on; None for a plain request.

    swaps_donor: the donor's rows go through the weights of the recipient's stream.
    """
    models = stream_models(request, recipient_stream)
    if not request.overwrites:
        is_plain = all(model.is_unscaled for model in models) and not swaps_donor
        if is_plain:
            return None
        content = [*(model.scales.fingerprint for model in models), swaps_donor and recipient_stream]
        return hash_json(content, REQUEST_DIGITS)
    contents = [overwrite.content for overwrite in request.overwrites]
    fingerprints = [model.scales.fingerprint for model in models]
    return hash_json([*fingerprints, recipient_stream, swaps_donor, contents], REQUEST_DIGITS)


def _record(data: dict) -> WorkerReceipt:
    return WorkerReceipt(**{**data, "captured": None if data["captured"] is None else unpack(data["captured"])})


def _sampling_params(request: Request, extra_args: dict, streaming: bool):
    """Return vLLM's SamplingParams. A request without sampling still samples one token, which is dropped."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    common = {
        "extra_args": extra_args,
        "output_kind": RequestOutputKind.CUMULATIVE if streaming else RequestOutputKind.FINAL_ONLY,
        "prompt_logprobs": 1 if request.prompt_logprobs else None,  # of the given token and of the most likely one
        # Positions in the prefix cache are not run, so nothing could be observed there.
        "skip_reading_prefix_cache": bool(
            (request.observe and request.observe.start < len(request.prompt_ids))
            or request.capture
            or request.prompt_logprobs
        ),
    }
    sampling = request.sampling
    if sampling is None:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **common)
    arguments: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": None if sampling.ignore_eos else sorted(request.recipient.weights.eos_ids),
        "ignore_eos": sampling.ignore_eos,
        "seed": sampling.seed,
        "logprobs": 0 if sampling.logprobs else None,
        "detokenize": bool(sampling.stop or sampling.vllm.get("bad_words")),
        **common,
    }
    reserved = {*arguments, "n"} & sampling.vllm.keys()
    if reserved:
        raise SnpatchError(f"sampling: {', '.join(sorted(reserved))} cannot be set through vllm=")
    try:
        return SamplingParams(**{**arguments, **sampling.vllm})
    except (TypeError, ValueError, VLLMValidationError) as error:
        raise SnpatchError(f"sampling: vLLM does not take {dict(sampling.vllm)}: {error}") from error


def _decode(request: Request, result, tokenizer) -> Output:
    output = Output()
    if request.prompt_logprobs:
        positions = zip(result.prompt_logprobs[1:], request.prompt_ids[1:], strict=True)
        pairs = [(at[token].logprob, max(other.logprob for other in at.values())) for at, token in positions]
        values, best = torch.tensor(pairs, dtype=torch.float32).view(-1, 2).unbind(1)
        output.prompt_logprobs = Logprobs(values, values >= best)
    if request.sampling is None:
        return output
    completion = result.outputs[0]
    output.token_ids = list(completion.token_ids)
    output.finish_reason = completion.finish_reason
    if completion.finish_reason == "stop":
        is_string = isinstance(completion.stop_reason, str)
        output.finish_reason = "stop" if is_string else "eos"
        output.stop_reason = completion.stop_reason if is_string else None
    # vLLM's own text depends on the prompt's last tokens. The stop string is cut off at its last occurrence.
    output.text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
    if output.stop_reason is not None:
        end = max(output.text.rfind(output.stop_reason), output.text.rfind(output.stop_reason.lstrip()))
        output.text = output.text[: end if end >= 0 else None]
    if request.sampling.logprobs:
        output.logprobs = [at[token].logprob for at, token in zip(completion.logprobs, output.token_ids, strict=True)]
    return output
