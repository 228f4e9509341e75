"""Published model pairs: their configs and tokenizers, and which pairs one engine accepts."""

import json
import math
from pathlib import Path

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from snpatch import Engine, SnpatchError
from snpatch.models.compatibility import check_compatible, check_tokenizers
from snpatch.models.notes import Notes

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
SMOLLM2_INSTRUCT = {
    **SMOLLM2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_INSTRUCT = {k: v for k, v in QWEN25.items() if k != "use_mrope"} | {
    "eos_token_id": 151645,
    "max_window_layers": 21,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GEMMA3 = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
GEMMA3_IT = {k: v for k, v in GEMMA3.items() if k != "use_bidirectional_attention"} | {"eos_token_id": [1, 106]}
OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 100352,
}
OLMO2_TUNED = {**OLMO2, "torch_dtype": "bfloat16", "use_cache": False, "bos_token_id": 100257}
TULU3_SFT = {
    **LLAMA32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "pad_token_id": 128256,
    "rope_scaling": {**LLAMA3_ROPE, "factor": 8.0},
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": 128264,
}
TULU3_DPO = {k: v for k, v in TULU3_SFT.items() if k != "head_dim"} | {"vocab_size": 128256, "use_cache": True}
UNSLOTH = {
    **LLAMA32,
    "eos_token_id": 128009,
    "pad_token_id": 128004,
    "model_name": "unsloth/Llama-3.2-1B-Instruct",
    "unsloth_fixed": True,
    "unsloth_version": "2025.12.6",
    "dtype": "bfloat16",
}
PAIRS = {
    "SmolLM2-135M": (SMOLLM2, SMOLLM2_INSTRUCT, "transformers.js_config"),
    "Qwen2.5-0.5B": (QWEN25, QWEN25_INSTRUCT, "use_mrope"),
    "Llama-3.2-1B": (LLAMA32, {**LLAMA32, "eos_token_id": [128001, 128008, 128009]}, None),
    "gemma-3-270m": (GEMMA3, GEMMA3_IT, None),
    "OLMo-2-1B SFT": (OLMO2, OLMO2_TUNED, None),
    "OLMo-2-1B DPO": (OLMO2_TUNED, {**OLMO2_TUNED, "use_cache": True}, None),
    "Tulu-3-8B": (TULU3_SFT, TULU3_DPO, None),
    "Unsloth": (LLAMA32, UNSLOTH, "model_name, unsloth_fixed, unsloth_version"),
}


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(tmp_path: Path, config: dict, second_config: dict) -> tuple[str, ...]:
    notes, words = Notes(), tiny.tokenizer()
    check_compatible(
        write_config(tmp_path / "one", config), write_config(tmp_path / "other", second_config), words, words, notes
    )
    return notes.messages


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("turn", [1, -1])
def test_public_pair_is_accepted_and_unused_keys_are_noted(tmp_path, name, turn):
    config, second_config, keys = PAIRS[name]
    notes = check(tmp_path, *(config, second_config)[::turn])
    assert [f"does not compute with: {keys}" in note for note in notes] == ([True] if keys else [])


YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN = {**LLAMA32, "rope_scaling": YARN_ROPE}
YARN_AT_TOP = {
    **LLAMA32,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "original_max_position_embeddings": 32768,
}
LLAMA32_AT_TOP = {**LLAMA32, "original_max_position_embeddings": 8192}
CHANGES = {
    "rms_norm_eps": (QWEN25, {"rms_norm_eps": 1e-5}),
    "hidden_act": (QWEN25, {"hidden_act": "gelu"}),
    "head_dim": (QWEN25, {"head_dim": 128}),
    "tie_word_embeddings": (QWEN25, {"tie_word_embeddings": False}),
    "num_key_value_heads": (LLAMA32, {"num_key_value_heads": 4}),
    "attention_bias": (LLAMA32, {"attention_bias": True}),
    "rope_parameters": (LLAMA32, {"rope_theta": 10000.0}),
    "rope_parameters, scaling": (LLAMA32, {"rope_scaling": {**LLAMA3_ROPE, "factor": 8.0}}),
    "rope_parameters, type": (LLAMA32, {"rope_scaling": None}),
    "sliding_window": (QWEN25, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}),
    "sliding_window, gemma": (GEMMA3, {"sliding_window": 1024}),
    "layer_types": (GEMMA3, {"layer_types": ["sliding_attention"] * 17 + ["full_attention"]}),
    "layer_types, local base": (GEMMA3, {"rope_local_base_freq": 20000.0}),
    "rope_parameters, yarn original": (YARN_AT_TOP, {"original_max_position_embeddings": 4096}),
    "rope_parameters, yarn factor": (YARN, {"rope_scaling": {**YARN_ROPE, "factor": 8.0}}),
    "rope_parameters, yarn attention": (YARN, {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.0}}),
    "rope_parameters, yarn beta": (YARN, {"rope_scaling": {**YARN_ROPE, "beta_fast": 16}}),
    "rope_parameters, yarn truncate": (YARN, {"rope_scaling": {**YARN_ROPE, "truncate": False}}),
    "rope_parameters, yarn mscale": (YARN, {"rope_scaling": {**YARN_ROPE, "mscale": 0.5, "mscale_all_dim": 1.0}}),
    "rope_parameters, llama3 original": (LLAMA32_AT_TOP, {"original_max_position_embeddings": 4096}),
    "quantization_config": (LLAMA32, {"quantization_config": {"quant_method": "fp8"}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_different_used_config_key_is_rejected(tmp_path, name):
    config, change = CHANGES[name]
    keys = {"sliding_window": "layer_types|sliding_window", "sliding_window, gemma": "layer_types|sliding_window"}
    key = keys.get(name, name.split(",")[0])
    with pytest.raises(SnpatchError, match=rf"expected ({key}) = .* Run each model in its own engine"):
        check(tmp_path, config, {**config, **change})


MISTRAL = {**LLAMA32, "model_type": "mistral", "rope_scaling": None, "max_position_embeddings": 4096}
UNUSED = {
    "a window that no text reaches": (MISTRAL, {"sliding_window": None}, {"sliding_window": 4096}),
    "a window that no layer has": (QWEN25, {"sliding_window": 131072}, {"sliding_window": None}),
    "layers of no window": (QWEN25, {"max_window_layers": 3}, {}),
    "a linear factor of 1": (LLAMA32, {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 1.0}}),
    "a default written out": (LLAMA32, {"mlp_bias": False}, {"attention_dropout": 0.1}),
    "an absent head_dim": (LLAMA32, {"head_dim": None}, {"head_dim": 64}),
    "defaults of YaRN": (
        YARN,
        {},
        {"rope_scaling": {**YARN_ROPE, "beta_fast": 32, "beta_slow": 1.0, "truncate": True, "attention_factor": None}},
    ),
    "YaRN's own attention factor": (
        YARN,
        {},
        {"rope_scaling": {**YARN_ROPE, "attention_factor": 0.1 * math.log(4.0) + 1.0}},
    ),
    "equal mscales of YaRN": (
        YARN,
        {"rope_scaling": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.0}},
    ),
    "YaRN's original context at the top": (YARN, {}, YARN_AT_TOP),
    "an original context that no type reads": (MISTRAL, {"original_max_position_embeddings": 64}, {}),
    "a whole number as a float": (LLAMA32, {"rope_theta": 500000}, {"rope_theta": 500000.0}),
}


