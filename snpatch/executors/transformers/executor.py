"""The transformers executor: runs requests on any machine with one or two sets of weights, in left-padded batches.

Why it is simple rather than fast: it is what the vLLM executor is compared with. What it must do well is to keep
both streams of every request exact, whatever else shares the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig, ModelSource
from snpatch.errors import OverflowedError, SnpatchError, first_line
from snpatch.executors.base import Geometry, Logprobs, Memory, Output, Request
from snpatch.executors.receipts import confirm
from snpatch.executors.transformers.banks import Banks, records_of
from snpatch.executors.transformers.surgery import make_twin
from snpatch.executors.transformers.text import Writer, choose
from snpatch.models.checkpoint import check_finite, load_config
from snpatch.models.compatibility import module_kinds, total_bytes
from snpatch.models.lora import merge_loras
from snpatch.models.model import Model
from snpatch.models.pretrained import load_pretrained
from snpatch.models.text_processing import TextProcessor
from snpatch.op.plan import PlanColumn, fill_plan
from snpatch.op.reference import count_nonfinite, has_overflowed

BATCH_SIZE = 32  # sequences of a batch where none is given
TAKEN = 8  # batches of requests that are taken together, of those that are made on the way


class TransformersExecutor:
    """Loads a causal language model and serves `Executor`. config: dtype, device, batch_size, token_budget, ..."""

    def __init__(self, config: EngineConfig, text_processors: Sequence[TextProcessor]) -> None:
        model, own = config.model, load_config(config.model, config.allow_untested)
        self._device = pick_device(config.device)
        self._model = load(model, PRIMARY_WEIGHTS, config.dtype, self._device)
        self.geometry = geometry_of(own, self._model)
        second = None
        if config.secondary is not None:
            second = load(model, config.secondary, config.dtype, self._device)
            other = geometry_of(second.config, second)
            least = {
                name: min(getattr(self.geometry, name), getattr(other, name)) for name in ("context", "vocab_size")
            }
            self.geometry = replace(self.geometry, **least)
        self._tokenizer, self._token_budget = text_processors[0].tokenizer, config.token_budget
        self._batch_size = BATCH_SIZE if config.batch_size is None else config.batch_size
        own = total_bytes(self._model.parameters())
        self._step = make_twin(self._model, second)
        self.memory = Memory(own, total_bytes(self._model.parameters()) - own, 0, module_kinds(self._step.paired))

    def check_model(self, name: str, model: Model) -> None:
        """Every model whose adapters fit the geometry can be run."""

    def start(self, models: Sequence[Model]) -> None:
        """Nothing is left to do: the model was loaded for its geometry."""

    def check_request(self, request: Request) -> None:
        """Every request of a model that fits the geometry can be run."""

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        """(index, output) of each request; those of a batch come together."""
        if self._step is None:
            raise SnpatchError("this engine is closed")
        if isinstance(requests, Sequence):
            yield from self._all(requests)
            return
        requests, start = iter(requests), 0
        while taken := list(islice(requests, TAKEN * self._batch_size)):
            for index, output in self._all(taken):
                yield start + index, output
            start += len(taken)

    def _all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        banks = Banks(requests, self.geometry, self._device)
        for batch in self._batches(requests):
            self._step.banks = banks.layers
            outputs = self._run([requests[i] for i in batch], banks)
            self._step.banks = []
            yield from zip(batch, outputs, strict=True)
        banks.gather()

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._step = None

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of the requests that run together; the longest first where a token budget sizes the batches."""
        lengths = [len(r.prompt_ids) + (r.sampling.max_tokens if r.sampling else 0) for r in requests]
        order = list(range(len(requests)))
        if self._token_budget is not None:
            order.sort(key=lambda i: (_sets(requests[i]), -lengths[i]))
        batches: list[list[int]] = []
        for index in order:
            batch = batches[-1] if batches else []
            fits = batch and len(batch) < self._batch_size and _sets(requests[batch[0]]) == _sets(requests[index])
            if fits and self._token_budget is not None:
                padded = max(lengths[batch[0]], lengths[index]) * (len(batch) + 1) * requests[index].streams
                fits = padded <= self._token_budget
            if fits:
                batch.append(index)
            else:
                batches.append([index])
        return batches

    @torch.inference_mode()
    def _run(self, requests: list[Request], banks: Banks) -> list[Output]:
        """One batch from its prompts to its last token."""
        step, device = self._step, self._device
        table, capture, receipt = banks.for_batch(requests)
        step.sets, step.capture, step.receipt = _sets(requests[0]), capture, receipt
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        width = int(lengths.max())
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.as_tensor(request.prompt_ids)
        position = torch.arange(width, device=device) - (width - lengths)[:, None]
        mask = position >= 0
        index = torch.where(mask, torch.arange(len(requests), device=device)[:, None], -1)
        cache = DynamicCache(config=self._model.config) if any(r.sampling for r in requests) else None

        def forward(ids: Tensor, position: Tensor, index: Tensor, keep: int) -> Tensor:
            """Logits [B, keep or length, V] of the recipients."""
            step.length = ids.shape[1]
            plan = fill_plan(table, *(tensor.flatten().cpu().numpy() for tensor in (index, position)))
            step.plan = torch.from_numpy(plan).to(device)
            inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position.clamp(min=0)}
            rows = {name: tensor.repeat_interleave(step.streams, dim=0) for name, tensor in inputs.items()}
            run = self._model(**rows, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)
            slots = step.plan.view(*ids.shape, -1)[:, -1, PlanColumn.RECEIPT]
            count_nonfinite(receipt, slots, has_overflowed(run.logits[:, -1]), self.geometry.n_layers)
            return run.logits

        wants_prompt = any(r.prompt_logprobs for r in requests)
        logits = forward(ids.to(device), position, index, 0 if wants_prompt else 1)
        fed = [len(r.prompt_ids) for r in requests]
        writers = [Writer(r, self._tokenizer) for r in requests]
        for row, request in enumerate(requests):
            if request.prompt_logprobs:
                start = width - len(request.prompt_ids)
                targets = torch.as_tensor(request.prompt_ids[1:], device=device)
                rows = logits[row, start:-1].float().log_softmax(-1)
                values = rows.gather(1, targets[:, None]).squeeze(1)
                writers[row].output.prompt_logprobs = Logprobs(values.cpu(), (values >= rows.amax(-1)).cpu())
        active = list(range(len(requests)))  # the batch's rows, by request
        logits = logits[:, -1]
        while True:
            writing = [row for row, request in enumerate(active) if not writers[request].done]
            if not writing:
                break
            chosen = choose(logits[writing].float(), [writers[active[row]] for row in writing])
            for row, (token, logprob) in zip(writing, chosen, strict=True):
                writers[active[row]].write(token, logprob)
            alive = [row for row, request in enumerate(active) if not writers[request].done]
            if not alive:
                break
            if len(alive) <= len(active) // 2:
                # Halving, so that all copies of the cache together cost less than one copy of the first.
                keep = torch.tensor(alive, device=device)
                streams = torch.arange(step.streams, device=device)
                cache.batch_select_indices((keep[:, None] * step.streams + streams).flatten())
                mask, active = mask[keep], [active[row] for row in alive]
            lives = torch.tensor([not writers[request].done for request in active], device=device)
            rows = torch.tensor(active, device=device)
            position = torch.tensor([[fed[request]] for request in active], device=device)
            token = torch.tensor([[writers[request].last_token] for request in active], device=device)
            mask = torch.cat([mask, lives[:, None]], dim=1)
            logits = forward(token, position, torch.where(lives, rows, -1)[:, None], 1)[:, -1]
            for request in active:
                fed[request] += not writers[request].done
        outputs = [writer.finish() for writer in writers]
        records = records_of(requests, fed, capture, receipt)
        for request, output, record in zip(requests, outputs, records, strict=True):
            try:
                confirm(request, output, [record], self.geometry)
            except OverflowedError as error:
                output.error = error
        return outputs


