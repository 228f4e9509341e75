"""Every field of PEFT's LoraConfig and IA3Config at a non-default value: merged as in PEFT, or rejected."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from snpatch import Engine
from snpatch.errors import SnpatchError
from snpatch.models.adapters import load_adapters
from snpatch.models.lora import load_lora, merge_loras

MADE, EDITED = "made by PEFT", "edited in the file"
EXACT, REFUSED = "exact", "refused"
ORIGIN = {
    "task_type": "FEATURE_EXTRACTION",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "0.1",
    "base_model_name_or_path": "org/other",
    "revision": "main",
    "inference_mode": True,
}
# field -> (value, who writes it, what becomes of it)
LORA = {
    **{name: (value, EDITED, EXACT) for name, value in ORIGIN.items()},
    "peft_type": ("LOHA", EDITED, REFUSED),
    "r": (3, MADE, EXACT),
    "target_modules": (["gate_proj"], MADE, EXACT),
    "exclude_modules": (["layers.1.mlp.down_proj"], MADE, EXACT),
    "lora_alpha": (17, MADE, EXACT),
    "lora_dropout": (0.3, MADE, EXACT),
    "fan_in_fan_out": (True, EDITED, REFUSED),
    "bias": ("lora_only", EDITED, REFUSED),
    "use_rslora": (True, MADE, EXACT),
    "modules_to_save": (["lm_head"], MADE, REFUSED),
    "init_lora_weights": ("gaussian", MADE, EXACT),
    "layers_to_transform": ([1], MADE, EXACT),
    "layers_pattern": ("h", EDITED, REFUSED),
    "rank_pattern": ({"down_proj": 2}, MADE, EXACT),
    "alpha_pattern": ({r"layers\.1\.mlp\.down_proj": 32}, MADE, EXACT),
    "megatron_config": ({"tp": 2}, EDITED, REFUSED),
    "megatron_core": ("megatron.other", EDITED, EXACT),
    "trainable_token_indices": ([1, 2], MADE, REFUSED),
    "loftq_config": ({"loftq_bits": 4}, EDITED, REFUSED),
    "eva_config": ({"rho": 2.0}, EDITED, EXACT),
    "corda_config": ({"corda_method": "kpm"}, EDITED, REFUSED),
    "lora_ga_config": ({"direction": "ArB2r"}, EDITED, REFUSED),
    "use_dora": (True, MADE, REFUSED),
    "velora_config": ({"num_groups": 2}, EDITED, REFUSED),
    "alora_invocation_tokens": ([5, 6], MADE, REFUSED),
    "use_qalora": (True, EDITED, REFUSED),
    "qalora_group_size": (8, EDITED, EXACT),
    "monteclora_config": ({}, MADE, REFUSED),
    "layer_replication": ([[0, 2], [1, 3]], MADE, REFUSED),
    "runtime_config": ({"ephemeral_gpu_offload": True}, EDITED, EXACT),
    "lora_bias": (True, EDITED, REFUSED),
    "target_parameters": (["mlp.up_proj.weight"], MADE, EXACT),
    "use_bdlora": ({"nblocks": 2}, EDITED, REFUSED),
    "arrow_config": ({"top_k": 2}, EDITED, REFUSED),
    "kasa_config": ({}, MADE, REFUSED),
    "ensure_weight_tying": (True, MADE, EXACT),
}
IA3 = {
    **{name: (value, EDITED, EXACT) for name, value in ORIGIN.items()},
    "peft_type": ("LORA", EDITED, REFUSED),
    "target_modules": (["k_proj"], MADE, EXACT),
    "exclude_modules": (["layers.1.mlp.down_proj"], MADE, EXACT),
    "feedforward_modules": ([], MADE, REFUSED),
    "fan_in_fan_out": (True, EDITED, REFUSED),
    "modules_to_save": (["lm_head"], MADE, REFUSED),
    "init_ia3_weights": (False, MADE, EXACT),
}
SUBCONFIGS = {"monteclora_config": "MontecloraConfig", "kasa_config": "KasaConfig"}
WIDTHS = {"down_proj": tiny.NEURONS, "k_proj": tiny.KV_HEADS * tiny.HEAD_DIM, "v_proj": tiny.KV_HEADS * tiny.HEAD_DIM}


def save_adapter(kind, folder: Path, out: Path, **options) -> Path:
    """Return an adapter that PEFT wrote, with random numbers in all that it trains."""
    defaults = {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    defaults |= {"r": 4, "lora_alpha": 6} if kind is LoraConfig else {"feedforward_modules": ["down_proj"]}
    if kind is IA3Config and options.get("target_modules") == ["k_proj"]:
        defaults["feedforward_modules"] = []
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), kind(**{**defaults, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(out)
    return out


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def save_with_field(kind, folder: Path, out: Path, field: str, value: object, writer: str) -> Path:
    if writer == EDITED:
        return edit_config(save_adapter(kind, folder, out), **{field: value})
    option = getattr(lora_configs, SUBCONFIGS[field])(**value) if field in SUBCONFIGS else value
    return save_adapter(kind, folder, out, **{field: option})


def by_peft(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights that PEFT merges when it loads a folder."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter))
    return {name: weight.detach() for name, weight in model.merge_and_unload().named_parameters()}


def assert_merged_alike(folder: Path, adapter: Path) -> None:
    base_tensors = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    expected, merged = by_peft(folder, adapter), dict(merge_loras(base_tensors.items(), [adapter]))
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[name], base_tensors[name]) for name in base_tensors)
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "table"), [(LoraConfig, LORA), (IA3Config, IA3)], ids=["lora", "ia3"])
def test_peft_config_fields_all_have_an_expected_outcome(kind, table):
    assert {f.name for f in fields(kind)} == table.keys(), "PEFT has other fields: say what becomes of each"


@pytest.mark.parametrize("field", LORA)
def test_lora_field_is_merged_as_in_peft_or_rejected(zoo, tmp_path, field):
    folder, (value, writer, end) = zoo("llama").folder, LORA[field]
    adapter = save_with_field(LoraConfig, folder, tmp_path / "lora", field, value, writer)
    if end == EXACT:
        assert_merged_alike(folder, adapter)
    else:
        with pytest.raises(SnpatchError, match="adapter of type" if field == "peft_type" else field):
            load_lora(adapter)


@pytest.mark.parametrize("field", IA3)
def test_ia3_field_is_merged_as_in_peft_or_rejected(zoo, tmp_path, field):
    folder, (value, writer, end) = zoo("llama").folder, IA3[field]
    adapter = save_with_field(IA3Config, folder, tmp_path / "ia3", field, value, writer)
    if end == REFUSED:
        with pytest.raises(SnpatchError, match="adapter of type" if field == "peft_type" else field):
            load_adapters(adapter, tiny.LAYERS, WIDTHS)
        return
    model = AutoModelForCausalLM.from_pretrained(folder)
    want, scales = by_peft(folder, adapter), load_adapters(adapter, tiny.LAYERS, WIDTHS).vectors
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(scales["down_proj"][index])
            layer.self_attn.k_proj.weight.mul_(scales["k_proj"][index][:, None])
            layer.self_attn.v_proj.weight.mul_(scales["v_proj"][index][:, None])
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", [False, "orthogonal", "mica"])
def test_lora_init_with_unchanged_base_is_merged_as_in_peft(zoo, tmp_path, init):
    folder = zoo("llama").folder
    assert_merged_alike(folder, save_adapter(LoraConfig, folder, tmp_path / "lora", init_lora_weights=init))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "a_newer_one"])
def test_lora_init_with_changed_base_is_rejected(zoo, tmp_path, init):
    adapter = edit_config(save_adapter(LoraConfig, zoo("llama").folder, tmp_path / "lora"), init_lora_weights=init)
    with pytest.raises(SnpatchError, match=rf"init_lora_weights = '{init}' is not supported. Merge the adapter with"):
        load_lora(adapter)


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_unknown_adapter_field_is_rejected_unless_off(zoo, tmp_path, kind):
    folder = zoo("llama").folder
    adapter = save_adapter(kind, folder, tmp_path / "adapter")
    load = load_lora if kind is LoraConfig else lambda path: load_adapters(path, tiny.LAYERS, WIDTHS)
    load(edit_config(adapter, use_future=False, future_config=None, future_pattern={}, future_list=[]))
    for value in (True, 0, 1.5, "on", {"a": 1}, [0]):
        with pytest.raises(SnpatchError, match=r"use_future = .* is not supported\. Merge the adapter with PEFT"):
            load(edit_config(adapter, use_future=value))


def test_lora_on_lm_head_requires_copy_equal_to_model(zoo, tmp_path):
    """PEFT saves and loads `lm_head.base_layer.weight` together with the LoRA."""
    folder = zoo("llama").folder
    adapter = save_adapter(LoraConfig, folder, tmp_path / "lora", target_modules=["lm_head", "down_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    assert_merged_alike(folder, adapter)
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, path)
    base_tensors = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    with pytest.raises(SnpatchError, match=r"expected lm_head\.weight as in the model, got other weights\. Merge"):
        dict(merge_loras(base_tensors.items(), [adapter]))


def test_lora_tensors_and_config_with_different_modules_are_rejected(zoo, tmp_path):
    folder = zoo("llama").folder
    base_tensors = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    adapter = save_adapter(LoraConfig, folder, tmp_path / "lora", target_modules=["down_proj", "up_proj"])
    with pytest.raises(SnpatchError, match=r"puts no LoRA on model\.layers\.0\.mlp\.down_proj, and its tensors do"):
        load_lora(edit_config(adapter, target_modules=["up_proj"]))
    with pytest.raises(SnpatchError, match=r"no matrices for model\.layers\.0\.mlp\.gate_proj, which its adapter_conf"):
        dict(
            merge_loras(
                base_tensors.items(), [edit_config(adapter, target_modules=["down_proj", "up_proj", "gate_proj"])]
            )
        )
    with pytest.raises(SnpatchError, match=r"no matrices for model\.layers\.0\.mlp\.gate_proj"):
        dict(merge_loras(base_tensors.items(), [edit_config(adapter, target_modules="all-linear")]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all-linear", r"no tensor for layer 0's k_proj"),
        ("down_proj", r"'down_proj' is a regular expression for whole names, as .* names, or their ends, are given"),
        (["layers.0.mlp.down_proj"], r"puts no IA3 on model\.layers\.1\.mlp\.down_proj, and its tensors do"),
    ],
)
def test_ia3_targets_without_tensors_are_rejected(zoo, tmp_path, targets, message):
    adapter = edit_config(save_adapter(IA3Config, zoo("llama").folder, tmp_path / "ia3"), target_modules=targets)
    with pytest.raises(SnpatchError, match=message):
        load_adapters(adapter, tiny.LAYERS, WIDTHS)


def test_lora_on_tied_head_is_rejected(zoo, tmp_path):
    folder = zoo("gemma").folder
    adapter = save_adapter(LoraConfig, folder, tmp_path / "lora", target_modules=["lm_head", "down_proj"])
    with pytest.raises(SnpatchError, match="is tied to the embedding"):
        Engine(folder, models={"tuned": {"lora": adapter}}, backend="transformers")
    base_tensors = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    with pytest.raises(SnpatchError, match=r"the model has no weight lm_head\.weight: it is tied to the embedding"):
        dict(merge_loras(base_tensors.items(), [adapter]))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name",
    [
        A.replace("lora_A.weight", "lora_magnitude_vector"),
        A.replace("lora_A.weight", "lora_B.bias"),
        A.replace("lora_A", "lora_A.sft"),
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.norm.weight",
    ],
)
def test_lora_with_other_tensors_is_rejected_with_the_way_out(zoo, tmp_path, name):
    adapter = tiny.write_lora(zoo("llama").folder, tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({**state, name: torch.ones(4)}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnpatchError, match=r"is not a LoRA matrix of a linear layer\. Merge the adapter with PEFT"):
        load_lora(adapter)