@pytest.mark.parametrize("name", UNUSED)
def test_different_unused_config_key_is_accepted(tmp_path, name):
    config, change, second_change = UNUSED[name]
    assert check(tmp_path, {**config, **change}, {**config, **second_change}) == ()


def test_different_window_within_context_is_rejected(tmp_path):
    longer = {**MISTRAL, "max_position_embeddings": 32768}
    with pytest.raises(SnpatchError, match=r"expected sliding_window = None as .*, got 4096"):
        check(tmp_path, {**longer, "sliding_window": None}, {**longer, "sliding_window": 4096})


# ---- tokenizers --------------------------------------------------------------------------------------------------


def bpe(vocab: list[str], merges: list[tuple[str, str]], new_tokens: tuple = (), pad: str | None = None):
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_tokens(list(new_tokens))
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


LETTERS = ["a", "b", "c", "ab", "abc"]
MERGES = [("a", "b"), ("ab", "c")]
ROWS = (8, 8)


def compare(tokenizer, second_tokenizer, sizes=ROWS) -> tuple[str, ...]:
    notes = Notes()
    check_tokenizers(tokenizer, second_tokenizer, "ONE", "OTHER", sizes, notes)
    return notes.messages


def test_unshared_ids_with_embedding_row_are_noted():
    base, larger = bpe(LETTERS, MERGES), bpe(LETTERS, MERGES, ("<tool>", "<think>"))
    for pair in ((base, larger), (larger, base)):
        (note,) = compare(*pair)
        assert "has 2 tokens that" in note
        assert "'<tool>' (5)" in note
    with pytest.raises(
        SnpatchError, match=r"OTHER: expected token ids below 6, the rows of ONE's embedding, got '<think>' \(6\)"
    ):
        compare(base, larger, (6, 8))
    assert compare(base, bpe(LETTERS, MERGES)) == ()


