"""Training of the demo model's base and its score models (cost and reward) from scratch, in plain PyTorch.

Weights are stored in bfloat16 to be small. Their config makes transformers load them as float32, with equal values.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from snpatch.demo import language
from snpatch.demo.corpus import documents
from snpatch.demo.language import LEVELS, DemoRequest

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BodySettings:
    """A Llama model without head and its training; the defaults are the base's (2.4 million parameters)."""

    layers: int = 6
    hidden: int = 192
    neurons: int = 512  # a layer
    heads: int = 6
    kv_heads: int = 2
    steps: int = 1000
    batch_size: int = 64  # conversations
    learning_rate: float = 2e-3


BASE_BODY = BodySettings()
SCORE_BODY = BodySettings(layers=4, hidden=128, neurons=352, heads=4, steps=700)


def train_base(
    folder: Path, tokenizer: PreTrainedTokenizerFast, settings: BodySettings, seed: int, progress: Progress = print
) -> None:
    """Train the language model on conversations that comply or refuse, and save it with its tokenizer."""
    torch.manual_seed(seed)
    config = _config(tokenizer, settings)
    model = LlamaForCausalLM(config)
    batches = documents(language.requests("train"), settings.batch_size, seed)

    def loss() -> Tensor:
        batch = tokenizer(next(batches), padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch, labels=labels).loss

    _optimize(model, loss, settings, progress)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.bfloat16().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _load_as_float32(folder)


def train_score(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    settings: BodySettings,
    seed: int,
    progress: Progress = print,
) -> None:
    """Train a score model on the language's scores, and save it with its tokenizer.

    The files have the Beavertails layout.

    kind: "cost" (lower is safer) or "reward" (higher is better).
    """
    grade = language.GRADES[kind]
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    config = _config(tokenizer, settings)
    body, head = LlamaModel(config), nn.Linear(config.hidden_size, 1)
    requests = language.requests("train")

    def loss() -> Tensor:
        batch_requests = [rng.choice(requests) for _ in range(settings.batch_size)]
        answers = [_draw_answer(request, rng) for request in batch_requests]
        targets = torch.tensor([grade(r, text) for r, text in zip(batch_requests, answers, strict=True)])
        texts = [_format_judge_input(r.text, text, rng) for r, text in zip(batch_requests, answers, strict=True)]
        batch = tokenizer(
            texts, padding=True, return_tensors="pt"
        )  # padded on the left: the last column is the last token
        scores = head(body(**batch).last_hidden_state[:, -1])[:, 0]
        return nn.functional.huber_loss(scores, targets, delta=2.0)

    _optimize(nn.ModuleList([body, head]), loss, settings, progress)
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    tensors |= {f"score_head.{name}": tensor for name, tensor in head.state_dict().items()}
    config.architectures = ["LlamaForScore"]
    config.update({"score_dim": 1, "score_type": kind, "do_normalize": False})
    config.save_pretrained(str(folder))
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    _load_as_float32(folder)


def _draw_answer(request: DemoRequest, rng: random.Random) -> str:
    """Return an answer of any level, whole or damaged.

    Damage: truncated, spliced with another answer, words dropped or repeated.
    """
    words = language.answer(request, rng.choice(LEVELS), rng).split()
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        damage = rng.choice(("truncate", "splice", "splice", "drop", "repeat"))
        at = rng.randrange(len(words) + 1)
        if damage == "truncate":
            words = words[:at]
        elif damage == "splice":
            other = language.answer(request, rng.choice(LEVELS), rng).split()
            words = words[:at] + other[rng.randrange(len(other)) :]
        elif damage == "drop":
            words = [word for word in words if rng.random() > 0.15]
        else:
            words = words[:at] + words[max(0, at - rng.randint(1, 4)) : at] * rng.randint(1, 3) + words[at:]
    return " ".join(words[:32])


def _format_judge_input(prompt: str, completion: str, rng: random.Random) -> str:
    """Return a pair in one of the two formats of the judge (judges/score_format.py)."""
    if rng.random() < 0.5:
        return f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}</s>"
    return f"<|user|>\n{prompt}\n<|assistant|>\n{completion}"


def _config(tokenizer: PreTrainedTokenizerFast, settings: BodySettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=512,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        tie_word_embeddings=False,
    )


def _optimize(model: nn.Module, loss: Callable[[], Tensor], settings: BodySettings, progress: Progress) -> None:
    """Train with AdamW, a short warmup and a cosine schedule to zero."""
    steps, peak = settings.steps, settings.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in (1, steps) or step % 50 == 0:
            progress(f"step {step}/{steps}  loss {value.item():.4f}")


def _load_as_float32(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
