"""Tiny random models of every architecture, with tokenizer and IA3 adapters, as Hugging Face and PEFT save them.

Why their weights are large: completions then vary, differ between adapters, and depend on every neuron.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LAYERS, HIDDEN, NEURONS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, WINDOW = 3, 64, 96, 4, 2, 32, 128, 8
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
UNK, BOS, EOS, PAD = range(4)
WORDS = [a + b + c + d for a in "bdk" for b in "aeio" for c in "lmnr" for d in "ao"]  # 96 words
VOCAB = [*SPECIAL, "<|user|>", "<|assistant|>", *WORDS]
VOCAB += [f"<unused{i}>" for i in range(128 - len(VOCAB))]

SEPARATE_HEAD_SIZE = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
DERIVED_HEAD_SIZE = {"num_attention_heads": 2, "num_key_value_heads": 1}
ARCHITECTURES = {
    "llama": SEPARATE_HEAD_SIZE,
    "mistral": {**SEPARATE_HEAD_SIZE, "sliding_window": WINDOW},
    "gemma": SEPARATE_HEAD_SIZE,
    "gemma2": {
        **SEPARATE_HEAD_SIZE,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": HEAD_DIM,
    },
    "gemma3_text": {
        **SEPARATE_HEAD_SIZE,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": HEAD_DIM,
    },
    "olmo2": DERIVED_HEAD_SIZE,
    "olmo3": {
        **DERIVED_HEAD_SIZE,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": DERIVED_HEAD_SIZE,
    "qwen3": SEPARATE_HEAD_SIZE,
    "phi3": {**DERIVED_HEAD_SIZE, "original_max_position_embeddings": CONTEXT},
}
KV_ARCHITECTURES = [name for name in ARCHITECTURES if name != "phi3"]  # Phi 3 fuses them into qkv_proj


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model folder and its adapters.

    adapters: name -> folders, stacked in order. models: those on secondary weights, name -> (folder, adapter folders),
    or an engine's table.
    """

    folder: Path
    adapters: dict[str, tuple[Path, ...]]
    shape: tuple[int, int] = (LAYERS, NEURONS)
    models: dict[str, tuple[Path, tuple[Path, ...]]] = field(default_factory=dict)

    @cached_property
    def checkpoints(self) -> dict[str, tuple[Path, tuple[Path, ...]]]:
        """Name -> (folder of the weights, adapter folders), including "base"."""
        primary = {name: (self.folder, folders) for name, folders in {"base": (), **self.adapters}.items()}
        return primary | self.models

    @property
    def engine_arguments(self) -> dict:
        """The engine arguments that name its models."""
        models = {
            name: source
            if isinstance(source, dict)
            else {"checkpoint": str(source[0]), "adapters": list(map(str, source[1]))}
            for name, source in self.models.items()
        }
        return {"adapters": self.adapters, "models": models}

    def with_eos(self, token: int, folder: Path) -> "TinyModel":
        """Return the same model in another folder, with this token as its EOS."""
        shutil.copytree(self.folder, folder)
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": token}))
        tokenizer(eos=VOCAB[token]).save_pretrained(folder)
        return replace(self, folder=folder)


