"""Rankings from public files, lists and arrays: the same neurons, or an error of one line."""

import gzip
import json

import numpy as np
import pytest
import torch

from snpatch.errors import SnpatchError
from snpatch.ranking.ranking import Ranking
from snpatch.utils.files import write_tensors

SHAPE = (3, 4)
ORDER = [[1, 2], [0, 3], [2, 0]]
SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.8, 0.2, 0.7, 0.5]])
BY_SCORE = [[0, 1], [1, 0], [1, 2]]


def table(rows, header="layer,neuron"):
    return f"{header}\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def save_value(path, value):
    """Write a file by its suffix."""
    if path.suffix == ".npy":
        np.save(path, value)
    elif path.suffix == ".npz":
        np.savez(path, **value)
    elif path.suffix == ".pt":
        torch.save(value, path)
    elif isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


NAMED = [{"Layer": layer, "Neuron": neuron} for layer, neuron in ORDER]
LISTS = {
    "csv": ("r.csv", table(ORDER)),
    "csv with a mark and an index": ("r.CSV", "\ufeff" + table([("i", *o) for o in ORDER], ",Layer,neuron_idx")),
    "csv packed": ("r.csv.gz", gzip.compress(table(ORDER).encode())),
    "csv by score": ("r.csv", table([(2, 0, 0.1), (1, 2, 0.9), (0, 3, 0.5)], "layer,neuron,score")),
    "csv by rank": ("r.csv", table([(2, 0, 3), (1, 2, 1), (0, 3, 2)], "layer,neuron,rank")),
    "json pairs": ("r.json", ORDER),
    "json triples": ("r.json", [[2, 0, 0.1], [1, 2, 0.9], [0, 3, 0.5]]),
    "json objects": ("r.json", NAMED),
    "json lines": ("r.jsonl", "".join(json.dumps(row) + "\n" for row in NAMED)),
    "json lines of lists": ("r.jsonl", "".join(json.dumps(row) + "\n" for row in ORDER)),
    "npy of floats": ("r.npy", np.array(ORDER, dtype=float)),
    "json table": ("r.json", {"neurons": ORDER, "shape": SHAPE}),
    "json table of objects": ("r.json", {"model": "x", "neurons": NAMED}),
    "json as apple has it": ("r.json", [{"gradient_rank": i, "layer": n, "feature": f, "score": 1.0 / (1 + i)}
                                        for i, (n, f) in enumerate(ORDER)]),
    "json columns": ("r.json", {"layer": [1, 0, 2], "neuron": [2, 3, 0]}),
    "npy": ("r.npy", np.array(ORDER, dtype=np.uint16)),
    "npz": ("r.npz", {"order": np.array(ORDER)}),
    "npz columns": ("r.npz", {"layer": np.array([2, 1, 0]), "neuron": np.array([0, 2, 3]),
                              "score": np.array([0.1, 0.9, 0.5])}),
    "torch": ("r.pt", torch.tensor(ORDER)),
    "torch list": ("r.pt", ORDER),
    "torch table": ("r.pt", {"neurons": torch.tensor(ORDER)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_load_reads_list_of_neurons(tmp_path, name):
    file, value = LISTS[name]
    path = save_value(tmp_path / file, value)
    ranking = Ranking.load(path, SHAPE)
    assert ranking.top(3).tolist() == ORDER
    assert (len(ranking), ranking.shape, ranking.meta["imported"]) == (3, SHAPE, file)
    assert Ranking.load(path, lambda: SHAPE).fingerprint == ranking.fingerprint


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("s.npy", SCORES.numpy()),
        ("s.npy", SCORES.numpy().astype(np.float16)),
        ("s.npz", {"scores": SCORES.numpy(), "model": np.array("x")}),
        ("s.npz", {"arr_0": SCORES.numpy()}),
        ("s.json", {"change_scores": SCORES.tolist(), "method": "rms"}),
        ("s.json", SCORES.tolist()),
        ("s.json", {"scores": SCORES.tolist()}),
        ("s.pt", SCORES.bfloat16()),
        ("s.pt", {"scores": SCORES}),
    ],
)
def test_load_scores_of_all_neurons(tmp_path, file, value, caplog):
    path = save_value(tmp_path / file, value)
    assert Ranking.load(path).top(3).tolist() == BY_SCORE
    padded = Ranking.load(path, SHAPE)  # as published, the last layers are missing
    assert "scores of 2 of 3 layers; the others are not ranked" in caplog.text
    assert (padded.top(3).tolist(), padded.shape, len(padded)) == (BY_SCORE, SHAPE, 8)
    assert padded.meta["excluded_layers"] == [2]
    for shape in ((1, 4), (2, 5)):
        with pytest.raises(SnpatchError, match=r"expected scores of .*, got \[2, 4\]"):
            Ranking.load(path, shape)


RANKS = np.array([[7, 0, 5, 4], [1, 6, 2, 3]])  # of SCORES
OTHERS = [*BY_SCORE, [1, 3], [0, 3], [0, 2], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("r.npz", {"rank": RANKS}),
        ("r.npz", {"rank": RANKS.astype(float)}),
        ("r.npz", {"Ranks": RANKS + 1.0}),
        ("r.pt", {"rank": torch.tensor(RANKS).float()}),
        ("r.json", {"rank": RANKS.tolist(), "shape": [2, 4]}),
        ("r.json", {"rank": RANKS.astype(float).tolist()}),
    ],
)
def test_load_ranks_of_all_neurons_is_smallest_first(tmp_path, file, value):
    path = save_value(tmp_path / file, value)
    assert Ranking.load(path).top(8).tolist() == OTHERS
    assert Ranking.load(path, (2, 4)).shape == (2, 4)
    if "shape" not in value:
        assert Ranking.load(path, SHAPE).top(8).tolist() == OTHERS
    with pytest.raises(SnpatchError, match=r"r\..*\[2, 4\]"):
        Ranking.load(path, (2, 5))


