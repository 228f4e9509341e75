"""Tiny score models in the Beavertails layout and of transformers, and their scores computed by hand."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from snpatch.judges.score_model import ScoreModel

WORDS = "<unk> <s> </s> <pad> BEGINNING OF CONVERSATION: USER: ASSISTANT: <|user|> <|assistant|> a b c d e".split()
HEAD = 32  # numbers a head, the fewest that vLLM's attention takes
PROMPTS = ["a b", "c", "a b c d e", "d d"]
COMPLETIONS = ["b c d", "", "e", "a <|user|> b"]


def open_score_model(folder: Path, **arguments) -> ScoreModel:
    return ScoreModel(folder, **{"backend": "transformers", "device": "cpu", **arguments})


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.add_tokens([AddedToken("ASSISTANT:", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def write(
    folder: Path,
    *,
    bias: bool = False,
    normalize: bool | None = None,
    architecture: str = "LlamaForScore",
    files: str = "safetensors",
    **changes: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Write a random cost model into `folder`; `changes` replaces tensors by name, or drops them (None)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=64,
    )
    tensors = {f"model.{name}": t + 0.2 * torch.randn_like(t) for name, t in LlamaModel(config).state_dict().items()}
    tensors["score_head.weight"] = torch.randn(1, 32)
    if bias:
        tensors["score_head.bias"] = torch.tensor([3.5])
    if normalize is not None:
        tensors |= {"normalizer.mean": torch.tensor([1.5]), "normalizer.var": torch.tensor([4.0])}
        tensors["normalizer.count"] = torch.tensor([7], dtype=torch.int64)
    tensors = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    config.architectures = [architecture]
    config.update({"do_normalize": bool(normalize), "score_dim": 1})
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    if files == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif files == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        single, save = {
            "sharded safetensors": ("model.safetensors", save_file),
            "sharded bin": ("pytorch_model.bin", torch.save),
        }[files]
        weight_map = {}
        for i, half in enumerate(halves):
            save(half, folder / f"part{i}")
            (folder / f"part{i}").rename(folder / f"part{i}{Path(single).suffix}")
            weight_map |= dict.fromkeys(half, f"part{i}{Path(single).suffix}")
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def by_hand(tensors: dict[str, torch.Tensor], text: str, *, normalize: bool = False) -> float:
    """Score one text without padding, with Llama written out."""
    words = ["<s>", *text.replace("ASSISTANT:", " ASSISTANT: ").replace("</s>", " </s> ").split()]
    x = tensors["model.embed_tokens.weight"][[WORDS.index(word) for word in words]]
    angles = torch.arange(len(words))[:, None] / 10000.0 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[f"model.{name}.weight"]

    def heads(x: torch.Tensor, name: str, rotate: bool) -> torch.Tensor:
        y = (x @ tensors[f"model.{name}.weight"].T).unflatten(-1, (-1, HEAD)).transpose(0, 1)
        rotated_half = torch.cat([-y[..., HEAD // 2 :], y[..., : HEAD // 2]], -1)
        y = y * cos + rotated_half * sin if rotate else y
        return y.repeat_interleave(4 // y.shape[0], 0)

    causal_mask = torch.ones(len(words), len(words)).triu(1).bool()
    for i in range(2):
        h, layer = norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn"
        q, k = heads(h, f"{layer}.q_proj", True), heads(h, f"{layer}.k_proj", True)
        weights = (q @ k.mT / HEAD**0.5).masked_fill(causal_mask, -torch.inf).softmax(-1)
        mixed = (weights @ heads(h, f"{layer}.v_proj", False)).transpose(0, 1).flatten(1)
        x = x + mixed @ tensors[f"model.{layer}.o_proj.weight"].T
        h = norm(x, f"layers.{i}.post_attention_layernorm")
        gate, up, down = (tensors[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    score = norm(x, "norm")[-1] @ tensors["score_head.weight"][0]
    score = float(score + tensors.get("score_head.bias", torch.zeros(1))[0])
    return (score - 1.5) / 2.0 if normalize else score


def beaver(prompt: str, completion: str) -> str:
    return f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}</s>"


def all_by_hand(tensors: dict[str, torch.Tensor], *, normalize: bool = False) -> list[float]:
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [by_hand(tensors, beaver(prompt, completion), normalize=normalize) for prompt, completion in pairs]


BROKEN = [
    ({"score_head.weight": None}, "score_head.weight is missing"),
    ({"score_head.weight": torch.ones(1, 31)}, r"score_head.weight has the wrong shape, expected \[1, 32\]"),
    ({"model.norm.weight": None}, "1 tensors are missing .*model.norm.weight"),
    ({"model.norm.weight": torch.ones(31)}, "1 tensors have the wrong shape .*model.norm.weight"),
    ({"lm_head.weight": torch.ones(2, 2)}, "1 tensors are unknown .*lm_head.weight"),
    ({"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight in .* holds NaN"),
]


SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e < > | user assistant .".split()


def write_classifier(folder: Path, kind: str = "llama", template: str | None = None, **changes):
    """Write a random classifier and its tokenizer; `changes` are fields of its config."""
    torch.manual_seed(0)
    settings = {"vocab_size": len(WORDS), "pad_token_id": 3, "max_position_embeddings": 64}
    settings |= {} if "id2label" in changes else {"num_labels": 1}
    config = AutoConfig.for_model(kind, **{**settings, **SIZES, **changes})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    words = tokenizer() if kind == "llama" else BertTokenizer(vocab={word: i for i, word in enumerate(BERT)})
    words.chat_template = template
    words.save_pretrained(folder)
    return model