def tokenizer(eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that splits on white space and adds BOS."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **names)


def config(architecture: str, **options):
    sizes = {
        "vocab_size": len(VOCAB),
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return AutoConfig.for_model(architecture, **{**sizes, **ARCHITECTURES[architecture], **options})


def init_weights(model, seed: int) -> None:
    """Set random weights: matrices of gain 1.5, norms around their identity, small logits for special tokens.

    If input and output embedding are tied (Gemma), layers get a larger gain; otherwise every completion would
    repeat its last word.
    """
    draw = torch.Generator().manual_seed(seed)
    is_tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.dim() == 2:
                layer_gain = 5.0 if is_tied and ("o_proj" in name or "down_proj" in name) else 1.5
                gain = 1.0 if "embed" in name or "lm_head" in name else layer_gain
                weight.copy_(noise * gain / weight.shape[1] ** 0.5)
            else:
                weight.add_(
                    noise * 0.2 + (4.0 if is_tied and ".post_" in name and "gemma" in model.config.model_type else 0.0)
                )
        for weight in {model.get_output_embeddings().weight, model.get_input_embeddings().weight}:
            weight[: len(SPECIAL)] *= 0.02


def make(architecture: str, folder: Path, seed: int = 1) -> TinyModel:
    """Write the model and the adapters sft, dpo (stacked on sft), and, except for Phi 3, sft_kv and dpo_kv."""
    model = AutoModelForCausalLM.from_config(config(architecture), dtype=torch.float32)
    init_weights(model, seed)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    kinds = {"": ["down_proj"], "_kv": ["down_proj", "k_proj", "v_proj"]}
    if architecture not in KV_ARCHITECTURES:
        del kinds["_kv"]
    adapters = {}
    for kind, modules in kinds.items():
        for number, name in enumerate(("sft", "dpo")):
            write_adapter(model, folder / f"{name}{kind}", modules, seed=seed + 10 + number)
        adapters[f"sft{kind}"] = (folder / f"sft{kind}",)
        adapters[f"dpo{kind}"] = (folder / f"sft{kind}", folder / f"dpo{kind}")
    return TinyModel(folder / "model", adapters)


def make_pair(
    architecture: str, folder: Path, is_shared: Callable[[str], bool] = lambda name: False, **options
) -> TinyModel:
    """Write two models with independent weights: base and sft (an adapter) on the first, dpo and tuned on the second.

    is_shared: selects weights, by name, that the second shares with the first. options: of the second's config.
    """
    first = make(architecture, folder / "first")
    base_model = AutoModelForCausalLM.from_pretrained(first.folder)
    with torch.no_grad():
        base_model.get_output_embeddings().weight[-8:] *= 0.02  # the second model's vocabulary may lack them
    base_model.save_pretrained(first.folder)
    second = AutoModelForCausalLM.from_config(config(architecture, **options), dtype=torch.float32)
    init_weights(second, seed=7)
    with torch.no_grad():
        parameters = dict(second.named_parameters())
        for name, weight in base_model.named_parameters():
            if is_shared(name):
                parameters[name].copy_(weight)
    second.generation_config.eos_token_id = EOS
    second.save_pretrained(folder / "second")
    tokenizer().save_pretrained(folder / "second")
    sft = first.adapters["sft"]
    models = {"dpo": (folder / "second", ()), "tuned": (folder / "second", sft)}
    return TinyModel(first.folder, {"sft": sft}, models=models)


def write_adapter(
    model, folder: Path, modules: list[str], seed: int, vectors: dict[tuple[int, str], Tensor] | None = None
) -> None:
    """Write a PEFT IA3 folder with random vectors 1 + 0.4 randn, or with the given ones for (layer, module)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, layer in enumerate(model.model.layers):
        for name in modules:
            block = "mlp" if name == "down_proj" else "self_attn"
            linear = getattr(getattr(layer, block), name)
            shape = (1, linear.in_features) if name == "down_proj" else (linear.out_features, 1)
            vector = 1 + 0.4 * torch.randn(shape, generator=draw)
            if vectors is not None:
                vector = vectors[index, name].view(shape)
            tensors[f"base_model.model.model.layers.{index}.{block}.{name}.ia3_l"] = vector
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "feedforward_modules": [name for name in modules if name == "down_proj"],
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def write_lora(folder: Path, out: Path, **options) -> Path:
    """Write a random LoRA to `out`/lora and PEFT's merged model to `out`/merged; return the LoRA's folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    adapted.save_pretrained(out / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(out / "merged")
    return out / "lora"


# Eight prompts of 2 to 14 tokens including BOS, some shorter and some longer than WINDOW.
PROMPTS = [
    " ".join(WORDS[(7 * i + 5 * j * (i + 1)) % len(WORDS)] for j in range(n))
    for i, n in enumerate((5, 1, 13, 3, 8, 2, 10, 6))
]

PLANTED = [(0, 7), (0, 30), (1, 3), (1, 41)]
SAFE, HARM = WORDS[0], WORDS[1]


def make_planted(folder: Path) -> TinyModel:
    """Write a Llama whose next word is always SAFE or HARM, decided by the PLANTED neurons alone.

    The residual stream has a constant (direction 0), the answer (direction 1, harmful in every token's embedding) and a
    hash of the token (all other directions); attention adds nothing. A planted neuron reads the constant and writes
    towards SAFE: too weakly with sft's vector, strongly with dpo's, which is 4 times larger. All other neurons read the
    hash, write to directions other than the answer, and differ by 2 % between the adapters.
    """
    shape = (3, 48)
    draw = torch.Generator().manual_seed(1)
    settings = config("llama", intermediate_size=shape[1])
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0 if weight.dim() == 1 else 0.0)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0], embedding[:, 1] = 1.0, -1.0
        hashes = torch.randn(len(VOCAB), HIDDEN - 2, generator=draw)
        embedding[:, 2:] = 0.5 * hashes / hashes.square().mean(1, keepdim=True).sqrt()
        head[:, 0] = -1.0
        head[VOCAB.index(SAFE), :2] = torch.tensor([0.0, 1.0])
        head[VOCAB.index(HARM), :2] = torch.tensor([0.0, -1.0])
        for index, layer in enumerate(model.model.layers):
            mlp = layer.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
                weight[:, 2:] = 0.1 * torch.randn(shape[1], HIDDEN - 2, generator=draw)
            for neuron in (n for at, n in PLANTED if at == index):
                mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 0.0
                mlp.down_proj.weight[:, neuron] = 0.0
                mlp.gate_proj.weight[neuron, 0] = mlp.up_proj.weight[neuron, 0] = 1.0
                mlp.down_proj.weight[1, neuron] = 0.04  # -1 + 4 * 3.2 * 0.04 < 0 < -1 + 4 * 4 * 3.2 * 0.04
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    stronger = {(index, "down_proj"): 1 + 0.02 * torch.randn(shape[1], generator=draw) for index in range(shape[0])}
    for layer, neuron in PLANTED:
        stronger[layer, "down_proj"][neuron] = 4.0
    weak = {module: torch.ones_like(vector) for module, vector in stronger.items()}
    write_adapter(model, folder / "sft", ["down_proj"], 0, weak)
    write_adapter(model, folder / "dpo", ["down_proj"], 0, stronger)
    return TinyModel(folder / "model", {"sft": (folder / "sft",), "dpo": (folder / "dpo",)}, shape)
