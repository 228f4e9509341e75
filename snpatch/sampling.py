"""Sampling: how tokens are chosen and when a text ends. Kept free of torch: the CLI takes its defaults from here."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

from snpatch.errors import SnpatchError, is_unicode, shown
from snpatch.utils.schema import option

SEEDS = 2**63  # an int64 on the device


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends. temperature 0 is greedy; seed None draws a fresh one.

    max_tokens counts generated tokens, an ending EOS among them; before min_tokens no EOS is chosen, and a stop
    string ends the text only where it reaches past them (as in vLLM). logprobs: report each chosen token's
    log-probability (of the model's own distribution, before temperature and truncation). n: texts of each prompt,
    the i-th with seed + i; they share the patch and come one after the other. vllm: further fields of vLLM's
    SamplingParams (min_p, presence_penalty, bad_words, ...), for the vllm backend only.
    """

    temperature: float = option(0.0, "0 is greedy.")
    top_p: float = option(1.0, "Only the likeliest tokens of this probability together.")
    top_k: int = option(0, "Only so many of the likeliest tokens; 0: all.")
    max_tokens: int = option(128, "Most new tokens of a text.", min=1)
    min_tokens: int = option(0, "No EOS before so many.", min=0)
    stop: tuple[str, ...] = option((), "A string that ends the text. May be repeated.")
    ignore_eos: bool = False
    seed: int | None = option(None, "Of the sampling, and of the noise (there 0 by default).")
    logprobs: bool = option(False, "Report each token's log-probability.")
    n: int = 1
    vllm: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (kind, check) in CHECKS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            try:
                object.__setattr__(self, name, check(value))
            except TypeError:
                raise SnpatchError(f"sampling: {name}: wanted {kind}, got {shown(value)}", field=name) from None
        for valid, name, message in (
            (
                self.temperature == 0 or 1e-5 <= self.temperature < math.inf,
                "temperature",
                f"must be 0 (greedy) or at least 1e-5, got {self.temperature}",
            ),
            (0 < self.top_p <= 1, "top_p", f"must lie in (0, 1], got {self.top_p}"),
            (self.top_k >= 0, "top_k", f"must be at least 0 (0: all), got {self.top_k}"),
            (self.max_tokens >= 1, "max_tokens", f"must be at least 1, got {self.max_tokens}"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"must lie in 0..max_tokens, got {self.min_tokens}",
            ),
            (self.n >= 1, "n", f"must be at least 1, got {self.n}"),
            (
                self.n == 1 or self.temperature > 0,
                "n",
                f"is {self.n}, and greedy texts are all the same: set a temperature",
            ),
            (
                self.seed is None or -SEEDS <= self.seed <= SEEDS - self.n,
                "seed",
                f"must lie in -2^63..2^63-1, with those of all n texts, got {self.seed}",
            ),
            (all(self.stop), "stop", "holds an empty string"),
        ):
            if not valid:
                raise SnpatchError(f"sampling: {name} {message}", field=name)

    def singles(self) -> "list[Sampling]":
        """The n samplings of one text each that this one of n texts stands for."""
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]


def _whole(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: object) -> int | float:
    if type(value) in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


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


# A field -> what it wants, and what makes that of a value or raises TypeError. numpy's integers and floats are numbers.
CHECKS = {
    **dict.fromkeys(("temperature", "top_p"), ("a number", _number)),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "seed", "n"), ("a whole number", _whole)),
    **dict.fromkeys(("ignore_eos", "logprobs"), ("True or False", _flag)),
    "stop": ("a text or a list of texts", _texts),
    "vllm": ("a mapping of vLLM's names", _table),
}


GREEDY = Sampling()
CONTRAST = Sampling(max_tokens=256)  # paper, Eq. 3's completions
