"""Dtype and finiteness checks of all tensors from files, in the dtype in which they are used."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from snpatch.errors import SnpatchError
from snpatch.models.adapters import load_adapters
from snpatch.models.checkpoint import iter_finite
from snpatch.models.lora import load_lora, merge_loras
from snpatch.models.weights import open_weights
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.ranking.ranking import Ranking
from snpatch.utils.files import read_checkpoint, read_state, write_tensors
from snpatch.utils.tensors import check_tensor

WIDTHS = {"down_proj": 4}
DOWN = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"
WRONG = (torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
RANK = torch.arange(6, dtype=torch.int32).view(2, 3)


def ia3(folder, tensor, suffix="safetensors"):
    """Return an IA3 folder of one layer."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {DOWN.format(0): tensor}
    path = folder / f"adapter_model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    return folder


def lora(folder, a, b, **config):
    """Return a LoRA folder on the weight `w.weight`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}))
    tensors = {f"base_model.model.w.lora_{side}.weight": matrix for side, matrix in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", WRONG)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_adapter_of_wrong_dtype_is_rejected(tmp_path, dtype, suffix):
    folder = ia3(tmp_path / "a", torch.ones(1, 4).to(dtype), suffix)
    with pytest.raises(SnpatchError, match=rf"layers\.0\.mlp\.down_proj\.ia3_l: expected .*float32.*, got {dtype}"):
        load_adapters(folder, 1, WIDTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter_of_allowed_dtype_becomes_float32(tmp_path, dtype):
    scales = load_adapters(ia3(tmp_path / "a", torch.full((1, 4), 1.5, dtype=dtype)), 1, WIDTHS)
    assert torch.equal(scales.vectors["down_proj"], torch.full((1, 4), 1.5))


def test_stacked_adapters_that_overflow_are_rejected(tmp_path):
    adapters = [ia3(tmp_path / name, torch.full((1, 4), 1e30)) for name in "ab"]
    with pytest.raises(SnpatchError, match=r"stacked adapters: down_proj holds NaN or infinity: .*float32, got inf"):
        load_adapters(adapters, 1, WIDTHS)


@pytest.mark.parametrize("dtype", WRONG)
def test_lora_of_wrong_dtype_is_rejected(tmp_path, dtype):
    folder = lora(tmp_path / "a", torch.ones(1, 2), torch.ones(2, 1).to(dtype))
    with pytest.raises(SnpatchError, match=rf"w\.lora_B\.weight: expected .*, got {dtype}"):
        load_lora(folder)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 300.0), (torch.bfloat16, 1.844e19), (torch.float32, 1e20)]
)
def test_lora_with_overflowing_merge_is_rejected(tmp_path, dtype, value):
    folder = lora(tmp_path / "a", torch.full((1, 2), value), torch.full((2, 1), value))
    with pytest.raises(SnpatchError, match=f"w.weight: the merged weight overflows in {dtype}"):
        dict(merge_loras([("w.weight", torch.ones(2, 2, dtype=dtype))], [folder]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": [1]}, r"r: expected a finite number, got \[1\]"),
        ({"lora_alpha": "1"}, "lora_alpha: expected a finite number, got '1'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"alpha_pattern": {"w": float("inf")}}, "alpha_pattern 'w': expected a finite number, got inf"),
        ({"rank_pattern": [1]}, r"rank_pattern: expected an object, got \[1\]"),
        ({"r": 0}, "has rank 1, its config says 0"),
    ],
)
def test_lora_config_without_numbers_is_rejected(tmp_path, config, message):
    with pytest.raises(SnpatchError, match=message):
        load_lora(lora(tmp_path / "a", torch.ones(1, 2), torch.ones(2, 1), **config))


@pytest.mark.parametrize("name", ["scores", "recipient_mean", "donor_std"])
@pytest.mark.parametrize("dtype", [torch.float16, *WRONG])
def test_ranking_of_wrong_dtype_is_rejected(tmp_path, name, dtype):
    tensor = torch.ones(2, 3).to(dtype)
    write_tensors(tmp_path / "r.safetensors", {"rank": RANK, name: tensor}, kind="ranking", meta={})
    for make in (
        lambda: Ranking.load(tmp_path / "r.safetensors"),
        lambda: Ranking(RANK, **({"scores": tensor} if name == "scores" else {"moments": {name: tensor}})),
    ):
        with pytest.raises(SnpatchError, match=f"ranking: {name}: expected a tensor of torch.float32, got {dtype}"):
            make()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_scores_of_wrong_dtype_are_rejected(dtype):
    with pytest.raises(SnpatchError, match=r"ranking: scores: expected (a tensor of|numbers)"):
        Ranking.from_scores(torch.ones(2, 3).to(dtype))


def test_scores_that_overflow_float32_are_rejected():
    with pytest.raises(SnpatchError, match=r"scores: expected finite values, got .* at layer 0, neuron 0"):
        Ranking.from_scores(torch.full((2, 3), 1e300, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sums", "count", "message"),
    [
        (torch.zeros(2, 5, 3).double(), torch.tensor([4, -4]), "count: expected numbers of tokens, got -4"),
        (torch.zeros(2, 5, 3).double(), torch.tensor(4), "count \\[layers\\], got"),
        (torch.zeros(0, 5, 3).double(), torch.zeros(0, dtype=torch.int64), "count \\[layers\\], got"),
        (torch.full((2, 5, 3), torch.inf).double(), torch.tensor([4, 4]), "NaN or infinite"),
    ],
)
def test_statistics_without_tokens_or_numbers_are_rejected(tmp_path, sums, count, message):
    write_tensors(tmp_path / "r", {"rank": RANK, "sums": sums, "count": count}, kind="ranking", meta={})
    for make in (lambda: Statistics(sums, count), lambda: Ranking.load(tmp_path / "r")):
        with pytest.raises(SnpatchError, match=message):
            make()


def test_sums_whose_mean_overflows_float32_are_rejected(tmp_path):
    tensors = {"sums": torch.full((2, 5, 3), 1e300, dtype=torch.float64), "count": torch.tensor([2, 2])}
    write_tensors(tmp_path / "r", {"rank": RANK, **tensors}, kind="ranking", meta={})
    with pytest.raises(SnpatchError, match=r"recipient_mean: expected finite values, got .* at layer 0, neuron 0"):
        Ranking.load(tmp_path / "r")


@pytest.mark.parametrize(
    ("weight", "dtype", "message"),
    [
        (torch.full((2,), 1e5), torch.float16, "w holds NaN or infinity in torch.float16"),
        (torch.full((2,), 3.4e38), torch.bfloat16, "w holds NaN or infinity in torch.bfloat16"),
        (torch.full((2,), torch.nan), None, "w holds NaN or infinity$"),
        (torch.ones(2, dtype=torch.complex64), None, "w: expected real numbers, got torch.complex64"),
    ],
)
def test_weights_not_finite_in_used_dtype_are_rejected(weight, dtype, message):
    with pytest.raises(SnpatchError, match=message):
        list(iter_finite([("w", weight)], "m", dtype))


@pytest.mark.parametrize(
    "value", [3, [1.0], torch.ones(2).to_sparse(), torch.ones(2, device="meta"), None], ids=lambda v: type(v).__name__
)
def test_non_dense_tensors_are_rejected(value):
    with pytest.raises(SnpatchError, match=r"x: expected a tensor of torch\.float32, got"):
        check_tensor(value, "x", torch.float32)


# ---- torch files ----------------------------------------------------------------------------------------------------


def test_expanded_tensors_are_rejected_before_allocation(tmp_path):
    """Each asks for 200 GB."""
    wide = torch.zeros(1).expand(50_000, 1_000_000)
    torch.save((wide, torch.zeros(1, 2).long(), wide, wide, wide, wide), tmp_path / "r.pt")
    assert (tmp_path / "r.pt").stat().st_size < 10_000
    with pytest.raises(SnpatchError, match=r"a tensor of \[50000, 1000000\] is larger than what the file holds"):
        Ranking.from_published(tmp_path / "r.pt")


def test_compressed_torch_file_is_rejected(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as torch_file,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as compressed_file,
    ):
        for entry in torch_file.infolist():
            compressed_file.writestr(entry.filename, torch_file.read(entry))
    assert torch.equal(read_state(tmp_path / "a.pt")["w"], torch.zeros(1_000_000))
    with pytest.raises(SnpatchError, match="not a torch file of plain tensors"):
        read_state(tmp_path / "b.pt")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {3: torch.ones(2)}, 5])
def test_checkpoint_without_named_tensors_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SnpatchError, match="expected tensors by name"):
        open_weights(tmp_path)


def test_nested_containers_are_read_once(tmp_path):
    """2^40 places, of which each is looked at once."""
    content = [torch.ones(2)]
    for _ in range(40):
        content = [content, content]
    torch.save(content, tmp_path / "a.pt")
    assert len(read_checkpoint(tmp_path / "a.pt")) == 2


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_published_ranking_of_wrong_dtype_is_rejected(tmp_path, kind):
    ones = torch.ones(1, 2)
    torch.save((ones, torch.zeros(1, 2).long(), ones, ones, ones.to(kind), ones), tmp_path / "r.pt")
    with pytest.raises(SnpatchError, match=r"r\.pt: tensor 4: expected a tensor of"):
        Ranking.from_published(tmp_path / "r.pt")


def test_safetensors_header_above_limit_raises_one_line_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    for load in (lambda: read_state(path), lambda: Ranking.load(path), lambda: open_weights(tmp_path)):
        with pytest.raises(SnpatchError, match="not a safetensors file"):
            load()


def test_index_with_path_outside_folder_is_rejected(tmp_path):
    index = {"weight_map": {"w": "../elsewhere/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SnpatchError, match="w: expected the name of a file in its folder"):
        open_weights(tmp_path)