def test_padding_token_without_row_is_accepted():
    """Tulu 3's SFT checkpoint pads with id 128256, which its base has no row for."""
    base, padded = bpe(LETTERS, MERGES), bpe(LETTERS, MERGES, ("<pad>",), pad="<pad>")
    (note,) = compare(padded, base, (8, 5))
    assert "as '<pad>' (5)" in note


@pytest.mark.parametrize(
    ("second_tokenizer", "message"),
    [
        (bpe(["b", "a", "c", "ab", "abc"], MERGES), r"the token 'a': 0 and 1"),
        (bpe(["a", "b", "c", "ab", "xyz"], MERGES[:1]), r"the token of id 4: 'abc' and 'xyz'"),
        (bpe(LETTERS, MERGES[:1]), r"the merges of its model"),
        (bpe([*LETTERS, "bc"], [("a", "b"), ("b", "c"), ("ab", "c")]), None),
    ],
)
def test_different_ids_or_merges_are_rejected(second_tokenizer, message):
    tokenizer = bpe(LETTERS, MERGES)
    if message is None:
        assert len(compare(tokenizer, second_tokenizer)) == 1, "a merge into a token that only one has is that token's"
    else:
        with pytest.raises(SnpatchError, match=f"the same ids .* between ONE and OTHER in {message}"):
            compare(tokenizer, second_tokenizer)


def test_different_added_token_flags_and_bos_are_noted():
    tokenizer, second_tokenizer = (bpe(LETTERS, MERGES, (AddedToken("<x>", lstrip=strip),)) for strip in (True, False))
    (note,) = compare(tokenizer, second_tokenizer)
    assert "how the text '<x>' is found" in note
    assert "each model's prompts are encoded by its own" in note


# ---- what is held twice ------------------------------------------------------------------------------------------


def test_abliterated_pair_stores_two_module_kinds_twice(tmp_path):
    tiny_pair = tiny.make_pair(
        "llama", tmp_path, is_shared=lambda name: "o_proj" not in name and "down_proj" not in name
    )
    with Engine(tiny_pair.folder, models={"abliterated": tiny_pair.models["dpo"][0]}, backend="transformers") as engine:
        memory = engine.executor.memory
        assert memory.duplicated == ("down_proj", "o_proj")
        assert str(memory).endswith("stored twice: down_proj, o_proj")
        num_values = tiny.NEURONS * tiny.HIDDEN + tiny.HEADS * tiny.HEAD_DIM * tiny.HIDDEN
        assert memory.secondary == tiny.LAYERS * num_values * 4
