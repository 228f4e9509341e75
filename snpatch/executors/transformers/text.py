"""How a text is written token by token: choosing tokens and knowing when to stop."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from snpatch.errors import SnpatchError
from snpatch.executors.base import Output, Request
from snpatch.op.reference import has_overflowed


class Writer:
    """One request's text as it grows. A request without sampling is done before it begins."""

    def __init__(self, request: Request, tokenizer) -> None:
        self.output = Output()
        self.sampling, self.eos_ids = request.sampling, request.recipient.weights.eos_ids
        self.done = self.sampling is None
        self._tokenizer = tokenizer
        self._cut_at: int | None = None
        self._search_from = 0  # where in the text a stop string may end, with min_tokens
        self._generator, self._warpers = None, LogitsProcessorList()
        if self.sampling is None:
            return
        if self.sampling.vllm:
            raise SnpatchError(f"sampling: {', '.join(self.sampling.vllm)} needs the vllm backend")
        if self.sampling.logprobs:
            self.output.logprobs = []
        if self.sampling.temperature > 0:
            self._generator = torch.Generator()
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
            self._warpers.append(TemperatureLogitsWarper(self.sampling.temperature))
            if self.sampling.top_k:
                self._warpers.append(TopKLogitsWarper(self.sampling.top_k))
            if self.sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(self.sampling.top_p))

    @property
    def is_greedy(self) -> bool:
        return self._generator is None

    @property
    def last_token(self) -> int:
        return self.output.token_ids[-1]

    @property
    def may_choose_eos(self) -> bool:
        return len(self.output.token_ids) >= self.sampling.min_tokens

    def draw(self, logits: Tensor) -> int:
        """A token from the logits [V] of a sampling request; the same on every device and in every batch."""
        probabilities = self._warpers(None, logits[None].cpu())[0].softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def write(self, token: int, logprob: float | None) -> None:
        """Append a token and decide whether the text ends with it."""
        output, sampling = self.output, self.sampling
        output.token_ids.append(token)
        if sampling.logprobs:
            output.logprobs.append(logprob)
        if token in self.eos_ids and not sampling.ignore_eos:
            self._end("eos")
        elif sampling.stop and (found := self._stop_string()) is not None:
            self.output.stop_reason, self._cut_at = found
            self._end("stop")
        elif len(output.token_ids) == sampling.max_tokens:
            self._end("length")

    def finish(self) -> Output:
        """The output with its text: without special tokens, cut before a stop string."""
        if self.sampling is not None:
            self.output.text = self._text()[: self._cut_at]
        return self.output

    def _end(self, reason: str) -> None:
        self.output.finish_reason = reason
        self.done = True

    def _text(self) -> str:
        return self._tokenizer.decode(self.output.token_ids, skip_special_tokens=True)

    def _stop_string(self) -> tuple[str, int] | None:
        """The stop string that occurs first and where; one that ends within min_tokens does not count."""
        text = self._text()
        if len(self.output.token_ids) <= self.sampling.min_tokens:
            self._search_from = len(text)
            return None
        starts = {s: text.find(s, max(0, self._search_from - len(s) + 1)) for s in self.sampling.stop}
        found = {stop: start for stop, start in starts.items() if start >= 0}
        return min(found.items(), key=lambda item: item[1]) if found else None


def choose(logits: Tensor, writers: Sequence[Writer]) -> list[tuple[int, float | None]]:
    """The next token of each writer from its float32 logits [n, V], and its log-probability where asked for."""
    # Nothing can be drawn from NaN. The receipt of such a text is an error, whatever it says.
    logits = torch.where(has_overflowed(logits)[:, None], 0, logits)
    allowed = logits
    for row, writer in enumerate(writers):
        if not writer.may_choose_eos and not writer.sampling.ignore_eos:
            allowed = allowed.clone() if allowed is logits else allowed
            allowed[row, list(writer.eos_ids)] = -torch.inf
    tokens = allowed.argmax(-1).tolist()
    for row, writer in enumerate(writers):
        if not writer.is_greedy:
            tokens[row] = writer.draw(allowed[row])
    if not any(writer.sampling.logprobs for writer in writers):
        return [(token, None) for token in tokens]
    logprobs = logits.log_softmax(-1)[torch.arange(len(writers)), tokens].tolist()
    return list(zip(tokens, logprobs, strict=True))
