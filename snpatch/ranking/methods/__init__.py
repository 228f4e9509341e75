"""Scores: how much a neuron matters, as a function of a contrast's statistics. One function a file.

A further one is a file with `name(statistics) -> Tensor`, [L, F] float32, the larger the sooner patched, and a line
here.
"""

from collections.abc import Callable

from torch import Tensor

from snpatch.ranking.methods.rms import rms
from snpatch.ranking.statistics import Statistics

METHODS: dict[str, Callable[[Statistics], Tensor]] = {"rms": rms}
