"""The null of agreement compared with closed forms: constant changes, constant activations, layers of one neuron."""

import math

import numpy as np
import pytest
import torch
from activations import rank_activations, rank_changes

from snpatch import Ranking, SnpatchError
from snpatch.ranking import nulls


def draw_uniform(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def draw_null(a: Ranking, b: Ranking, ks: list[int], **options) -> nulls.AgreementNull:
    (null,) = nulls.draw_agreement_nulls({"a": a, "b": b}, ks, **options).values()
    return null


def test_relative_and_signed_changes_equal_activations():
    generator = torch.Generator().manual_seed(1)
    r, d = torch.randn(2, 9, 3, 4, generator=generator, dtype=torch.float64)
    r[:, 0, 2] = 0
    ranking = rank_activations(r, d, exclude_layers=(-1,))
    rms = r.square().mean(0).sqrt()
    expected = {"relative": (r - d).square().mean(0).sqrt() / rms, "signed": (d - r).mean(0) / rms}
    actual = {"relative": nulls.relative_changes(ranking), "signed": nulls.signed_changes(ranking)}
    for name, values in expected.items():
        values[0, 2] = values[2] = math.nan
        np.testing.assert_allclose(actual[name], values.numpy(), rtol=1e-6)


def test_ranking_without_statistics_has_no_null():
    ranking, imported = rank_changes(*draw_uniform(2, 1, 8, seed=0)), Ranking.from_scores(torch.rand(1, 8))
    assert nulls.relative_changes(imported) is nulls.signed_changes(imported) is None
    assert nulls.draw_agreement_nulls({"a": ranking, "b": imported}, [4]) == {}
    assert list(nulls.draw_agreement_nulls({"a": ranking, "b": imported, "c": ranking}, [4])) == [("a", "c")]


@pytest.mark.parametrize("ks", [[0, 4], [4, 9]])
def test_null_of_invalid_arguments_raises(ks):
    ranking, other = (rank_changes(*draw_uniform(2, 1, size, seed=0)) for size in (8, 9))
    with pytest.raises(SnpatchError, match=rf"k: expected 1\.\.8 \(neurons of ranking a\), got {ks[0]}\.\.{ks[1]}"):
        draw_null(ranking, ranking, ks)
    with pytest.raises(SnpatchError, match=r"ranking b: expected \[1, 8\], as the first, got \[1, 9\]"):
        draw_null(ranking, other, [4])


def test_null_of_constant_changes_is_the_order_of_activations():
    rms = draw_uniform(2, 50, seed=0)
    a, b = (rank_changes(rms, torch.full_like(rms, change)) for change in (0.5, -0.2))
    null = draw_null(a, b, [7, 100], draws=3)
    assert null.overlap.tolist() == null.spearman.tolist() == [[1, 1]] * 3
    reverse = rank_changes(1 / rms, torch.full_like(rms, 0.5))
    null = draw_null(a, reverse, [50, 100], draws=3)
    np.testing.assert_allclose(null.overlap, [[0, 1]] * 3)
    np.testing.assert_allclose(null.spearman, [[math.nan, -1]] * 3)


def test_null_of_constant_activations_is_that_of_random_orders():
    rms = torch.ones(1, 400, dtype=torch.float64)
    a, b = (rank_changes(rms, draw_uniform(1, 400, seed=seed)) for seed in (1, 1))
    null = draw_null(a, b, [40, 100], draws=400)
    # The number of shared neurons is hypergeometric; Spearman of n has the variance 1 / (n - 1).
    for i, k in enumerate((40, 100)):
        fraction = k / 400
        deviation = math.sqrt(k * fraction * (1 - fraction) * (400 - k) / 399) / k
        assert null.overlap[:, i].mean() == pytest.approx(fraction, abs=4 * deviation / math.sqrt(400))
        assert null.overlap[:, i].std() == pytest.approx(deviation, rel=0.15)
        assert abs(np.nanmean(null.spearman[:, i])) < 4 / math.sqrt(400 * (k * fraction - 1))


def test_null_permutes_within_layers_and_ranked_neurons_only():
    rms = draw_uniform(6, 1, seed=1)
    a, b = (rank_changes(rms, draw_uniform(6, 1, seed=seed)) for seed in (2, 3))
    null = draw_null(a, b, [2, 3], draws=5)
    for i, k in enumerate((2, 3)):
        assert null.overlap[:, i] == pytest.approx([a.overlap(b, k)] * 5), "a layer of one neuron has one permutation"
    rms, relative = draw_uniform(2, 2, 30, seed=4)
    relative[1] *= 1000
    a = rank_changes(rms, relative, exclude_layers=(1,))
    null = draw_null(a, a, [3, 30], draws=50)
    assert null.overlap[:, 1].tolist() == [1] * 50, "the excluded layer's neurons stay unranked"
    assert null.overlap[:, 0].mean() < 0.7


def test_inactive_neurons_keep_their_scores_in_the_null():
    r, d = torch.zeros(2, 1, 1, 20, dtype=torch.float64)
    r[..., 10:] = 0.01
    d[..., :10] = torch.arange(1, 11)
    ranking = rank_activations(r, d)
    null = draw_null(ranking, ranking, [10], draws=3)
    assert null.overlap.tolist() == null.spearman.tolist() == [[1]] * 3


def test_comparison_of_orders_equals_overlap_and_spearman_of_rankings():
    a, b = (rank_changes(*draw_uniform(2, 3, 40, seed=seed)) for seed in (1, 2))
    ks = [1, 40, 60, 120]
    orders = [one.top(120) @ torch.tensor([40, 1]) for one in (a, b)]
    overlaps, spearmans = nulls._compare_orders(*(order.numpy() for order in orders), ks, 120)
    assert overlaps == pytest.approx([a.overlap(b, k) for k in ks])
    assert spearmans[1:] == pytest.approx([a.spearman(b, k) for k in ks[1:]])
    assert math.isnan(spearmans[0])


def test_null_covers_unrelated_changes_of_one_activation_size():
    """Rankings with unrelated changes overlap more than the null's 95 % range in few simulations."""
    above, above_random, simulations, k = 0, 0, 150, 60
    for seed in range(simulations):
        rms = draw_uniform(2, 150, seed=1000 + seed) ** 4
        a, b = (rank_changes(rms, draw_uniform(2, 150, seed=seed * 2 + i)) for i in (0, 1))
        null = draw_null(a, b, [k], draws=40, seed=seed)
        above += a.overlap(b, k) > np.quantile(null.overlap, 0.975)
        above_random += a.overlap(b, k) > 1.5 * k / 300
    assert above <= 12, "2.5 % are expected"
    assert above_random == simulations, "random orders overlap far less"


def test_related_changes_exceed_the_null():
    rms = draw_uniform(2, 150, seed=1) ** 2
    relative = draw_uniform(2, 150, seed=2) ** 3
    a, b = (rank_changes(rms, relative * (1 + 0.1 * draw_uniform(2, 150, seed=seed))) for seed in (3, 4))
    assert a.overlap(b, 60) > draw_null(a, b, [60]).overlap.max() + 0.1
