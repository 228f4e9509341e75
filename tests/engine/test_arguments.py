"""Python arguments of wrong types: errors of one line that name the argument."""

import numpy as np
import pytest
import tiny
import torch

from snpatch import Engine, Patch, Ranking, Sampling, SnpatchError
from snpatch.config import Capacity, EngineConfig
from snpatch.data import load_dataset
from snpatch.patching.patch import Constant, Noise, Scale
from snpatch.ranking.window import Window

SHAPE = (tiny.LAYERS, tiny.NEURONS)
RANKING = Ranking.from_scores(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)))
IDS = [[5, 6]]
NO_INTS = ("3", 3.0, True, None, [3], b"3")
ENGINE = {
    "device": (None, 5, ["cpu"]),
    "dtype": (None, torch.float16),
    "batch_size": ("4", 1.5, True, [4]),
    "token_budget": ("x", 2.0, True),
    "allow_untested": ("no", 1, None),
    "template": (None, 3),
    "backend": (None, 3),
}
CAPACITY = {"streams": ("1", 1.0, True, None), "max_rankings": ("3", 3.0, None), "scales_kv": ("no", 1)}


@pytest.fixture(scope="module")
def engine(zoo):
    with Engine(zoo("llama").folder, zoo("llama").adapters, backend="transformers") as llama_engine:
        yield llama_engine


def check_one_line(call, name):
    with pytest.raises(SnpatchError, match=f"{name}.*(expected|must be|must lie)") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, None, ["1"], "12", [1.5], [True], b"1", {1: 2}, np.array(1), np.array([[1]])])
def test_excluded_layers_of_wrong_type_are_one_line(engine, layers):
    check_one_line(lambda: engine.contrast(IDS, "sft", "dpo", exclude_layers=layers), "exclude_layers")
    check_one_line(lambda: Ranking.from_scores(RANKING.scores, exclude_layers=layers), "exclude_layers")
    check_one_line(lambda: RANKING.filter_layers(layers), "filter_layers")


@pytest.mark.parametrize("layers", [(1,), [1], range(1, 2), {1}, np.array([1]), torch.tensor([1]), (np.int64(1),)])
def test_layers_are_lists_of_whole_numbers(layers):
    assert RANKING.filter_layers(layers).layer_counts(tiny.NEURONS).tolist() == [0, tiny.NEURONS, 0]


@pytest.mark.parametrize(
    ("name", "values"),
    [("method", (["rms"], None, 3)), ("positions", (["prompt"], None, 3)), ("generate_with", (["donor"], None)),
     ("recipient", (["sft"], None, 3)), ("donor", (["dpo"], 3)), ("sampling", ([Sampling()], None))],
)  # fmt: skip
def test_contrast_argument_of_wrong_type_is_one_line(engine, name, values):
    for value in values:
        arguments = {"recipient": "sft", "donor": "dpo", name: value}
        check_one_line(lambda arguments=arguments: engine.contrast(IDS, **arguments), name)


@pytest.mark.parametrize("k", NO_INTS)
def test_number_of_neurons_of_wrong_type_is_one_line(engine, k):
    for call in (
        lambda: engine.capture(IDS, "sft", RANKING, k),
        lambda: RANKING.top(k),
        lambda: RANKING.layer_counts(k),
        lambda: RANKING.top_per_layer(k),
        lambda: RANKING.overlap(RANKING, k),
        lambda: RANKING.intersect(RANKING, k),
    ):
        check_one_line(call, "k")
    check_one_line(lambda: RANKING.random_control(3, seed=k), "seed")
    check_one_line(lambda: Window(0, k), "window: hi")
    if not isinstance(k, list):
        check_one_line(lambda: Patch("sft", "dpo", RANKING, k), "window")
        check_one_line(lambda: Patch("sft", "dpo", RANKING, (0, k)), "window")


def test_numbers_of_numpy_are_whole_numbers(engine):
    for k in (np.int64(3), np.array(3), torch.tensor(3)):
        assert len(RANKING.top(k)) == 3
        assert engine.capture(IDS, "sft", RANKING, k).shape == (1, 3)
        assert Patch("sft", "dpo", RANKING, k).window == Window(0, 3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Constant([1.0]), "constant: values"),
        (lambda: Constant(np.ones((3, 4))), "constant: values"),
        (lambda: Constant(torch.ones(3, 4), mode=3), "constant: mode"),
        (lambda: Noise("1"), "noise: deviation"),
        (lambda: Noise(torch.ones(3, 4), seed=1.5), "noise: seed"),
        (lambda: Scale("2"), "scale: factor"),
        (lambda: Window("0", 5), "window: lo"),
        (lambda: Patch("sft", "dpo", RANKING, 3, positions=True), "positions"),
        (lambda: Patch("sft", "dpo", RANKING, 3, strength="1"), "strength"),
    ],
)
def test_part_of_patch_of_wrong_type_is_one_line(call, name):
    check_one_line(call, name)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({name: value}, name) for name, values in (ENGINE | CAPACITY).items() for value in values]
    + [({"adapters": {"x": value}}, "adapters: x") for value in (None, 5, [None], [["a"]], b"a", {"a": 1})]
    + [({"adapters": value}, "adapters") for value in (["x"], "x", 5)]
    + [({"models": {"x": value}}, "models: x") for value in (None, 5, [1], {"lora": 3})],
    ids=lambda value: ascii(value)[:40],
)
def test_engine_argument_of_wrong_type_is_one_line(fields, name):
    check_one_line(lambda: EngineConfig.of("m", **fields), name)


def test_config_accepts_numbers_of_numpy():
    assert EngineConfig("m", batch_size=np.int64(4)).batch_size == 4
    assert Capacity(max_rankings=np.int32(4)).max_rankings == 4


@pytest.mark.parametrize("shape", [None, (3,), (3.0, 96), "3x96", 3, (3, 96, 1), ("3", "96"), (True, 96)])
def test_shape_of_wrong_type_is_one_line(tmp_path, shape):
    check_one_line(lambda: Ranking.from_order([[0, 1]], shape), "ranking: shape")
    if shape is not None:
        (tmp_path / "r.csv").write_text("layer,neuron\n0,1\n")
        check_one_line(lambda: Ranking.load(tmp_path / "r.csv", shape), "r.csv: shape")
        check_one_line(lambda: Ranking.load(tmp_path / "r.csv", lambda: shape), "r.csv: shape")


@pytest.mark.parametrize("path", [None, 3, b"x", ["a"]])
def test_path_of_wrong_type_is_one_line(path):
    check_one_line(lambda: Ranking.load(path), "ranking: path")
    check_one_line(lambda: load_dataset(path), "source")


def test_arguments_of_data_of_wrong_type_are_one_line(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\na\nb\n")
    for name in ("format", "split", "column", "revision"):
        for value in (3, b"x", ["prompt"]):
            check_one_line(lambda name=name, value=value: load_dataset(path, **{name: value}), name)
    data = load_dataset(path)
    for n in NO_INTS:
        check_one_line(lambda n=n: data.first(n), "first: n")
        check_one_line(lambda n=n: data.sample(n, 0), "sample: n")
        check_one_line(lambda n=n: data.sample(1, n), "sample: seed")
    assert len(data.first(np.int64(1))) == len(data.sample(np.int64(1), np.int64(0))) == 1
