"""Controls by activation size, and the share of the squared change, compared with values computed by hand."""

import pytest
import torch

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import Ranking

RECIPIENT = torch.tensor([[8.0, 1.0, 4.0, 3.9, 0.1, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).double()  # RMS of one token
DONOR = RECIPIENT + torch.tensor([[3.0, 0.5, 2.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0, 0.0, 1.0]])
TOP = [[1, 1], [0, 0], [0, 2]]  # changes 4, 3, 2


@pytest.fixture
def ranking() -> Ranking:
    sums = torch.stack([RECIPIENT, RECIPIENT**2, DONOR, DONOR**2, (DONOR - RECIPIENT) ** 2], dim=1)
    return Ranking.from_statistics(Statistics(sums, torch.ones(2, dtype=torch.int64)))


def neurons(control: Ranking) -> list[list[int]]:
    return control.top(len(control)).tolist()


def test_magnitude_control_has_largest_activations_of_each_layer(ranking):
    assert ranking.top(3).tolist() == TOP
    control = ranking.magnitude_control(3)
    assert neurons(control) == [[1, 5], [0, 0], [0, 5]]  # layer 0 has two, layer 1 one
    assert control.meta["overlap"] == pytest.approx(1 / 3)
    assert (control.meta["control"], control.scores) == ("magnitude", None)


def test_matched_control_has_nearest_other_activations_of_each_layer(ranking):
    """Layer 0: 8 takes 7 first, then 4 takes 3.9. Layer 1: 1 and 3 are equally near 2, and the smaller is taken."""
    control = ranking.matched_control(3)
    assert neurons(control) == [[1, 0], [0, 5], [0, 3]]
    assert control.meta["overlap"] == 0
    assert neurons(ranking.matched_control((1, 2))) == [[0, 5]]
    assert neurons(ranking.matched_control((2, 2))) == []


def test_matched_control_without_other_neurons_raises(ranking):
    layer = ranking.filter_layers([0])
    with pytest.raises(NotEnoughNeuronsError, match="expected 4 other neurons in layer 0, got 2"):
        layer.matched_control(4)


def test_recipient_rms_is_that_of_statistics_or_moments(ranking):
    assert torch.allclose(ranking.recipient_rms, RECIPIENT, rtol=1e-12)
    moments = {"recipient_mean": torch.full((2, 6), 3.0), "recipient_std": torch.full((2, 6), 4.0)}
    assert torch.equal(Ranking.from_scores(RECIPIENT, moments=moments).recipient_rms, torch.full((2, 6), 5.0).double())
    for kind in ("magnitude_control", "matched_control"):
        with pytest.raises(SnpatchError, match="expected statistics or moments of the recipient, got none"):
            getattr(Ranking.from_scores(RECIPIENT), kind)(1)


def test_energy_is_the_share_of_the_squared_change(ranking):
    total = 9 + 0.25 + 4 + 16 + 1
    assert ranking.energy(ranking, 3) == pytest.approx((16 + 9 + 4) / total)
    assert ranking.energy(ranking, (1, 2)) == pytest.approx(9 / total)
    assert ranking.energy(ranking, 0) == 0
    assert ranking.energy(ranking, len(ranking)) == pytest.approx(1)
    assert ranking.energy(ranking.magnitude_control(3), 3) == pytest.approx((1 + 9 + 0) / total)
    assert Ranking.from_scores(RECIPIENT).energy(ranking, 3) is None
    with pytest.raises(SnpatchError, match="expected another ranking of"):
        ranking.energy(Ranking.from_scores(RECIPIENT[:1]), 1)


def test_matched_control_equals_brute_force_on_a_large_layer():
    """Each neuron in turn, by falling size, takes the nearest that is left."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(1, 400, generator=generator).double() ** 3
    sums = torch.stack([size, size**2, size * 2, size**2 * 4, size**2], dim=1)
    ranking = Ranking.from_statistics(Statistics(sums, torch.ones(1, dtype=torch.int64)))
    own = ranking.top(60)[:, 1].tolist()
    free, expected = sorted(set(range(400)) - set(own)), {}
    for neuron in sorted(own, key=lambda n: -float(size[0, n])):
        expected[neuron] = min(free, key=lambda n: abs(float(size[0, n] - size[0, neuron])))
        free.remove(expected[neuron])
    assert neurons(ranking.matched_control(60)) == [[0, expected[neuron]] for neuron in own]
