"""Sampling: parameters of generation. The command line takes its defaults from here, so torch is not imported."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

from snpatch.errors import SnpatchError, is_unicode, shown
from snpatch.utils import schema
from snpatch.utils.schema import option

SEED_LIMIT = 2**63  # seeds are int64 on the device


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of completions.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus sampling probability mass.
        top_k: Sample from the k most likely tokens; 0 disables.
        max_tokens: Maximum number of generated tokens, an ending EOS included.
        min_tokens: Minimum number of tokens before EOS is allowed. A stop string ends a completion only where it
            reaches past them, as in vLLM.
        stop: Strings that end a completion.
        ignore_eos: Continue after EOS.
        seed: Random seed of sampling and of noise donors. None: a new one for each completion; 0 for noise.
        logprobs: Report the log-probability of each generated token under the model's own distribution, before
            temperature and truncation.
        n: Number of completions per prompt, consecutive in the result. The i-th has seed + i.
        vllm: Further fields of vLLM's SamplingParams (min_p, presence_penalty, ...); vllm backend only.
    """

    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Nucleus sampling probability mass.")
    top_k: int = option(0, "Sample from the k most likely tokens; 0 disables.", min=0)
    max_tokens: int = option(128, "Maximum number of generated tokens.", min=1)
    min_tokens: int = option(0, "Minimum number of tokens before EOS is allowed.", min=0)
    stop: tuple[str, ...] = option((), "String that ends a completion. Repeatable.")
    ignore_eos: bool = False
    seed: int | None = option(
        None, "Random seed of sampling and of noise donors. Default: none for sampling, 0 for noise."
    )
    logprobs: bool = option(False, "Report the log-probability of each token.")
    n: int = field(default=1, metadata={"min": 1})
    vllm: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (expected, convert) in _CONVERTERS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            try:
                object.__setattr__(self, name, convert(value))
            except (TypeError, OverflowError):
                raise SnpatchError(f"sampling: {name}: expected {expected}, got {shown(value)}", field=name) from None
        schema.validate(self, "sampling: ")
        temperature, n = self.temperature, self.n
        is_temperature = temperature == 0 or temperature >= 1e-5
        is_seed = self.seed is None or -SEED_LIMIT <= self.seed <= SEED_LIMIT - n
        for is_valid, name, message in (
            (is_temperature, "temperature", f"0 (greedy) or at least 1e-5, got {temperature}"),
            (0 < self.top_p <= 1, "top_p", f"a value in (0, 1], got {self.top_p}"),
            (self.min_tokens <= self.max_tokens, "min_tokens", f"0..max_tokens, got {self.min_tokens}"),
            (n == 1 or temperature > 0, "n", f"1 with temperature 0, got {n}. Set a temperature"),
            (is_seed, "seed", f"-2^63..2^63-n for n completions, got {self.seed}"),
            (all(self.stop), "stop", "non-empty strings, got ''"),
        ):
            if not is_valid:
                raise SnpatchError(f"sampling: {name}: expected {message}", field=name)

    def singles(self) -> "list[Sampling]":
        """Split into samplings of one completion.

        Returns:
            n samplings with n = 1 and consecutive seeds.
        """
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]


def _whole(value) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _texts(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and is_unicode(text) for text in texts):
        raise TypeError
    return tuple(texts)


def _table(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return value


# Field -> (expected type, function that converts a value or raises TypeError). numpy's numbers are accepted.
_CONVERTERS = {
    **dict.fromkeys(("temperature", "top_p"), ("a finite number", _number)),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "seed", "n"), ("a whole number", _whole)),
    **dict.fromkeys(("ignore_eos", "logprobs"), ("True or False", _flag)),
    "stop": ("a string or a list of strings", _texts),
    "vllm": ("a mapping of vLLM's names", _table),
}


GREEDY = Sampling()
CONTRAST = Sampling(max_tokens=256)  # completions of Eq. 3 in the paper
