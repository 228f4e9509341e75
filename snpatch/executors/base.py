"""What the engine hands an executor and what comes back: the one interface that every executor serves.

Why one kind of request: generation, contrast, capture and log-probabilities differ only in how many tokens are
written and in which positions are observed, so they mix in one batch and an executor has one path to get right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from snpatch.patching.patch import Constant, Noise, Window
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to run.

    recipient: the model that speaks. donor: what the second stream runs or what overwrites; None: neither.
    window over ranking: neurons to overwrite at positions [patch_range); None: none.
    observe: statistics group and range of positions [start, stop) that go into it; needs a donor stream.
    observe_ends False: not those that hold a token that ends a text (which an executor may have run ahead into).
    capture: (ranking, k, range of positions): the activations of its first k neurons are returned.
    sampling: None writes nothing (the prompt alone is run). prompt_logprobs: of each prompt token but the first.
    """

    prompt_ids: Sequence[int]
    recipient: str
    donor: str | Constant | Noise | None = None
    ranking: Ranking | None = None
    window: Window | None = None
    patch_range: tuple[int, int] = (0, 0)
    observe: tuple[int, int, int] | None = None
    observe_ends: bool = True
    capture: tuple[Ranking, int, int, int] | None = None
    sampling: Sampling | None = None
    prompt_logprobs: bool = False

    @property
    def streams(self) -> int:
        """2 if a donor model runs beside the recipient, else 1."""
        return 2 if isinstance(self.donor, str) else 1


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


@dataclass(eq=False)
class Statistics:
    """Sums over the tokens of one group: sums [L, 5, F] float64 of r, r^2, d, d^2, (r - d)^2; count [L] int64."""

    sums: Tensor
    count: Tensor


@dataclass(frozen=True)
class Geometry:
    """What of a model the rest needs to know. widths: IA3 module -> width of its vector, where the model has it."""

    n_layers: int
    n_neurons: int
    context: int
    vocab_size: int
    widths: dict[str, int]


Progress = Callable[[int, int], None]  # (requests done, requests in all)


class Executor(Protocol):
    """Runs requests. `execute` returns outputs in the order of the requests and one Statistics a group."""

    geometry: Geometry  # known before `start`
    model_digest: str  # names the base model by its content; known after it
    eos_ids: frozenset[int]  # tokens that end a text

    def register_adapter(self, name: str, scales) -> None: ...

    def start(self) -> None: ...

    def execute(
        self, requests: Sequence[Request], groups: int = 0, progress: Progress | None = None
    ) -> tuple[list[Output], list[Statistics]]: ...

    def close(self) -> None: ...
