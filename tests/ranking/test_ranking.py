"""Ranking compared with hand-computed orders, counts and correlations."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.op.plan import UNRANKED
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import MOMENTS, Ranking
from snpatch.utils.files import write_tensors

SCORES = torch.tensor([[3.0, 1.0, 4.0], [1.0, 5.0, 9.0]])  # 1.0 twice: layer 0 comes first
N = UNRANKED


def order(ranking: Ranking) -> list[list[int]]:
    return ranking.top(len(ranking)).tolist()


def build_random_ranking(n_layers: int = 3, n_neurons: int = 40, seed: int = 0, **options) -> Ranking:
    scores = torch.rand(n_layers, n_neurons, generator=torch.Generator().manual_seed(seed))
    return Ranking.from_scores(scores, **options)


def line(*neurons: int, width: int = 12) -> Ranking:
    """Return a one-layer ranking of neurons in order of rank."""
    return Ranking.from_order(torch.tensor([[0, neuron] for neuron in neurons]).view(-1, 2), (1, width))


def test_from_scores_orders_by_score_layer_neuron():
    ranking = Ranking.from_scores(SCORES)
    assert ranking.rank.tolist() == [[3, 4, 2], [5, 1, 0]]
    assert order(ranking) == [[1, 2], [1, 1], [0, 2], [0, 0], [0, 1], [1, 0]]
    assert order(Ranking.from_scores(torch.zeros(2, 2))) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert ranking.top(2).tolist() == [[1, 2], [1, 1]]
    assert ranking.layer_counts(3).tolist() == [1, 2]
    assert ranking.top(0).shape == (0, 2)


def test_from_scores_many_ties_keep_order():
    ranking = Ranking.from_scores((torch.arange(3000) % 3).float().view(3, 1000))
    assert order(ranking)[:3] == [[0, 2], [0, 5], [0, 8]]
    assert order(ranking) == sorted(order(ranking), key=lambda n: (-((n[0] * 1000 + n[1]) % 3), n))


@pytest.mark.parametrize(
    ("excluded", "rank"),
    [
        ((-1,), [[1, 2, 0], [N, N, N]]),
        ((0,), [[N, N, N], [2, 1, 0]]),
        ((1, -1), [[1, 2, 0], [N, N, N]]),
        ((0, 1), [[N] * 3, [N] * 3]),
    ],
)
def test_from_scores_excluded_layers_keep_scores(excluded, rank):
    ranking = Ranking.from_scores(SCORES, exclude_layers=excluded)
    assert ranking.rank.tolist() == rank
    assert len(ranking) == sum(r != N for row in rank for r in row)
    assert torch.equal(ranking.scores, SCORES)


def test_set_operations_keep_order():
    first, second = line(5, 3, 8, 1, 0), line(1, 9, 5, 8)
    assert order(first.intersect(second, 3)) == [[0, 5], [0, 1]]
    assert order(first.difference(second, 3)) == [[0, 3], [0, 8], [0, 0]]
    assert order(first.intersect(second, 0)) == []
    assert order(first.difference(second, 0)) == order(first)
    assert first.difference(second, 3).rank.tolist() == [[2, N, N, 0, N, N, N, N, 1, N, N, N]]


@pytest.mark.parametrize("disjoint", [True, False])
def test_per_layer_control_has_counts_of_every_prefix(disjoint):
    safety = build_random_ranking()
    control = safety.random_control(50, seed=1, disjoint=disjoint)
    assert len(control) == 50
    for k in range(51):
        assert torch.equal(control.layer_counts(k), safety.layer_counts(k))
    assert (control.overlap(safety, 50) == 0) == disjoint


@pytest.mark.parametrize(("kind", "layers"), [("last_layer", {2}), ("everywhere", {0, 1, 2})])
@pytest.mark.parametrize("disjoint", [True, False])
def test_control_kind_selects_layers(kind, layers, disjoint):
    safety = build_random_ranking(exclude_layers=[0])
    control = safety.random_control(20, seed=3, kind=kind, disjoint=disjoint)
    assert len(control) == 20
    assert {layer for layer, _ in order(control)} == layers
    assert (control.overlap(safety, 20) == 0) == disjoint


@pytest.mark.parametrize("kind", ["per_layer", "last_layer", "everywhere"])
def test_control_depends_on_seed_alone(kind):
    safety = build_random_ranking()
    torch.manual_seed(0)
    first = safety.random_control(20, seed=4, kind=kind)
    torch.manual_seed(1)
    assert order(safety.random_control(20, seed=4, kind=kind)) == order(first)
    assert order(safety.random_control(20, seed=5, kind=kind)) != order(first)


def test_control_draws_free_neurons_uniformly():
    """One of 9 free neurons, 900 times: about 100 each."""
    neurons = [line(0, width=10).random_control(1, seed=seed).top(1)[0, 1].item() for seed in range(900)]
    counts = [neurons.count(neuron) for neuron in range(10)]
    assert counts[0] == 0
    assert all(60 < count < 140 for count in counts[1:])


def test_control_too_few_neurons_raises():
    half = line(*range(6))
    assert sorted(order(half.random_control(6, seed=0))) == [[0, n] for n in range(6, 12)]
    with pytest.raises(SnpatchError, match=r"expected 7 neurons to draw from in layer 0, got 5"):
        line(*range(7)).random_control(7, seed=0)
    assert len(line(*range(7)).random_control(7, seed=0, disjoint=False)) == 7
    with pytest.raises(SnpatchError, match="expected 41 neurons to draw from in the last layer, got"):
        build_random_ranking().random_control(41, seed=0, kind="last_layer", disjoint=False)
    with pytest.raises(SnpatchError, match="last_layer, everywhere, got 'all'"):
        half.random_control(1, seed=0, kind="all")
    with pytest.raises(SnpatchError, match=r"k: expected 0\.\.6"):
        half.random_control(7, seed=0)


def test_filled_control_takes_all_free_neurons_then_the_windows_own():
    control = line(*range(7)).random_control(7, seed=0, fill_up=True)
    drawn = [neuron for _, neuron in order(control)]
    assert sorted(drawn[:5]) == [7, 8, 9, 10, 11]
    assert set(drawn[5:]) < set(range(7))
    assert control.meta["overlap"] == 2 / 7
    others = {tuple(order(line(*range(7)).random_control(7, seed=seed, fill_up=True))[5]) for seed in range(20)}
    assert len(others) > 3, "the window's own neurons are drawn at random, too"


def test_filled_control_overlaps_only_in_the_layer_that_runs_out():
    window = [[0, 0], [1, 3], [0, 1], [0, 2]]
    ranking = Ranking.from_order(torch.tensor(window), (2, 4))
    control = ranking.random_control(4, seed=0, fill_up=True)
    assert [layer for layer, _ in order(control)] == [0, 1, 0, 0]
    assert [0, 3] in order(control)
    assert [1, 3] not in order(control)
    assert control.meta["overlap"] == 2 / 4
    assert ranking.random_control((1, 2), seed=0, fill_up=True).meta["overlap"] == 0


@pytest.mark.parametrize("kind", ["per_layer", "last_layer", "everywhere"])
def test_filled_control_is_the_disjoint_one_where_neurons_suffice(kind):
    ranking = build_random_ranking()
    for seed, window in enumerate([(0, 0), (0, 13), (20, 39)]):
        disjoint, filled = (ranking.random_control(window, seed=seed, kind=kind, fill_up=f) for f in (False, True))
        assert order(filled) == order(disjoint)
        assert filled.fingerprint == disjoint.fingerprint
        assert filled.meta == disjoint.meta
        assert filled.meta["overlap"] == 0


def test_filled_control_of_all_neurons_is_the_window_itself():
    ranking = build_random_ranking(exclude_layers=[2])
    assert ranking.random_control(80, seed=0, fill_up=True).meta["overlap"] == 1
    everywhere = ranking.random_control(80, seed=0, kind="everywhere", fill_up=True)
    assert everywhere.meta["overlap"] == 40 / 80, "the 40 neurons of the excluded layer are free"
    with pytest.raises(
        NotEnoughNeuronsError, match="expected 41 neurons to draw from in the last layer, got 40"
    ) as error:
        ranking.random_control(41, seed=0, kind="last_layer", fill_up=True)
    assert "disjoint" not in str(error.value), "overlapping draws do not help"


def test_overlapping_control_names_its_overlap():
    control = build_random_ranking().random_control((10, 60), seed=3, disjoint=False)
    ranks = [int(build_random_ranking().rank[tuple(neuron)]) for neuron in order(control)]
    assert control.meta["overlap"] == sum(10 <= rank < 60 for rank in ranks) / 50 > 0


@pytest.mark.parametrize("kind", ["per_layer", "last_layer", "everywhere"])
def test_control_of_window_has_its_size_and_avoids_it(kind):
    ranking = build_random_ranking(n_neurons=20)
    control_ranks = set()
    for seed in range(60):
        control = ranking.random_control((4, 11), seed=seed, kind=kind)
        ranks = {int(ranking.rank[tuple(neuron)]) for neuron in control.top(7).tolist()}
        assert len(control) == 7
        assert not ranks & set(range(4, 11))
        if kind == "per_layer":
            assert torch.equal(control.layer_counts(7), ranking.layer_counts(11) - ranking.layer_counts(4))
        control_ranks |= ranks
    assert control_ranks & set(range(4)), "the neurons before the window may be drawn"


def test_overlap_and_spearman_equal_hand_computed():
    first, second = line(0, 1, 2, 3, 4), line(1, 0, 2, 4, 3)
    assert first.overlap(second, 5) == 1.0
    assert first.spearman(second, 5) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert first.overlap(second, 1) == 0.0
    assert first.overlap(second, 4) == pytest.approx(3 / 4)
    assert first.spearman(line(4, 3, 2, 1, 0), 5) == pytest.approx(-1.0)


def test_spearman_reranks_common_neurons():
    """Rank the neurons that both top 6 contain again before correlating them.

    They are 0, 5, 7. The common neurons have ranks 0, 1, 2 in the first ranking and 1, 0, 2 in the second; their
    ranks 0, 1, 5 and 4, 0, 5 among all neurons would give another correlation.
    """
    first, second = line(0, 5, 1, 2, 3, 7), line(5, 8, 9, 10, 0, 7)
    assert first.overlap(second, 6) == pytest.approx(1 / 2)
    assert first.spearman(second, 6) == pytest.approx(1 - 6 * 2 / (3 * 8))
    with pytest.raises(SnpatchError, match="expected 2 or more neurons in the first 2 of both, got 1"):
        first.spearman(line(5, 8, 9), 2)


def with_everything() -> Ranking:
    moments = {name: torch.randn(2, 3) for name in MOMENTS}
    meta = {"model": "a/b", "tokens": 12, "nested": {"x": [1, 2.5, None, "é"]}}
    return Ranking.from_scores(SCORES, [-1], moments, meta)


@pytest.mark.parametrize("make", [with_everything, lambda: line(3, 1), lambda: line()])
def test_save_load_round_trip(tmp_path, make):
    ranking = make()
    ranking.save(tmp_path / "new" / "r.safetensors")
    copy = Ranking.load(tmp_path / "new" / "r.safetensors")
    assert torch.equal(copy.rank, ranking.rank)
    assert copy.meta == ranking.meta
    assert copy.fingerprint == ranking.fingerprint
    assert (copy.scores is None) == (ranking.scores is None)
    assert ranking.scores is None or torch.equal(copy.scores, ranking.scores)
    assert copy.moments.keys() == ranking.moments.keys()
    assert all(torch.equal(copy.moments[name], ranking.moments[name]) for name in ranking.moments)


def test_fingerprint_depends_on_order():
    assert line(3, 1).fingerprint == line(3, 1).fingerprint
    assert (
        len({line(3, 1).fingerprint, line(1, 3).fingerprint, line(3).fingerprint, line(3, 1, width=13).fingerprint})
        == 4
    )


def test_save_failed_write_keeps_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    line(3, 1).save(path)
    write = Path.write_bytes

    def raise_error(self, data):
        write(self, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", raise_error)
    with pytest.raises(SnpatchError, match=r"r\.safetensors: No space left"):
        line(7, 8).save(path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["r.safetensors"]
    assert order(Ranking.load(path)) == [[0, 3], [0, 1]]


PUBLISHED = (
    SCORES,
    torch.tensor([[1, 2], [1, 1], [0, 2], [0, 0], [0, 1], [1, 0]]),
    *(torch.full((2, 3), value) for value in (1.0, 2.0, 3.0, 4.0)),
)


@pytest.mark.parametrize("container", [tuple, list])
def test_from_published_reads_tuple(tmp_path, container):
    torch.save(container(PUBLISHED), tmp_path / "p.pt")
    ranking = Ranking.from_published(tmp_path / "p.pt")
    assert ranking.rank.tolist() == [[3, 4, 2], [5, 1, 0]]
    assert torch.equal(ranking.scores, SCORES)
    expected = {"donor_mean": 1.0, "donor_std": 2.0, "recipient_mean": 3.0, "recipient_std": 4.0}
    assert {name: value.unique().item() for name, value in ranking.moments.items()} == expected


def test_from_published_pads_missing_layers(tmp_path):
    torch.save(PUBLISHED, tmp_path / "p.pt")
    ranking = Ranking.from_published(tmp_path / "p.pt", n_layers=4)
    assert ranking.rank.tolist() == [[3, 4, 2], [5, 1, 0], [N] * 3, [N] * 3]
    assert len(ranking) == 6
    assert ranking.moments["donor_std"].tolist() == [[2.0] * 3] * 2 + [[0.0] * 3] * 2
    with pytest.raises(SnpatchError, match="expected at most the model's 1 layers, got 2"):
        Ranking.from_published(tmp_path / "p.pt", n_layers=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PUBLISHED[:5], "expected the published 6-tuple"),
        ({"a": SCORES}, "6-tuple, got dict"),
        (b"", r"p\.pt: not a torch file of plain tensors"),
        (b"some text", r"p\.pt: not a torch file of plain tensors"),
        (None, r"p\.pt: no such file"),
    ],
)
def test_from_published_other_pt_file_is_refused(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "p.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "p.pt")
    with pytest.raises(SnpatchError, match=message):
        Ranking.from_published(tmp_path / "p.pt")


def test_load_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save((Evil(), *PUBLISHED[1:]), tmp_path / "p.pt")
    with pytest.raises(SnpatchError, match=r"p\.pt"):
        Ranking.from_published(tmp_path / "p.pt")
    assert not (tmp_path / "ran").exists()


def replace_score(value: float) -> torch.Tensor:
    scores = SCORES.clone()
    scores[1, 0] = value
    return scores


RANK = Ranking.from_scores(SCORES).rank


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ranking.from_scores(replace_score(math.nan)),
            "scores: expected finite values, got .* at layer 1, neuron 0",
        ),
        (
            lambda: Ranking.from_scores(replace_score(math.inf)),
            "scores: expected finite values, got .* at layer 1, neuron 0",
        ),
        (
            lambda: Ranking(RANK, moments={"donor_mean": replace_score(math.nan)}),
            "donor_mean: expected finite values, got nan at layer 1",
        ),
        (lambda: Ranking(RANK, torch.zeros(3, 2)), r"scores: expected \[2, 3\], got \[3, 2\]"),
        (lambda: Ranking(RANK.long()), r"rank: expected \[layers, neurons\] int32"),
        (lambda: Ranking(RANK[0]), r"rank: expected \[layers, neurons\] int32"),
        (lambda: Ranking(RANK + 1), r"rank: expected each of 0\.\.5 once"),
        (lambda: Ranking(RANK.clamp(min=1)), r"rank: expected each of 0\.\.5 once"),
        (lambda: Ranking.from_scores(SCORES, [2]), "exclude_layers: expected a layer in -2..1, got 2"),
        (lambda: Ranking.from_scores(SCORES, [-3]), "exclude_layers: expected a layer in -2..1, got -3"),
        (lambda: Ranking.from_order(torch.tensor([0, 1]), (1, 2)), r"order: expected \[n, 2\]"),
        (lambda: Ranking.from_order({(0, 1): 1}, (1, 2)), "order: expected numbers in a list .*: got a dict"),
        (lambda: Ranking.from_order({(0, 1)}, (1, 2)), "got a set"),
        (lambda: Ranking.from_order((pair for pair in [[0, 1]]), (1, 2)), "got a generator"),
        (lambda: Ranking.from_order([[0, None]], (1, 2)), r"got \[\[0, None\]\]"),
        (lambda: Ranking.from_scores(None), "scores: expected numbers in a list .*: got None"),
        (lambda: Ranking.from_scores([["a"]]), "got <U1"),
        (lambda: Ranking.from_order(torch.tensor([[0, 2]]), (1, 2)), r"expected neurons of \[1, 2\], got one outside"),
        (lambda: Ranking.from_order(torch.tensor([[-1, 0]]), (1, 2)), r"expected neurons of \[1, 2\], got one outside"),
        (lambda: line(3, 3), "expected each neuron once"),
        (lambda: line(3).top(2), r"k: expected 0\.\.1"),
        (lambda: line(3).top(-1), r"k: expected 0\.\.1"),
        (lambda: line(3).overlap(line(3), 0), "overlap: k: expected at least 1"),
        (lambda: line(3).overlap(line(3, width=5), 1), r"expected another ranking of \[1, 12\], got \[1, 5\]"),
        (lambda: line(3).intersect(line(3, width=5), 1), r"expected another ranking of \[1, 12\], got \[1, 5\]"),
        (lambda: Ranking.load("/nowhere/r.safetensors"), r"/nowhere/r\.safetensors: no such file"),
    ],
)
def test_ranking_invalid_arguments_raise(make, message):
    with pytest.raises(SnpatchError, match=message):
        make()


def test_load_file_of_other_kind_is_refused(tmp_path):
    from safetensors.torch import save_file

    snpatch_file, tensors_file, text_file = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_tensors(snpatch_file, {"x": SCORES}, kind="features", meta={})
    save_file({"rank": RANK}, tensors_file)
    text_file.write_text("not safetensors at all")
    for path, message in (
        (snpatch_file, "expected a snpatch ranking, got features"),
        (tensors_file, "another file"),
        (text_file, "expected a ranking of snpatch"),
    ):
        with pytest.raises(SnpatchError, match=message):
            Ranking.load(path)
    write_tensors(snpatch_file, {"x": SCORES}, kind="ranking", meta={})
    with pytest.raises(SnpatchError, match="expected a ranking, got a file of x"):
        Ranking.load(snpatch_file)


def random_statistics(tokens: int = 7) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
    """Statistics of random activations [tokens, layers, neurons] of both models, and these."""
    draw = torch.Generator().manual_seed(3)
    r, d = torch.randn(2, tokens, 3, 5, generator=draw, dtype=torch.float64)
    statistics = Statistics.zeros(3, 5)
    for half in (slice(0, 2), slice(2, None)):
        x, y = r[half], d[half]
        sums = torch.stack([x.sum(0), (x * x).sum(0), y.sum(0), (y * y).sum(0), ((x - y) ** 2).sum(0)], 1)
        statistics.add(sums, torch.full((3,), len(x)))
    return statistics, r, d


def test_rms_equals_statistics_of_activations():
    statistics, r, d = random_statistics()
    ranking = Ranking.from_statistics(statistics)
    torch.testing.assert_close(ranking.scores, ((r - d) ** 2).mean(0).sqrt().float())
    torch.testing.assert_close(ranking.moments["recipient_mean"], r.mean(0).float())
    torch.testing.assert_close(ranking.moments["donor_std"], d.std(0).float())
    assert ranking.meta["method"] == "rms"
    assert torch.equal(ranking.top(1)[0], torch.nonzero(ranking.scores == ranking.scores.max())[0])
    assert "donor_std" not in Ranking.from_statistics(random_statistics(1)[0]).moments
    with pytest.raises(SnpatchError, match="method: expected one of rms, got 'mean'"):
        Ranking.from_statistics(statistics, "mean")
    n_layers = statistics.shape[0]
    with pytest.raises(SnpatchError, match=f"exclude_layers: expected a layer to rank, got all {n_layers} excluded"):
        Ranking.from_statistics(statistics, exclude_layers=range(n_layers))


def test_save_keeps_statistics(tmp_path):
    """Other scores can then be computed without reading a text again."""
    ranking = Ranking.from_statistics(random_statistics()[0], exclude_layers=(-1,), meta={"tokens": 7})
    ranking.save(tmp_path / "a.safetensors")
    copy = Ranking.load(tmp_path / "a.safetensors")
    assert torch.equal(copy.statistics.sums, ranking.statistics.sums)
    assert torch.equal(copy.statistics.count, ranking.statistics.count)
    assert torch.equal(Ranking.from_statistics(copy.statistics, exclude_layers=(-1,)).rank, ranking.rank)
    assert Ranking.load(tmp_path / "a.safetensors").meta == ranking.meta
    write_tensors(tmp_path / "b.safetensors", {"rank": ranking.rank, "sums": ranking.statistics.sums},
                  kind="ranking", meta={})  # fmt: skip
    with pytest.raises(SnpatchError, match="expected both sums and count or neither"):
        Ranking.load(tmp_path / "b.safetensors")
    with pytest.raises(SnpatchError, match=r"statistics: expected \[2, 3\], got \[3, 5\]"):
        Ranking(Ranking.from_scores(SCORES).rank, statistics=ranking.statistics)


def test_load_computes_missing_moments(tmp_path):
    ranking, path = Ranking.from_statistics(random_statistics()[0]), tmp_path / "a.safetensors"
    replace(ranking, moments={}).save(path)
    copy = Ranking.load(path)
    assert set(copy.moments) == set(MOMENTS)
    assert all(torch.equal(copy.moments[name], ranking.moments[name]) for name in MOMENTS)


@pytest.mark.parametrize(
    ("sums", "count", "message"),
    [
        (torch.zeros(3, 4, 5).double(), torch.zeros(3).long(), r"expected sums \[layers, 5, neurons\]"),
        (torch.zeros(3, 5, 5), torch.zeros(3).long(), "expected float64 sums and int64 counts"),
        (torch.full((3, 5, 5), torch.nan).double(), torch.zeros(3).long(), "NaN or infinite"),
    ],
)
def test_statistics_invalid_are_refused(sums, count, message):
    with pytest.raises(SnpatchError, match=message):
        Statistics(sums, count)


def test_statistics_different_token_counts_raise():
    with pytest.raises(SnpatchError, match=r"different numbers of tokens: \[1, 2, 2\]"):
        Ranking.from_statistics(Statistics(torch.zeros(3, 5, 5).double(), torch.tensor([1, 2, 2])))


def test_filter_layers_keeps_order():
    ranking = Ranking.from_scores(SCORES)
    assert order(ranking.filter_layers([0])) == [[0, 2], [0, 0], [0, 1]]
    assert order(ranking.filter_layers(range(-1, 0))) == [[1, 2], [1, 1], [1, 0]]
    assert order(ranking.filter_layers([1, 0, -1])) == order(ranking)
    assert ranking.filter_layers([1]).meta["filter_layers"] == [1]
    assert torch.equal(ranking.filter_layers([0]).scores, SCORES)
    with pytest.raises(SnpatchError, match=r"filter_layers: expected a layer in -2\.\.1, got 2"):
        ranking.filter_layers([2])


def test_top_per_layer_keeps_order():
    ranking = Ranking.from_scores(SCORES)
    assert order(ranking.top_per_layer(1)) == [[1, 2], [0, 2]]
    assert order(ranking.top_per_layer(2)) == [[1, 2], [1, 1], [0, 2], [0, 0]]
    assert order(ranking.top_per_layer(9)) == order(ranking)
    with pytest.raises(SnpatchError, match="top_per_layer: k: expected at least 1, got 0"):
        ranking.top_per_layer(0)


@pytest.mark.parametrize("name", ["r.csv", "r.json", "r.npy", "r.pt"])
def test_save_under_the_suffix_of_another_format_raises(tmp_path, name):
    ranking = Ranking.from_scores(torch.rand(2, 3))
    with pytest.raises(SnpatchError, match=r"expected a name that ends in \.safetensors, got \.\w+"):
        ranking.save(tmp_path / name)
    ranking.save(tmp_path / "r.safetensors")
    assert Ranking.load(tmp_path / "r.safetensors").fingerprint == ranking.fingerprint
