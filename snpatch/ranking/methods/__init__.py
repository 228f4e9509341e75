"""Scores of neurons, computed from the statistics of a contrast; one function per file.

To add one: a file with `name(statistics) -> Tensor` ([L, F] float32, neurons with larger scores are patched first), and
its line in METHODS.
"""

from collections.abc import Callable

from torch import Tensor

from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.methods.rms import rms

METHODS: dict[str, Callable[[Statistics], Tensor]] = {"rms": rms}
