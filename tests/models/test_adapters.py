"""load_adapters on folders that PEFT wrote, and on folders with one fault."""

import json
import re
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from snpatch.errors import SnpatchError
from snpatch.models.adapters import IA3Scales, load_adapters

LAYERS = 3
WIDTHS = {"down_proj": 24, "k_proj": 8, "v_proj": 8}
HOME = {"down_proj": "mlp", "k_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp"}
ALL = ["down_proj", "k_proj", "v_proj"]


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=LAYERS, **sizes))


def save(folder, target, feedforward=("down_proj",), seed=0, **options) -> dict[str, torch.Tensor]:
    """Let PEFT make and save an IA3 adapter with random vectors; returns module -> [LAYERS, width], ones elsewhere."""
    ff = feedforward if isinstance(feedforward, str) else list(feedforward)
    config = IA3Config(target_modules=target, feedforward_modules=ff, task_type=TaskType.CAUSAL_LM, **options)
    model = get_peft_model(llama(), config)
    draw = torch.Generator().manual_seed(seed)
    vectors = {name: torch.ones(LAYERS, width) for name, width in WIDTHS.items()}
    for layer in range(LAYERS):
        for name in WIDTHS:
            module = getattr(getattr(model.base_model.model.model.layers[layer], HOME[name]), name)
            if hasattr(module, "ia3_l"):
                parameter = module.ia3_l["default"]
                parameter.data = 1 + 0.4 * torch.randn(parameter.shape, generator=draw)
                if parameter.numel() == WIDTHS[name]:
                    vectors[name][layer] = parameter.data.flatten()
    model.save_pretrained(folder)
    return vectors


def assert_scales(scales, vectors, bits: bool = True):
    assert scales.vectors.keys() == vectors.keys()
    for name, want in vectors.items():
        vector = scales.vectors[name]
        assert vector.dtype == torch.float32
        torch.testing.assert_close(vector, want, rtol=0 if bits else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("target", "feedforward", "expected_layers"),
    [
        (["down_proj"], ["down_proj"], {"down_proj": [0, 1, 2]}),
        (ALL, ["down_proj"], {name: [0, 1, 2] for name in ALL}),
        (["k_proj", "v_proj"], [], {"k_proj": [0, 1, 2], "v_proj": [0, 1, 2]}),
        (r".*layers\.[02]\.mlp\.down_proj", r".*down_proj", {"down_proj": [0, 2]}),
        (r".*layers\.1\.(mlp\.down_proj|self_attn\.v_proj)", ["down_proj"], {"down_proj": [1], "v_proj": [1]}),
        (["layers.1.mlp.down_proj", "k_proj"], ["layers.1.mlp.down_proj"], {"down_proj": [1], "k_proj": [0, 1, 2]}),
        (["mlp.down_proj"], ["mlp.down_proj"], {"down_proj": [0, 1, 2]}),
    ],
    ids=["down", "down+k+v", "k+v", "regex of layers", "regex of modules", "one layer by name", "by path"],
)
def test_load_adapters_reads_what_peft_saved(tmp_path, target, feedforward, expected_layers):
    vectors = save(tmp_path, target, feedforward)
    changed_layers = {n: [i for i in range(LAYERS) if (v[i] != 1).any()] for n, v in vectors.items() if (v != 1).any()}
    assert changed_layers == expected_layers, "PEFT covers other modules than this test believes"
    assert_scales(load_adapters(tmp_path, LAYERS, WIDTHS), vectors)


def test_stacked_adapters_multiply(tmp_path):
    first = save(tmp_path / "a", ALL, seed=1)
    second = save(tmp_path / "b", ["down_proj"], seed=2)
    product = {name: first[name] * second[name] for name in WIDTHS}
    assert_scales(load_adapters([tmp_path / "a", tmp_path / "b"], LAYERS, WIDTHS), product)
    assert_scales(load_adapters([str(tmp_path / "a")], LAYERS, WIDTHS), first)
    with pytest.raises(SnpatchError, match="at least one folder"):
        load_adapters([], LAYERS, WIDTHS)
    assert_scales(IA3Scales.ones(LAYERS, WIDTHS), {name: torch.ones(LAYERS, w) for name, w in WIDTHS.items()})


