"""The interface that every executor implements: the requests an engine passes to it and the outputs it returns.

Why one kind of request: generation, contrast, capture and log-probabilities differ only in how many tokens are
generated and which positions are observed. So they mix in one batch, and an executor has one path to get right.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from snpatch.errors import OverflowedError
from snpatch.models.geometry import Geometry
from snpatch.models.model import Model
from snpatch.patching.patch import Overwrite
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Observation:
    """Statistics of both streams at positions [start, stop), added to `statistics` when the run has ended.

    include_eos: False skips tokens that end a completion, because an executor may have run ahead into them.
    """

    statistics: Statistics
    start: int
    stop: int
    include_eos: bool = True


@dataclass(frozen=True, eq=False)
class Capture:
    """Activations of a ranking's first k neurons at positions [start, stop), to be returned."""

    ranking: Ranking
    k: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to run.

    recipient: the model that generates. donor: the model of the second stream, or None to run a single stream.
    overwrites: applied in order; their sources are the donor, or need none. sampling: None runs the prompt only.
    prompt_logprobs: return the log-probability of each prompt token but the first.
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
        """2 if a donor runs with the recipient, else 1."""
        return 1 if self.donor is None else 2


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probabilities of given tokens.

    values: [n] float32. is_greedy: [n] bool, True if no other token is more likely.
    """

    values: Tensor
    is_greedy: Tensor

    def last(self, n: int) -> "Logprobs":
        """Return those of the last n tokens."""
        start = len(self.values) - n
        return Logprobs(self.values[start:], self.is_greedy[start:])


@dataclass(eq=False)
class Output:
    """Result of one request. token_ids includes a final EOS; `overwrites` is the device's count (the receipt)."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # "eos", "stop" or "length"; None if nothing was to be generated
    stop_reason: str | None = None  # the stop string that ended the completion
    logprobs: list[float] | None = None  # [len(token_ids)]
    prompt_logprobs: Logprobs | None = None  # [len(prompt_ids) - 1]
    captured: Tensor | None = None  # [positions, k] float32
    overwrites: int = 0
    error: OverflowedError | None = None  # why the completion must not be used


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine uses, summed over its devices.

    secondary: secondary weights that are not shared with the primary ones. kv_cache: KV cache of both streams, 0 if
    it is allocated for each batch. duplicated: kinds of modules that are stored for both sets of weights because they
    differ, such as "down_proj".
    """

    weights: int
    secondary: int
    kv_cache: int
    duplicated: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {"weights": self.weights, "secondary weights": self.secondary, "KV cache": self.kv_cache}
        sizes = [f"{size / 1e9:.2f} GB {part}" for part, size in parts.items() if size]
        return ", ".join([*sizes, *([f"stored twice: {', '.join(self.duplicated)}"] if self.duplicated else [])])


Progress = Callable[[int, int], None]  # (requests done, requests in total)


class Executor(Protocol):
    """Runs requests."""

    geometry: Geometry  # known before `start`

    @property
    def memory(self) -> Memory:
        """Memory of the engine, known after `start`."""
        ...

    def check_model(self, name: str, model: Model) -> None:
        """Raise if this executor cannot run the model, as early as that is known."""

    def start(self, models: Sequence[Model]) -> None:
        """Get ready to run requests. models: those that are known so far."""

    def check_request(self, request: Request) -> None:
        """Raise if this executor can never run the request, however long it waits."""

    def stream(self, requests: Iterable[Request]) -> Generator[tuple[int, Output], None, None]:
        """Yield (index, output) as each request finishes, with its receipt checked.

        An output that overflowed has its `error` set. Requests are taken as capacity allows. The requests of a list
        are all checked before any runs; the caller checks the requests of a generator. Statistics are complete after
        the last output; if the consumer stops iterating earlier, running requests are aborted.
        """
        ...

    def close(self) -> None:
        """Free all resources; nothing can be run afterwards."""