def load(model: str, source: ModelSource, dtype: str, device: torch.device):
    """A set of weights as a transformers model; model: the engine's own. LoRA is merged in float32, then rounded."""
    name = source.checkpoint or model
    own = load_pretrained(AutoConfig, name)
    # SDPA in transformers drops Gemma 2's soft cap on attention logits.
    attention = "eager" if getattr(own, "attn_logit_softcapping", None) else "sdpa"
    first = "float32" if source.lora else dtype
    loaded = load_pretrained(AutoModelForCausalLM, name, dtype=first, attn_implementation=attention)
    loaded = loaded.to(device).eval().requires_grad_(False)
    if source.lora:
        parameters = dict(loaded.named_parameters())
        for weight, value in merge_loras(parameters.items(), source.lora):
            parameters[weight].copy_(value)
        kind = own.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        loaded = loaded.to(kind)
    check_finite(loaded.named_parameters(), name)
    return loaded


def _sets(request: Request) -> tuple[int, ...]:
    """Whose weights each stream of a request runs, the recipient's first: places in the engine's sets."""
    models = (request.recipient,) if request.donor is None else (request.recipient, request.donor)
    return tuple(model.weights.index for model in models)


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SnpatchError(f"device {name!r}: {first_line(error)}") from error
    return device


def geometry_of(config, model) -> Geometry:
    """Sizes from the config, and the width of each module that IA3 can scale, from the model."""
    attention, widths = model.model.layers[0].self_attn, {"down_proj": config.intermediate_size}
    for name in ("k_proj", "v_proj"):
        if hasattr(attention, name):
            widths[name] = getattr(attention, name).out_features
    return Geometry(
        config.num_hidden_layers,
        config.intermediate_size,
        config.max_position_embeddings,
        config.vocab_size,
        widths,
        str(model.dtype).removeprefix("torch."),
    )
