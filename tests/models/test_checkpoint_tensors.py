"""Checkpoints whose tensors are not those of their model: one error on both backends and in training."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from snpatch.config import PRIMARY_WEIGHTS
from snpatch.errors import SnpatchError
from snpatch.executors.transformers.executor import load_model
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint
from snpatch.models.weights import check_weights
from snpatch.training import models as training_models
from snpatch.training.settings import TrainSettings


def load_in_transformers(folder):
    return load_model(str(folder), PRIMARY_WEIGHTS, "auto", torch.device("cpu"))


def load_for_training(folder):
    return training_models.load_model(folder, TrainSettings(), on_gpu=False)


def check_for_vllm(folder):
    check_weights(folder, AutoConfig.from_pretrained(folder))


LOADERS = [load_in_transformers, load_for_training, check_for_vllm]


def drop(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def add(**extra):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in extra.items()}


def write_variant(source, folder, change, **config):
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def keep(tensors):
    return tensors


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "config", "names"),
    [
        (drop("lm_head.weight"), {}, "none for lm_head.weight"),
        (drop("model.layers.1.mlp.down_proj.weight"), {}, "none for model.layers.1.mlp.down_proj.weight"),
        (drop("model.norm.weight"), {}, "none for model.norm.weight"),
        (rename("q_proj.weight", "q_proj.base_layer.weight"), {}, "Merge its adapter with PEFT"),
        (lambda tensors: {f"transformer.{name}": t for name, t in tensors.items()}, {}, "and 27 more"),
        (keep, {"num_hidden_layers": tiny.LAYERS + 1}, "none for model.layers.3.input_layernorm.weight"),
        (keep, {"num_hidden_layers": tiny.LAYERS - 1}, "got model.layers.2.input_layernorm.weight"),
        (
            add(model__layers__0__self_attn__q_proj__bias=torch.ones(128)),
            {},
            "got model.layers.0.self_attn.q_proj",
        ),
        (keep, {"tie_word_embeddings": True}, "expected an lm_head.weight equal to the embedding"),
    ],
)
def test_checkpoint_with_wrong_tensors_names_them(zoo, tmp_path, load, change, config, names):
    folder = write_variant(zoo("llama").folder, tmp_path / "variant", change, **config)
    with pytest.raises(SnpatchError) as caught:
        load(folder)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", LOADERS)
def test_reward_model_as_language_model_names_its_missing_head(zoo, tmp_path, load):
    model = AutoModelForSequenceClassification.from_pretrained(zoo("llama").folder, num_labels=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(SnpatchError, match=r"none for lm_head\.weight and score\.weight, which it does not have"):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_has_the_tensors_that_it_was_saved_with(zoo, load, architecture):
    load(zoo(architecture).folder)


@pytest.mark.parametrize("load", LOADERS)
def test_checkpoint_with_rotary_buffers_is_accepted(zoo, tmp_path, load):
    change = add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16))
    load(write_variant(zoo("llama").folder, tmp_path / "old", change))


@pytest.mark.parametrize("load", LOADERS)
def test_tied_head_equal_to_the_embedding_is_accepted(zoo, tmp_path, load):
    def copy_embedding(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    load(write_variant(zoo("gemma").folder, tmp_path / "tied", copy_embedding))


def test_weight_file_beside_the_used_one_is_refused_for_vllm(zoo, tmp_path):
    folder = write_variant(zoo("llama").folder, tmp_path / "two", keep)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    check_for_vllm(folder)  # vLLM, too, prefers safetensors
    (folder / "model.safetensors").rename(folder / "model.old.safetensors")
    load_in_transformers(folder)
    with pytest.raises(SnpatchError, match=r"got model\.old\.safetensors and pytorch_model\.bin"):
        check_for_vllm(folder)


def move_to_torch_file(folder, safetensors_name: str, torch_name: str) -> dict[str, torch.Tensor]:
    """Store a folder's tensors as a torch file, add a safetensors file of a ranking, and return the tensors."""
    tensors = load_file(folder / safetensors_name)
    (folder / safetensors_name).unlink()
    save_file({"rank": torch.zeros(1)}, folder / "ranking.safetensors")
    torch.save(tensors, folder / torch_name)
    return tensors


def test_fingerprint_covers_the_loaded_file_beside_other_safetensors(zoo, tmp_path):
    folder = write_variant(zoo("llama").folder, tmp_path / "bin", keep)
    tensors = move_to_torch_file(folder, "model.safetensors", "pytorch_model.bin")
    first = fingerprint_checkpoint(folder)
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert fingerprint_checkpoint(folder) != first


def test_adapter_fingerprint_covers_the_loaded_file_beside_other_safetensors(zoo, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(zoo("llama").adapters["sft"][0], folder)
    tensors = move_to_torch_file(folder, "adapter_model.safetensors", "adapter_model.bin")
    first = fingerprint_adapter(folder)
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, folder / "adapter_model.bin")
    assert fingerprint_adapter(folder) != first
