"""Weights read from checkpoint files: one file or several, safetensors or torch, and damaged ones."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from snpatch import Engine, Ranking, SnpatchError, load_dataset
from snpatch.models.checkpoint import load_config
from snpatch.models.weights import open_weights

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(zoo):
    return AutoModelForCausalLM.from_pretrained(zoo("llama").folder)


def as_safetensors(model, folder):
    model.save_pretrained(folder)


def as_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_torch(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_torch_shards(model, folder):
    state = list(model.state_dict().items())
    placed = {}
    for number, part in enumerate((state[::2], state[1::2])):
        torch.save(dict(part), folder / f"pytorch_model-{number}.bin")
        placed |= dict.fromkeys(dict(part), f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("save", [as_safetensors, as_shards, as_torch, as_torch_shards])
def test_read_tensors_equal_the_models(model, tmp_path, save):
    save(model, tmp_path)
    weights = open_weights(tmp_path)
    for name, tensor in model.state_dict().items():
        assert name in weights
        assert torch.equal(weights.read(name), tensor)
    assert torch.equal(weights.columns(DOWN, [5, 0, 95, 5]), model.state_dict()[DOWN][:, [5, 0, 95, 5]])
    with pytest.raises(SnpatchError, match="has no tensor model"):
        weights.read("model.layers.9.mlp.down_proj.weight")


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def missing_shard(folder):
    next(folder.glob("*-00002-*.safetensors")).unlink()


def broken_shard(folder):
    next(folder.glob("*-00002-*.safetensors")).write_bytes(b"nothing")


def clear_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (broken_index, "not an index of weights"),
        (missing_shard, "no such file, and the index names it"),
        (broken_shard, "not a safetensors file"),
        (clear_folder, "holds no weights"),
    ],
)
def test_damaged_checkpoints_raise_one_line_error(model, tmp_path, breaking, message):
    as_shards(model, tmp_path)
    breaking(tmp_path)
    with pytest.raises(SnpatchError, match=message) as caught:
        weights = open_weights(tmp_path)
        for name in model.state_dict():
            weights.read(name)
    assert "\n" not in str(caught.value)


def test_load_config_of_peft_adapter_names_the_argument(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SnpatchError, match=r"expected a model, got a PEFT adapter\. Pass it as adapters=\{\.\.\.\}"):
        load_config(tmp_path, allow_untested=False)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_lfs_pointer_in_a_model_is_named(zoo, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama").folder, folder)
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(SnpatchError, match=rf"{name}: a pointer of Git LFS, not the data"):
        Engine(folder, backend="transformers")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_lfs_pointer_in_an_adapter_is_named(zoo, tmp_path, name):
    folder = tmp_path / "adapter"
    shutil.copytree(zoo("llama").adapters["sft"][0], folder)
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(SnpatchError, match=rf"{name}: a pointer of Git LFS, not the data"):
        Engine(zoo("llama").folder, {"a": folder}, backend="transformers")


@pytest.mark.parametrize("name", ["r.safetensors", "r.pt", "r.csv", "r.jsonl.gz"])
def test_lfs_pointer_as_a_ranking_or_prompts_is_named(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    load = load_dataset if name.endswith(".gz") else Ranking.load
    with pytest.raises(SnpatchError, match=rf"{name}: a pointer of Git LFS, not the data"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": "1e-05"}, {"hidden_size": 64.0}, {"num_attention_heads": 7}, {"eos_token_id": "2"}]
)
def test_wrong_value_in_config_json_is_not_blamed_on_the_tokenizer(zoo, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama").folder, folder)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **change}))
    with pytest.raises(SnpatchError, match=r"\(AutoConfig\): .* Check its config\.json"):
        Engine(folder, backend="transformers")