def test_load_rank_of_own_ranking_keeps_unranked_neurons(tmp_path):
    own = Ranking.from_order(ORDER, SHAPE)
    path = save_value(tmp_path / "r.npz", {"rank": own.rank.numpy()})
    assert Ranking.load(path).fingerprint == own.fingerprint


COLUMNS = {"layer": [2, 1, 0], "neuron": [0, 2, 3]}


@pytest.mark.parametrize("file", ["r.csv", "r.jsonl", "r.json", "r.npz", "r.pt"])
@pytest.mark.parametrize(
    ("name", "values"),
    [("score", [0.1, 0.9, 0.5]), ("scores", [0.1, 0.9, 0.5]), ("Importance", [0.1, 0.9, 0.5]),
     ("change-score", [0.1, 0.9, 0.5]), ("rank", [2, 0, 1]), ("ranks", [3.0, 1.0, 2.0])],
)  # fmt: skip
def test_load_columns_and_rows_are_ordered_by_one_rule(tmp_path, file, name, values):
    path = save_table(tmp_path / file, {**COLUMNS, name: values, "index": [0, 1, 2]})
    assert Ranking.load(path, SHAPE).top(3).tolist() == ORDER


@pytest.mark.parametrize("file", ["r.csv", "r.jsonl", "r.json", "r.npz", "r.pt"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"effect": [0.1, 0.9, 0.5]}, "got the columns layer, neuron, effect. Rename .* remove the others: effect"),
        ({"delta": [0.1, 0.9, 0.5]}, "delta"),
        ({"neuron_rank": [2, 0, 1]}, "neuron_rank"),
        ({"selected": [1, 0, 1], "score": [0.1, 0.9, 0.5]}, "remove the others: selected"),
        ({"gradient_rank": [2, 0, 1]}, "gradient_rank"),
        ({"model": [1, 1, 2]}, "model"),
        ({"score": [0.1, 0.9, 0.5], "importance": [3, 1, 2]}, "expected one score, got the columns score, importance"),
        ({"layer_idx": [0, 1, 2]}, "expected one layer, got the columns layer, layer_idx"),
        ({"Neuron": [0, 1, 2]}, "expected one neuron, got the columns neuron, Neuron"),
        ({"rank": [0, 1, 2], "score": [0.1, 0.9, 0.5]}, "expected rank and score to give one order"),
        ({"rank": [0, 1, 1]}, "expected each rank once"),
    ],
)
def test_load_columns_that_are_not_used_are_one_line(tmp_path, file, columns, message):
    path = save_table(tmp_path / file, COLUMNS | columns)
    with pytest.raises(SnpatchError, match=rf"{file}.*{message}") as caught:
        Ranking.load(path, SHAPE)
    assert "\n" not in str(caught.value)


