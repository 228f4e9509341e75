"""Decoding: choosing each next token and deciding when a completion ends."""

from collections.abc import Sequence
from typing import cast

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
from snpatch.sampling import Sampling


class CompletionWriter:
    """The completion of one request as it grows. A request without sampling is done from the start."""

    def __init__(self, request: Request, tokenizer) -> None:
        self.output = Output()
        self._sampling, self.eos_ids = request.sampling, request.recipient.weights.eos_ids
        self.done = self._sampling is None
        self._tokenizer = tokenizer
        self._cut_at: int | None = None
        self._search_from = 0  # index in the text from which a stop string may end, with min_tokens
        self._generator, self._warpers = None, LogitsProcessorList()
        if self._sampling is None:
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
    def sampling(self) -> Sampling:
        """Return the request's sampling; a request without one has no tokens to write."""
        assert self._sampling is not None
        return self._sampling

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token is always chosen (temperature 0), and none is sampled."""
        return self._generator is None

    @property
    def last_token(self) -> int:
        """Return the id of the token appended last, which the next step runs.

        Raises:
            IndexError: No token was appended yet.
        """
        return self.output.token_ids[-1]

    @property
    def may_choose_eos(self) -> bool:
        """Return whether `min_tokens` tokens are written; until then, `choose_tokens` excludes EOS."""
        return len(self.output.token_ids) >= self.sampling.min_tokens

    def sample(self, logits: Tensor) -> int:
        """Sample a token from logits [V]. The result is the same on every device and in every batch."""
        scores = cast(torch.FloatTensor, logits[None].cpu())
        read = cast(torch.LongTensor, None)  # the tokens so far, which these warpers do not read
        probabilities = self._warpers(read, scores)[0].softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def append(self, token: int, logprob: float | None) -> None:
        """Append a token and decide whether the completion ends with it."""
        output, sampling = self.output, self.sampling
        output.token_ids.append(token)
        if output.logprobs is not None and logprob is not None:
            output.logprobs.append(logprob)
        if token in self.eos_ids and not sampling.ignore_eos:
            self._end("eos")
        elif sampling.stop and (match := self._find_stop_string()) is not None:
            self.output.stop_reason, self._cut_at = match
            self._end("stop")
        elif len(output.token_ids) == sampling.max_tokens:
            self._end("length")

    def finish(self) -> Output:
        """Return the output with its text, without special tokens and cut before a stop string."""
        if self._sampling is not None:
            self.output.text = self._decode()[: self._cut_at]
        return self.output

    def _end(self, reason: str) -> None:
        self.output.finish_reason = reason
        self.done = True

    def _decode(self) -> str:
        return self._tokenizer.decode(self.output.token_ids, skip_special_tokens=True)

    def _find_stop_string(self) -> tuple[str, int] | None:
        """Return the first stop string and its index; one that ends within min_tokens does not count."""
        text = self._decode()
        if len(self.output.token_ids) <= self.sampling.min_tokens:
            self._search_from = len(text)
            return None
        starts = {s: text.find(s, max(0, self._search_from - len(s) + 1)) for s in self.sampling.stop}
        matches = {stop: start for stop, start in starts.items() if start >= 0}
        return min(matches.items(), key=lambda match: match[1]) if matches else None


def choose_tokens(logits: Tensor, writers: Sequence[CompletionWriter]) -> list[tuple[int, float | None]]:
    """Choose each writer's next token from float32 logits [n, V]; with its log-probability if requested."""
    # NaN cannot be sampled from. The receipt of such a completion is an error, whatever is chosen here.
    logits = torch.where(has_overflowed(logits)[:, None], 0, logits)
    allowed = logits
    for row, writer in enumerate(writers):
        if not writer.may_choose_eos and not writer.sampling.ignore_eos:
            allowed = allowed.clone() if allowed is logits else allowed
            allowed[row, list(writer.eos_ids)] = -torch.inf
    tokens = allowed.argmax(-1).tolist()
    for row, writer in enumerate(writers):
        if not writer.is_greedy:
            tokens[row] = writer.sample(allowed[row])
    if not any(writer.sampling.logprobs for writer in writers):
        return [(token, None) for token in tokens]
    logprobs = logits.log_softmax(-1)[torch.arange(len(writers)), tokens].tolist()
    return list(zip(tokens, logprobs, strict=True))
