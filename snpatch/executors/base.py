"""What an engine hands an executor and what comes back: the one interface that every executor serves.

Why one kind of request: generation, contrast, capture and log-probabilities differ only in how many tokens are
written and in which positions are observed, so they mix in one batch and an executor has one path to get right.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from snpatch.errors import OverflowedError
from snpatch.models.model import Model
from snpatch.patching.patch import Overwrite
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.statistics import Statistics
from snpatch.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Observation:
    """Statistics of both streams at positions [start, stop), added to `into` when the run has ended.

    ends False: not of those that hold a token that ends a text (which an executor may have run ahead into).
    """

    into: Statistics
    start: int
    stop: int
    ends: bool = True


@dataclass(frozen=True, eq=False)
class Capture:
    """The activations of a ranking's first k neurons at positions [start, stop) are returned."""

    ranking: Ranking
    k: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to run.

    recipient: the model that speaks. donor: the model that the second stream runs; None: there is no second stream.
    overwrites: in order; their sources are the donor, or need none. sampling: None writes nothing (the prompt alone is
    run). prompt_logprobs: of each prompt token but the first.
    """

    prompt_ids: Sequence[int]
    recipient: Model
    donor: Model | None = None
    overwrites: tuple[Overwrite, ...] = ()
    observe: Observation | None = None
    capture: Capture | None = None
    sampling: Sampling | None = None
    prompt_logprobs: bool = False

    @property
    def streams(self) -> int:
        """2 if a donor runs beside the recipient, else 1."""
        return 1 if self.donor is None else 2


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probabilities of given tokens: values [n] float32; is_greedy [n] bool: no other token is likelier."""

    values: Tensor
    is_greedy: Tensor

    def last(self, n: int) -> "Logprobs":
        """Those of the last n tokens."""
        start = len(self.values) - n
        return Logprobs(self.values[start:], self.is_greedy[start:])


@dataclass(eq=False)
class Output:
    """What one request gave. token_ids includes an ending EOS; `overwrites` is the device's count (the receipt)."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # "eos", "stop" or "length"; None where nothing was to be written
    stop_reason: str | None = None  # the stop string that ended it
    logprobs: list[float] | None = None  # [len(token_ids)]
    prompt_logprobs: Logprobs | None = None  # [len(prompt_ids) - 1]
    captured: Tensor | None = None  # [positions, k] float32
    overwrites: int = 0
    error: OverflowedError | None = None  # why the text must not be used


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    widths: IA3 module -> width of its vector, where the model has it. dtype: of the activations, as "bfloat16".
    """

    n_layers: int
    n_neurons: int
    context: int
    vocab_size: int
    widths: dict[str, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, neurons of a layer)."""
        return self.n_layers, self.n_neurons

    @property
    def largest(self) -> float:
        """Largest activation that the dtype can hold and that a norm can square in float32."""
        return min(torch.finfo(getattr(torch, self.dtype)).max, torch.finfo(torch.float32).max ** 0.5)


@dataclass(frozen=True)
class Memory:
    """What an engine holds, in bytes over all its devices. second: what a second set of weights holds apart from the
    first; cache: the KV cache of both streams, 0 where it is made anew for each batch; twice: kinds of modules that
    differ between the sets, and are held for each, as "down_proj"."""

    weights: int
    second: int
    cache: int
    twice: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {"weights": self.weights, "of a second set apart from them": self.second, "KV cache": self.cache}
        sizes = [f"{size / 1e9:.2f} GB {what}" for what, size in parts.items() if size]
        return ", ".join([*sizes, *([f"held twice: {', '.join(self.twice)}"] if self.twice else [])])


Progress = Callable[[int, int], None]  # (requests done, requests in all)


class Executor(Protocol):
    """Runs requests."""

    geometry: Geometry  # known before `start`
    memory: Memory  # known after it

    def check(self, name: str, model: Model) -> None:
        """An error for a model that this executor cannot run, as early as it can be told."""

    def start(self, models: Sequence[Model]) -> None:
        """Get ready to run requests; models: those that are known so far."""

    def check_request(self, request: Request) -> None:
        """An error for a request that this executor cannot run, however long it waits."""

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        """(index, output) of each request as it finishes, its receipt checked. A text that overflowed has its `error`.

        They are taken as there is room for them. Those of a list are all checked before any runs; whoever makes them
        on the way has checked them. Statistics are whole when the last output was taken; whoever stops before ends the
        requests that run.
        """

    def close(self) -> None:
        """Free what is held; nothing can be run afterwards."""
