"""Change score of the paper (Eq. 3): root mean square over tokens of the difference of both models' activations."""

from torch import Tensor

from snpatch.ranking.contrast_statistics import Statistics


def rms(statistics: Statistics) -> Tensor:
    """Return the change scores, [L, F] float32."""
    return (statistics.sums[:, 4] / statistics.tokens).sqrt().float()
