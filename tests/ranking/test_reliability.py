"""Halves of a contrast's prompts, and the part of a change that is a neuron's own factor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from activations import rank_activations, rank_changes, sum_activations

from snpatch import Ranking, SnpatchError
from snpatch.ranking.reliability import compute_reliability, split_halves
from snpatch.utils.files import write_tensors


def draw_activations(tokens: int = 12, layers: int = 3, neurons: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, layers, neurons, generator=generator, dtype=torch.float64)


def test_plus_and_without_add_and_remove_tokens():
    r, d = draw_activations()
    whole, first, second = sum_activations(r, d), sum_activations(r[:5], d[:5]), sum_activations(r[5:], d[5:])
    for actual, expected in ((first.plus(second), whole), (whole.without(second), first)):
        torch.testing.assert_close(actual.sums, expected.sums)
        assert torch.equal(actual.count, expected.count)


def test_halves_are_the_rankings_of_their_tokens():
    r, d = draw_activations()
    halves = split_halves(rank_activations(r, d, exclude_layers=(0,)))
    for half, tokens in zip(halves, (slice(None, 6), slice(6, None)), strict=True):
        expected = rank_activations(r[tokens], d[tokens], exclude_layers=(0,))
        assert torch.equal(half.rank, expected.rank)
        torch.testing.assert_close(half.scores, expected.scores)


def test_halves_of_a_set_operation_rank_its_neurons():
    ranking = rank_activations(*draw_activations())
    part = ranking.filter_layers([1])
    assert [len(half) for half in split_halves(part)] == [8, 8]
    assert compute_reliability(split_halves(part), 8).overlap == 1


def test_ranking_without_a_half_has_no_reliability():
    ranking = rank_activations(*draw_activations())
    assert split_halves(replace(ranking, half=None)) is None
    assert split_halves(Ranking.from_scores(torch.rand(2, 3))) is None
    with pytest.raises(SnpatchError, match="half: expected it with statistics, got it alone"):
        replace(ranking, statistics=None)


def test_reliability_of_constructed_halves_gives_known_values():
    r = torch.zeros(2, 1, 4, dtype=torch.float64)
    d = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[3.0, 4.0, 1.0, 2.0]]], dtype=torch.float64)
    reliability = compute_reliability(split_halves(rank_activations(r, d)), 2)
    assert (reliability.overlap, reliability.spearman) == (1, pytest.approx(-1))
    assert reliability.correlation == pytest.approx(0.6)
    assert reliability.full_correlation == pytest.approx(1.2 / 1.6)
    equal = rank_activations(r[:, :, :2], torch.ones(2, 1, 2, dtype=torch.float64))
    assert compute_reliability(split_halves(equal), 1).correlation is None


def test_full_correlation_predicts_that_of_two_contrasts():
    """Spearman-Brown of a contrast's halves, against a second contrast of as many other prompts."""
    generator = torch.Generator().manual_seed(0)
    scales = 1 + torch.rand(1, 500, generator=generator, dtype=torch.float64)

    def draw_ranking() -> Ranking:
        d = torch.randn(40, 1, 500, generator=generator, dtype=torch.float64) * scales
        return rank_activations(torch.zeros_like(d), d)

    predicted, correlations, half_correlations = [], [], []
    for _ in range(20):
        first, second = draw_ranking(), draw_ranking()
        reliability = compute_reliability(split_halves(first), 50)
        predicted.append(reliability.full_correlation)
        half_correlations.append(reliability.correlation)
        correlations.append(np.corrcoef(first.scores.flatten(), second.scores.flatten())[0, 1])
    assert np.mean(predicted) == pytest.approx(np.mean(correlations), abs=0.02), "roots, not sums"
    assert np.mean(half_correlations) < np.mean(correlations) - 0.1


def test_save_keeps_the_half(tmp_path):
    ranking, path = rank_activations(*draw_activations()), tmp_path / "a.safetensors"
    ranking.save(path)
    copy = Ranking.load(path)
    assert torch.equal(copy.half.sums, ranking.half.sums)
    assert torch.equal(copy.half.count, ranking.half.count)
    tensors = {"rank": ranking.rank, "half_sums": ranking.half.sums}
    write_tensors(path, tensors, kind="ranking", meta={})
    with pytest.raises(
        SnpatchError, match=r"a\.safetensors: expected both half_sums and half_count or neither, got one"
    ):
        Ranking.load(path)
    with pytest.raises(SnpatchError, match=r"half: expected \[3, 8\], got \[3, 4\]"):
        replace(ranking, half=sum_activations(*draw_activations(neurons=4)))


def test_own_factor_is_the_explained_part_of_least_squares():
    r, d = draw_activations(tokens=30)
    own = sum_activations(r, d).own_factor_changes()
    for layer, neuron in ((0, 0), (2, 7)):
        x, y = r[:, layer, neuron].numpy(), d[:, layer, neuron].numpy()
        (factor,) = np.linalg.lstsq(x[:, None], y, rcond=None)[0]
        assert own[layer, neuron].item() == pytest.approx(((x - factor * x) ** 2).sum())
    changes = (r - d).square().sum(0)
    assert (own <= changes).all()
    scaled = rank_changes(torch.rand(2, 5, dtype=torch.float64) + 0.1, torch.full((2, 5), -0.3, dtype=torch.float64))
    torch.testing.assert_close(scaled.statistics.own_factor_changes(), scaled.statistics.sums[:, 4])
    assert sum_activations(torch.zeros_like(r), d).own_factor_changes().abs().max() == 0


def test_mean_changes_and_rms_equal_those_of_activations():
    r, d = draw_activations()
    statistics = sum_activations(r, d)
    torch.testing.assert_close(statistics.mean_changes(), (d - r).mean(0))
    torch.testing.assert_close(statistics.recipient_rms(), r.square().mean(0).sqrt())
