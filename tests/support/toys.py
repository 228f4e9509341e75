"""A Llama that trains in half a second, its rows, and independent computations of its losses and training.

Why every word is one token: a chat's ids can be written without a tokenizer, and a row's length is its word count.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from snpatch.training import record, trainer
from snpatch.training.settings import DpoSettings, TrainSettings

WORDS = (
    "<unk> <s> </s> <pad> <|system|> <|user|> <|assistant|> ask one two three yes here it is no never be calm".split()
)
UNK, BOS, EOS, PAD = range(4)
LAYERS, NEURONS = 2, 96
KEYS = [f"base_model.model.model.layers.{i}.mlp.down_proj.ia3_l" for i in range(LAYERS)]
TOY_SETTINGS = {"batch_size": 4, "micro_batch_size": 2, "epochs": 4, "max_length": 32, "gradient_checkpointing": False}
PLOT = record.plot
RATES = {"ia3": 0.1, "lora": 0.02, "full": 0.005}


def to_chat(*texts: str) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def to_answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


MESSAGES = [
    {"messages": turns}
    for turns in (
        to_chat("ask one", "yes"),
        to_chat("ask two", "yes here it is"),
        to_chat("ask three", "here it is"),
        to_chat("ask one", "yes it is", "ask two", "it is here yes"),
        [{"role": "system", "content": "be calm"}, *to_chat("ask two", "yes here")],
        to_chat("ask one two", "here"),
        to_chat("ask two three", "yes here it is yes"),
        to_chat("ask three", "it is", "ask one", "yes"),
    )
]
PAIRS = [
    {"prompt": to_chat(*prompt_texts), "chosen": to_answer(chosen), "rejected": to_answer(rejected)}
    for prompt_texts, chosen, rejected in (
        (["ask one"], "no never", "yes here it is"),
        (["ask two"], "no", "yes here"),
        (["ask three"], "never no", "here it is yes"),
        (["ask one", "yes", "ask two"], "no never no", "it is"),
        (["ask two one"], "never", "yes it is"),
        (["ask three two one"], "no never", "yes"),
        (["ask two", "here", "ask three"], "no no", "here it is"),
        (["ask one one"], "never never", "yes yes"),
    )
]


def tokenizer(add_bos: bool = True, **names: str) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that splits on white space, without a chat template.

    add_bos: add BOS before each text. names: other special tokens than the default ones.
    """
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def make_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random Llama with large weights, so that adapters give different completions."""
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        initializer_range=0.2,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


class Toy:
    """The base model and the models trained on it, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.base = make_base(folder / "base")

    def sft(self, method: str = "ia3") -> Path:
        """Return an SFT adapter (or checkpoint) of the base."""
        out = self._folder / f"sft-{method}"
        if not out.exists():
            trainer.train_sft(self.base, MESSAGES, out, settings(method))
        return out


def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """Yield the session's Toy; a test file makes a fixture of this function.

    Meanwhile a training takes a fifth of its time: no plot is drawn, and accelerate, which collects garbage before
    each, need not look through all that is loaded by now.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "plot", lambda table: Figure(figsize=(1, 1)))
        yield _toy(tmp_path_factory.getbasetemp() / "toy")
    gc.unfreeze()


_toy = cache(Toy)


def settings(method: str = "ia3", config_class: type = TrainSettings, **changes) -> TrainSettings:
    return config_class(**{**TOY_SETTINGS, "method": method, "learning_rate": RATES[method], **changes})


def dpo_settings(method: str = "ia3", **changes) -> DpoSettings:
    return settings(method, DpoSettings, **changes)


def encode(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Return a chat's ids in Tulu's format, and a mask of the assistant's ids, including EOS.

    add_generation_prompt: the ids end with the assistant's tag, so that it continues.
    """
    ids, mask = [BOS], [False]
    for turn in turns:
        words = [WORDS.index(word) if word in WORDS else UNK for word in turn["content"].split()]
        is_own = turn["role"] == "assistant"
        words += [EOS] * is_own
        ids += [WORDS.index(f"<|{turn['role']}|>"), *words]
        mask += [False, *[is_own] * len(words)]
    return ([*ids, WORDS.index("<|assistant|>")], [*mask, False]) if add_generation_prompt else (ids, mask)


def log_probs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the log-probability of each token but the first, [T - 1]."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1)[range(len(ids) - 1), list(ids[1:])]


def answer_log_probs(model: nn.Module, pair: Mapping, answer: str) -> Tensor:
    """Return the log-probability of each token of a pair's "chosen" or "rejected", including EOS."""
    prompt, _ = encode(pair["prompt"], add_generation_prompt=True)
    ids, _ = encode([*pair["prompt"], *pair[answer]])
    assert ids[: len(prompt)] == prompt
    return log_probs(model, ids)[len(prompt) - 1 :]


def load_model(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint with transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_vectors(folder: Path) -> list[Tensor]:
    """Return an IA3 adapter's vector of each layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(KEYS)
    return [tensors[key].flatten() for key in KEYS]


@contextmanager
def apply_scales(model: LlamaForCausalLM, scales: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the inputs of each down_proj: IA3 without PEFT."""

    def times(vector: Tensor) -> Callable:
        return lambda _module, inputs: (inputs[0] * vector,)

    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(times(vector))
        for layer, vector in zip(model.model.layers, scales, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def compute_sft_loss(model: nn.Module, limit: int | None = None, add_bos: bool = True) -> Tensor:
    """Return the mean loss over the assistants' tokens in MESSAGES. limit: tokens per row. add_bos: with BOS."""
    parts = []
    for row in MESSAGES:
        ids, mask = (part[not add_bos :][:limit] for part in encode(row["messages"]))
        parts.append(log_probs(model, ids)[torch.tensor(mask[1:])])
    return -torch.cat(parts).mean()


def compute_margins(model: nn.Module) -> Tensor:
    """Return log p(chosen) - log p(rejected) of each pair in PAIRS, in nats."""

    def total(pair: Mapping, answer: str) -> Tensor:
        return answer_log_probs(model, pair, answer).sum()

    return torch.stack([total(pair, "chosen") - total(pair, "rejected") for pair in PAIRS])


def build_dpo_loss(reference: Tensor, beta: float = 0.1) -> Callable[[nn.Module], Tensor]:
    """Return the DPO loss as a function of a model. reference: the SFT model's margins."""
    return lambda model: -nn.functional.logsigmoid(beta * (compute_margins(model) - reference)).mean()


def train_scales(
    model: LlamaForCausalLM,
    start: Sequence[Tensor],
    compute_loss: Callable[[nn.Module], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float,
    target: Sequence[Tensor],
) -> tuple[list[Tensor], list[float]]:
    """Train IA3 scales with a written-out AdamW; return them and each step's loss.

    Betas 0.9 and 0.999, cosine schedule, gradient norm at most 1, weight decay towards `target`.
    """
    scales = [vector.clone().requires_grad_() for vector in start]
    mean, square, losses = [0.0] * len(scales), [0.0] * len(scales), []
    for step in range(1, steps + 1):
        with apply_scales(model, scales):
            loss = compute_loss(model)
        gradients = torch.autograd.grad(loss, scales)
        norm = torch.cat(gradients).norm()
        current_rate = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for i, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
            mean[i] = 0.9 * mean[i] + 0.1 * gradient
            square[i] = 0.999 * square[i] + 0.001 * gradient**2
            move = (mean[i] / (1 - 0.9**step)) / ((square[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                scales[i] -= current_rate * (decay * (scales[i] - target[i]) + move)
        losses.append(loss.item())
    return [vector.detach() for vector in scales], losses