def save_table(path, columns):
    """Write columns: as rows into CSV and JSONL files, as columns into others."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".csv":
        return save_value(path, table([row.values() for row in rows], ",".join(columns)))
    if path.suffix == ".jsonl":
        return save_value(path, "".join(json.dumps(row) + "\n" for row in rows))
    convert = {".npz": np.array, ".pt": torch.tensor}.get(path.suffix, list)
    return save_value(path, {name: convert(values) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("r.json", {"neurons": ORDER, "shape": [2, 4]}),
        ("r.json", {"scores": SCORES.tolist(), "shape": [2, 4]}),
        ("r.npz", {"rank": RANKS, "shape": np.array([2, 4])}),
        ("r.npz", {"layer": np.array([0]), "neuron": np.array([1]), "shape": np.array([2, 4])}),
    ],
)
def test_load_of_other_shape_than_model_is_one_line(tmp_path, file, value):
    path = save_value(tmp_path / file, value)
    for shape in (SHAPE, lambda: SHAPE):
        with pytest.raises(SnpatchError, match=rf"{file}: shape: expected \[3, 4\], the model's, got \[2, 4\]"):
            Ranking.load(path, shape)


def test_load_own_file_of_other_shape_is_one_line(tmp_path):
    Ranking.from_scores(SCORES).save(tmp_path / "own.safetensors")
    with pytest.raises(SnpatchError, match=r"own.safetensors: expected a ranking of \[3, 4\], the model, got \[2, 4\]"):
        Ranking.load(tmp_path / "own.safetensors", SHAPE)


def test_load_damaged_ranking_names_file(tmp_path):
    own, published = tmp_path / "own.safetensors", tmp_path / "p.pt"
    scores = torch.full((2, 4), torch.nan)
    tensors = {"rank": Ranking.from_scores(SCORES).rank, "scores": scores}
    write_tensors(own, tensors, kind="ranking", meta={})
    save_value(published, (SCORES, torch.tensor([[5, 0]]), SCORES, SCORES, SCORES, SCORES))
    for path, message in ((own, "scores: expected finite values"), (published, "order: expected neurons of")):
        with pytest.raises(SnpatchError, match=rf"{path.name}: ranking: {message}"):
            Ranking.load(path)


def test_load_own_file_with_any_suffix(tmp_path):
    ranking = Ranking.from_scores(SCORES)
    ranking.save(tmp_path / "safety.v2")
    assert Ranking.load(tmp_path / "safety.v2").fingerprint == ranking.fingerprint


def test_load_reads_published_and_own_files(tmp_path):
    order = torch.tensor(BY_SCORE)
    save_value(tmp_path / "p.pt", (SCORES, order, SCORES, SCORES, SCORES, SCORES))
    ranking = Ranking.load(tmp_path / "p.pt", SHAPE)
    assert (ranking.top(3).tolist(), ranking.shape) == (BY_SCORE, SHAPE)
    assert set(ranking.moments) == {"donor_mean", "donor_std", "recipient_mean", "recipient_std"}
    ranking.save(tmp_path / "own.safetensors")
    assert Ranking.load(tmp_path / "own.safetensors", SHAPE).fingerprint == ranking.fingerprint


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("r.csv", "a,b\n1,2\n", r"r\.csv: expected the columns layer, neuron, got a, b"),
        ("r.csv", table([(0, 1.9)]), r"r\.csv, line 2: neuron: expected a whole number, got '1.9'"),
        ("r.csv", table([(0, "x")]), "line 2: neuron: expected a whole number, got 'x'"),
        ("r.csv", table([(0, 1, "nan")], "layer,neuron,score"), "line 2: score: expected a finite number, got 'nan'"),
        ("r.csv", table([(0, 1, 1), (0, 2, 1)], "layer,neuron,rank"), "expected each rank once"),
        ("r.csv", table([]), "expected neurons, got an empty file"),
        ("r.csv", table([(0, 1), (0, 1)]), "expected each neuron once"),
        ("r.csv", table([(0, 4)]), r"expected neurons of \[3, 4\], got one outside"),
        ("r.json", [[0, 1.5], [1, 2]], "expected scores of"),
        ("r.json", [[0, 1, 2, 3]], "got integers"),
        ("r.json", [[0, 1], [2]], "expected numbers in a list of equal rows"),
        ("r.json", [[0, True]], "expected numbers"),
        ("r.json", {"0": [1, 2], "1": [3]}, "got a table of 0, 1"),
        ("r.json", {"qwen": NAMED, "llama": NAMED}, r"got a table of qwen, llama\. Write one of its lists into a file"),
        ("r.json", [{"layer": 0, "neuron": 1.9}], "item 1: neuron: expected a whole number, got 1.9"),
        ("r.json", [{"layer": 0}], "item 1: neuron is missing|expected"),
        ("r.json", "nothing", "not JSON"),
        ("r.csv", table([(2**70, 1)]), "r.csv, line 2: layer: expected a whole number, got '1180591620717411303424'"),
        ("r.csv", table([(0, 1, "9" * 400)], "layer,neuron,score"), "r.csv, line 2: score: expected a finite number"),
        ("r.json", [[2**70, 1]], "r.json: expected numbers"),
        ("r.json", [[2**63, 1]], "r.json: .*outside"),
        ("r.json", [{"layer": 0, "neuron": 1, "score": 10**400}], "item 1: score: expected a number, got 1000"),
        ("r.json", [{"layer": 0, "neuron": 1, "rank": 10**400}], "item 1: rank: expected a number, got 1000"),
        ("r.json", [{"layer": 0, "neuron": 2**63}], "item 1: neuron: expected a whole number"),
        ("r.json", {"layer": [0], "neuron": [1], "score": [10**400]}, "score: expected numbers"),
        ("r.npy", np.array([[2**64 - 1, 1]], dtype=np.uint64), "int64 cannot hold"),
        ("r.npy", np.zeros((0, 2), int), "r.npy: expected neurons, got an empty file"),
        ("r.npy", np.zeros((0, 4)), "r.npy: expected neurons, got an empty file"),
        ("r.json", {"layer": [], "neuron": []}, "r.json: expected neurons, got an empty file"),
        ("r.npy", SCORES.numpy() > 0.5, "r.npy: expected numbers .* got bool"),
        ("r.pt", SCORES > 0.5, r"r.pt: expected numbers .* got torch.bool"),
        ("r.pt", SCORES.to(torch.complex64), r"r.pt: expected numbers .* got torch.complex64"),
        ("r.npy", np.full((2, 4), np.nan), r"r.npy: .*expected finite values"),
        ("r.npy", RANKS.astype(float), r"r.npy: expected scores, got numbers that may be ranks.* Name them"),
        ("r.npz", {"x": SCORES.numpy()}, r"got numbers \[2, 4\] under x. Name them scores or rank"),
        ("r.npz", {"scores": SCORES.numpy(), "mean": SCORES.numpy()}, "got a table of scores, mean"),
        ("r.json", {"neurons": ORDER, "importance": [0.1, 0.9, 0.5]}, "got a table of neurons, importance"),
        ("r.json", {"model": "x", "neurons": NAMED, "importance": [1, 2, 3]}, "got a table of neurons, importance"),
        ("r.json", {"neurons": ORDER, "one_based": True}, "got a table of neurons, one_based"),
        ("r.npz", {"rank": np.array([[0.0, np.nan]])}, "expected finite values of rank"),
        ("r.npz", {"rank": np.array([[0.5, 0.5]])}, "expected each rank once"),
        ("r.tsv", "layer\tneuron\n0\t1\n", r"r.tsv: expected a ranking of snpatch .* or one in .csv"),
        ("r.jsonl", '{"layer": 0, "neuron": 1}\n{"layer": 0}\n', "line 2: neuron is missing"),
        ("r.jsonl", "[0, 5]\n[1, 7, 0.9]\n", "expected numbers in a list of equal rows"),
        ("r.npy", np.array(["a"]), "expected numbers"),
        ("r.npy", np.array([{"a": 1}], dtype=object), "not a NumPy file of plain numbers"),
        ("r.npz", {"a": np.ones(2), "b": np.ones(2)}, "got a table of a, b"),
        ("r.pt", torch.ones(3), r"got \[3\]"),
        ("r.pt", "words", "expected numbers"),
        ("r.txt", "0 1", r"r.txt: expected a ranking of snpatch .* or one in .csv"),
        ("r.safetensors", "0 1", "r.safetensors: not a safetensors file"),
    ],
)
def test_load_invalid_file_is_one_line(tmp_path, file, value, message):
    with pytest.raises(SnpatchError, match=message) as caught:
        Ranking.load(save_value(tmp_path / file, value), SHAPE)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("file", ["r.pt", "r.npy"])
def test_load_does_not_run_pickles(tmp_path, capsys, file):
    save_value(tmp_path / file, np.array([Evil()], dtype=object) if file == "r.npy" else Evil())
    with pytest.raises(SnpatchError):
        Ranking.load(tmp_path / file)
    assert capsys.readouterr().out == ""


def test_load_array_larger_than_file_is_one_line(tmp_path):
    np.save(tmp_path / "r.npy", np.ones((2, 4)))
    content = (tmp_path / "r.npy").read_bytes()
    (tmp_path / "r.npy").write_bytes(content.replace(b"(2, 4), }       ", b"(99999999, 99), }"[:16]))
    with pytest.raises(SnpatchError, match="not a NumPy file"):
        Ranking.load(tmp_path / "r.npy")
    (tmp_path / "r.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(SnpatchError, match="not a NumPy file"):
        Ranking.load(tmp_path / "r.npz")


def test_load_missing_file_or_shape_is_one_line(tmp_path):
    for name in ("r.csv", "r.npy", "r.pt", "r.json", "r.safetensors"):
        with pytest.raises(SnpatchError, match="no such file"):
            Ranking.load(tmp_path / name)
    with pytest.raises(SnpatchError, match=r"r\.csv: expected a shape for a list of neurons"):
        Ranking.load(save_value(tmp_path / "r.csv", table(ORDER)))


# ---- lists and arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [ORDER, [tuple(row) for row in ORDER], np.array(ORDER), np.array(ORDER, dtype=np.uint32), torch.tensor(ORDER),
     torch.tensor(ORDER, dtype=torch.int32), [np.array(row) for row in ORDER]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_from_order_accepts_lists_arrays_tensors(order):
    assert Ranking.from_order(order, SHAPE).top(3).tolist() == ORDER


@pytest.mark.parametrize("scores", [SCORES, SCORES.tolist(), SCORES.numpy(), SCORES.numpy().astype(np.float64)])
def test_from_scores_accepts_lists_arrays_tensors(scores):
    ranking = Ranking.from_scores(scores)
    assert ranking.top(3).tolist() == BY_SCORE
    assert "tied" not in ranking.meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranking.from_order([[0, 1.9], [1, 2.0]], SHAPE), r"order: expected .* got torch\.float64"),
        (lambda: Ranking.from_order(torch.tensor([[0, 1.9]]), SHAPE), r"order: expected .* got torch\.float32"),
        (lambda: Ranking.from_order([[0, True]], SHAPE), "order: expected numbers"),
        (lambda: Ranking.from_order([[0, "1"]], SHAPE), "order: expected numbers"),
        (lambda: Ranking.from_order([[0], [1, 2]], SHAPE), "order: expected numbers"),
        (lambda: Ranking.from_order(None, SHAPE), "order: expected numbers"),
        (lambda: Ranking.from_order([3, 4], SHAPE), r"order: expected \[n, 2\]"),
        (lambda: Ranking.from_scores([0.5, 0.25]), r"scores: expected \[layers, neurons\], got \[2\]"),
        (lambda: Ranking.from_scores(torch.rand(8)), r"scores: expected \[layers, neurons\], got \[8\]"),
        (lambda: Ranking.from_scores([["a"]]), "scores: expected numbers"),
        (lambda: Ranking.from_scores(None), "scores: expected numbers"),
        (lambda: Ranking.from_scores(np.ma.masked_array(SCORES, SCORES > 0.5)), "got a masked array. Fill it"),
        (lambda: Ranking.from_order(np.ma.masked_array(ORDER, False), SHAPE), "got a masked array. Fill it"),
        (lambda: Ranking.from_scores(SCORES > 0.5), "scores: expected numbers .* got torch.bool"),
    ],
)  # fmt: skip
def test_from_order_or_scores_invalid_is_one_line(make, message):
    with pytest.raises(SnpatchError, match=message):
        make()


def test_ties_are_counted_in_meta(tmp_path):
    assert Ranking.from_scores([[1.0, 2.0, 2.0], [2.0, 1.0, 0.0]]).meta["tied"] == 3
    path = save_value(tmp_path / "r.csv", table([(0, 1, 0.5), (0, 2, 0.5)], "layer,neuron,score"))
    assert Ranking.load(path, SHAPE).meta["tied"] == 1