def test_load_adapters_reads_torch_files_and_half_precision(tmp_path):
    vectors = save(tmp_path, ALL)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_scales(load_adapters(tmp_path, LAYERS, WIDTHS), vectors)
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    rounded = {name: vector.bfloat16().float() for name, vector in vectors.items()}
    assert_scales(load_adapters(tmp_path, LAYERS, WIDTHS), rounded)


@pytest.fixture(scope="module")
def valid_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save(folder, ALL)
    return folder


DOWN0 = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
K2 = "base_model.model.model.layers.2.self_attn.k_proj.ia3_l"


def config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        edit(state)
        save_file(state, path)

    return change


def lora(folder):
    get_peft_model(llama(), LoraConfig(target_modules=["down_proj"], task_type=TaskType.CAUSAL_LM)).save_pretrained(
        folder
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such folder (expected a PEFT adapter)"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        (lambda folder: (folder / "adapter_model.safetensors").write_text("x"), "not a safetensors file"),
        (lora, 'expected an adapter of type IA3, got \'LORA\'. Pass a LoRA as models={"name": {"lora": folder}}'),
        (lambda folder: save(folder, ["up_proj"], []), "IA3 on up_proj is not supported"),
        (lambda folder: save(folder, ["down_proj"], []), "down_proj not as feed-forward"),
        (lambda folder: save(folder, ["k_proj"], ["k_proj"]), "k_proj as feed-forward"),
        (config(modules_to_save=["lm_head"]), "modules_to_save = ['lm_head'] is not supported"),
        (config(exclude_modules=["k_proj"]), "puts no IA3 on model.layers.0.self_attn.k_proj, and its tensors do"),
        (config(target_modules=[]), "names no target_modules"),
        (tensors(lambda state: state.pop(DOWN0)), "no tensor for layer 0's down_proj"),
        (tensors(lambda state: state.pop(K2)), "no tensor for layer 2's k_proj"),
        (tensors(lambda state: state.clear()), "no tensor for layer 0's down_proj"),
        (tensors(lambda state: state.update({"lm_head.ia3_l": torch.ones(3)})), "unknown tensor lm_head.ia3_l"),
        (tensors(lambda state: state.update({DOWN0: torch.ones(1, 25)})), f"{DOWN0}: expected [1, 24]"),
        (tensors(lambda state: state.update({DOWN0: torch.ones(24, 1)})), f"{DOWN0}: expected [1, 24]"),
        (tensors(lambda state: state.update({K2: torch.ones(1, 8)})), f"{K2}: expected [8, 1]"),
        (tensors(lambda state: state[DOWN0].index_fill_(1, torch.tensor(5), torch.nan)), f"{DOWN0} holds NaN"),
        (tensors(lambda state: state[K2].index_fill_(0, torch.tensor(5), torch.inf)), f"{K2} holds NaN or infinity"),
    ],
)
def test_load_adapters_error_names_folder_and_fault(tmp_path, valid_folder, change, message):
    folder = tmp_path / "adapter"
    shutil.copytree(valid_folder, folder)
    change(folder)
    with pytest.raises(SnpatchError, match=re.escape(message)) as error:
        load_adapters(folder, LAYERS, WIDTHS)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("n_layers", "widths", "message"),
    [
        (2, WIDTHS, "is for layer 2, the model has 2 layers"),
        (4, WIDTHS, "no tensor for layer 3's down_proj"),
        (3, {**WIDTHS, "down_proj": 32}, "expected [1, 32] for this model, got [1, 24]"),
        (3, {"down_proj": 24}, "is not supported, only on down_proj"),
    ],
    ids=["too few layers", "too many layers", "wider", "fused qkv_proj"],
)
def test_load_adapters_for_another_model_is_rejected(valid_folder, n_layers, widths, message):
    with pytest.raises(SnpatchError, match=re.escape(message)):
        load_adapters(valid_folder, n_layers, widths)


@pytest.mark.parametrize(
    "prefix", ["transformer.", "", "model.vision_tower.", "model.language_model.", "language_model.model."]
)
def test_adapter_with_names_of_another_prefix_is_rejected(tmp_path, prefix):
    """PEFT would load none of its tensors."""
    folder = tmp_path / "sft"
    save(folder, ["down_proj"])
    state = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.model.model.", f"model.model.{prefix}"): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnpatchError, match=r"expected tensors named base_model\.model\.model\.layers"):
        load_adapters(folder, LAYERS, WIDTHS)
