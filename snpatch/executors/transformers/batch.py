"""One batch of requests, from its prompts to its last tokens and receipts.

Why rows of finished requests stay for a while: the KV cache is copied only when half of the rows are done, so that
all copies together cost less than one copy of the first cache.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from snpatch.errors import OverflowedError
from snpatch.executors.base import Logprobs, Output, Request
from snpatch.executors.receipts import confirm
from snpatch.executors.transformers.decoding import CompletionWriter, choose_tokens
from snpatch.executors.transformers.surgery import ForwardState
from snpatch.executors.transformers.tables import BatchTables, build_receipts
from snpatch.models.geometry import Geometry
from snpatch.op.plan import PlanColumn, fill_plan
from snpatch.op.reference import count_nonfinite, has_overflowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BatchRun:
    """The run of one batch; all its requests use the same weights."""

    def __init__(
        self,
        requests: Sequence[Request],
        tables: BatchTables,
        weights: tuple[int, ...],
        model: "PreTrainedModel",
        state: ForwardState,
        tokenizer,
        geometry: Geometry,
    ) -> None:
        self._requests, self._model, self._state, self._geometry = requests, model, state, geometry
        self._device = next(model.parameters()).device
        self._table, self._capture, self._receipt = tables.build_batch(requests)
        state.weights, state.capture, state.receipt = weights, self._capture, self._receipt
        self._cache = DynamicCache(config=model.config) if any(r.sampling for r in requests) else None
        self._writers = [CompletionWriter(r, tokenizer) for r in requests]
        self._num_positions = [len(r.prompt_ids) for r in requests]  # that were run, of each request
        self._active = list(range(len(requests)))  # index of the request in each row of the batch

    @torch.inference_mode()
    def run(self) -> list[Output]:
        """Return the outputs in the requests' order, with their receipts checked."""
        logits, mask = self._prefill()
        while writing := [row for row, index in enumerate(self._active) if not self._writers[index].done]:
            writers = [self._writers[self._active[row]] for row in writing]
            chosen = choose_tokens(logits[writing].float(), writers)
            for writer, (token, logprob) in zip(writers, chosen, strict=True):
                writer.append(token, logprob)
            unfinished = [row for row, index in enumerate(self._active) if not self._writers[index].done]
            if not unfinished:
                break
            if len(unfinished) <= len(self._active) // 2:
                mask = self._drop_finished(unfinished, mask)
            logits, mask = self._decode_step(mask)
        return self._finish()

    def _prefill(self) -> tuple[Tensor, Tensor]:
        """Run the left-padded prompts.

        Return the last position's logits [B, V] and the attention mask [B, length].
        """
        requests, device = self._requests, self._device
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        width = int(lengths.max())
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.as_tensor(request.prompt_ids)
        position = torch.arange(width, device=device) - (width - lengths)[:, None]
        mask = position >= 0
        index = torch.where(mask, torch.arange(len(requests), device=device)[:, None], -1)
        logits_to_keep = 0 if any(r.prompt_logprobs for r in requests) else 1  # 0 = all
        logits = self._forward(ids.to(device), position, index, mask, logits_to_keep)
        for row, request in enumerate(requests):
            if request.prompt_logprobs:
                prompt_logits = logits[row, width - len(request.prompt_ids) : -1]
                self._writers[row].output.prompt_logprobs = _prompt_logprobs(prompt_logits, request.prompt_ids)
        return logits[:, -1], mask

    def _decode_step(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run each row's last token; finished rows run as padding. Returns logits [B, V] and the longer mask."""
        device, writers = self._device, self._writers
        unfinished = torch.tensor([not writers[index].done for index in self._active], device=device)
        rows = torch.tensor(self._active, device=device)
        position = torch.tensor([[self._num_positions[index]] for index in self._active], device=device)
        token = torch.tensor([[writers[index].last_token] for index in self._active], device=device)
        mask = torch.cat([mask, unfinished[:, None]], dim=1)
        logits = self._forward(token, position, torch.where(unfinished, rows, -1)[:, None], mask, 1)
        for index in self._active:
            self._num_positions[index] += not writers[index].done
        return logits[:, -1], mask

    def _drop_finished(self, unfinished: list[int], mask: Tensor) -> Tensor:
        """Keep only the unfinished rows of the batch; return their attention mask."""
        keep = torch.tensor(unfinished, device=self._device)
        streams = torch.arange(self._state.streams, device=self._device)
        assert self._cache is not None, "rows are dropped only while tokens are generated"
        self._cache.batch_select_indices((keep[:, None] * self._state.streams + streams).flatten())
        self._active = [self._active[row] for row in unfinished]
        return mask[keep]

    def _forward(
        self,
        ids: Tensor,  # [B, length] int64
        position: Tensor,  # [B, length]
        index: Tensor,  # [B, length], the token's request; -1 = padding
        mask: Tensor,  # [B, all positions] bool
        logits_to_keep: int,  # last positions whose logits are computed; 0 = all
    ) -> Tensor:
        """Return the recipients' logits [B, logits_to_keep or length, V]."""
        state = self._state
        state.length = ids.shape[1]
        plan = fill_plan(self._table, *(tensor.flatten().cpu().numpy() for tensor in (index, position)))
        state.plan = torch.from_numpy(plan).to(self._device)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position.clamp(min=0)}
        rows = {name: tensor.repeat_interleave(state.streams, dim=0) for name, tensor in inputs.items()}
        output = self._model(
            **rows, past_key_values=self._cache, use_cache=self._cache is not None, logits_to_keep=logits_to_keep
        )
        slots = state.plan.view(*ids.shape, -1)[:, -1, PlanColumn.RECEIPT]
        count_nonfinite(self._receipt, slots, has_overflowed(output.logits[:, -1]), self._geometry.n_layers)
        return output.logits

    def _finish(self) -> list[Output]:
        outputs = [writer.finish() for writer in self._writers]
        receipts = build_receipts(self._requests, self._num_positions, self._capture, self._receipt)
        for request, output, receipt in zip(self._requests, outputs, receipts, strict=True):
            try:
                confirm(request, output, [receipt], self._geometry)
            except OverflowedError as error:
                output.error = error
        return outputs


def _prompt_logprobs(logits: Tensor, prompt_ids: Sequence[int]) -> Logprobs:
    """Return the log-probabilities of the prompt's tokens but the first, from logits [n - 1, V]."""
    targets = torch.as_tensor(prompt_ids[1:], device=logits.device)
    logprobs = logits.float().log_softmax(-1)
    values = logprobs.gather(1, targets[:, None]).squeeze(1)
    return Logprobs(values.cpu(), (values >= logprobs.amax(-1)).cpu())
