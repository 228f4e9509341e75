"""Models of named sizes with random weights, in Hugging Face's folder format, with IA3 adapters in PEFT's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "rehearsal": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "heads": 4, "vocab_size": 512},
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "heads": 4, "vocab_size": 2048},
    "160m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "heads": 12, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": 32, "kv_heads": 4,
           "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32, "vocab_size": 32000},
}  # fmt: skip
EOS = 2


def make(size: str, folder: Path, *, weights: bool = True, dtype: torch.dtype = torch.bfloat16, draw: int = 0) -> Path:
    """Write a Llama of this size to `folder`/model and the adapters `folder`/sft and `folder`/dpo.

    draw: seed of the random weights. weights: False writes config and tokenizer only, for vLLM's load_format="dummy".
    """
    sizes = dict(SIZES[size])
    heads, kv_heads = sizes.pop("heads"), sizes.pop("kv_heads", None)
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=EOS,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    model = folder / "model"
    if weights:
        torch.manual_seed(draw)
        LlamaForCausalLM(config).to(dtype).save_pretrained(model)
    else:
        config.save_pretrained(model)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2", bos_token="w1").save_pretrained(model)
    for seed, name in enumerate(("sft", "dpo")):
        write_adapter(folder / name, config.num_hidden_layers, config.intermediate_size, seed)
    return model


def write_adapter(folder: Path, n_layers: int, n_neurons: int, seed: int) -> None:
    """Write random IA3 vectors close to one for every down_proj."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    key = "base_model.model.model.layers.{}.mlp.down_proj.ia3_l"
    vectors = {key.format(i): 1 + 0.2 * torch.randn(1, n_neurons, generator=draw) for i in range(n_layers)}
    save_file(vectors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
