"""Statistics and rankings of given activations."""

import torch

from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import Ranking


def sum_activations(r: torch.Tensor, d: torch.Tensor) -> Statistics:
    """Return the statistics of activations [tokens, layers, neurons] float64 of recipient and donor."""
    sums = torch.stack([x.sum(0) for x in (r, r * r, d, d * d, (r - d) ** 2)], dim=1)
    return Statistics(sums, torch.full((r.shape[1],), len(r)))


def rank_activations(r: torch.Tensor, d: torch.Tensor, **options) -> Ranking:
    """Return the ranking of activations; its half is the second half of the tokens."""
    half = sum_activations(r[len(r) // 2 :], d[len(r) // 2 :])
    return Ranking.from_statistics(sum_activations(r, d), half=half, **options)


def rank_changes(rms: torch.Tensor, relative: torch.Tensor, **options) -> Ranking:
    """Return the ranking of neurons [layers, neurons] with this RMS(r) and the factor 1 + relative, of one token."""
    return Ranking.from_statistics(sum_activations(rms[None], (rms * (1 + relative))[None]), **options)
