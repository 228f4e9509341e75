"""The paper's training: IA3 vectors on `down_proj` by SFT, then by DPO on top of them, through TRL and PEFT.

The DPO adapter is trained on a model into which the SFT vectors are merged, and saved alone. Both scale the same
inputs, so at use time the two vectors are multiplied: SFT * DPO, in that order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from snpatch.errors import SnpatchError
from snpatch.files import write_text
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import FILE, TULU
from snpatch.training.settings import DpoSettings, TrainSettings

try:
    from datasets import Dataset
    from peft import IA3Config, PeftModel
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("training needs more packages: pip install 'snpatch[train]'") from error


def train_sft(
    model: str | Path,
    messages: Sequence[Mapping[str, Any]] | Dataset,
    out: Path,
    settings: TrainSettings,
    progress: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train an IA3 adapter of `model` (a folder or hub id) on conversations and save it to `out` in PEFT's format.

    `messages`: rows {"messages": [{"role", "content"}, ...]}. The loss covers the assistant's tokens and EOS only.
    Returns the run's figures: `steps`, and `first_loss` and `last_loss` (means of the first and the last logged steps).
    Raises SnpatchError if there are no rows or the loss is not finite.
    """
    dataset = _dataset(messages, ("messages",))
    network, tokenizer = _load(model, settings)
    config = SFTConfig(
        **_arguments(settings, out), assistant_only_loss=True, packing=False, max_length=settings.max_length
    )
    trainer = SFTTrainer(network, config, train_dataset=dataset, processing_class=tokenizer, peft_config=_ia3())
    return _run(trainer, out, progress)


def train_dpo(
    model: str | Path,
    sft_adapter: Path,
    preferences: Sequence[Mapping[str, Any]] | Dataset,
    out: Path,
    settings: DpoSettings,
    progress: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train an IA3 adapter on top of the SFT adapter by DPO and save it alone to `out` in PEFT's format.

    `preferences`: rows {"prompt", "chosen", "rejected"}, each a list of {"role", "content"}. The reference is the SFT
    model. Returns and raises as `train_sft` does; a pair whose two answers have the same tokens is an error too,
    because its loss stays at log 2 and teaches nothing.
    """
    dataset = _dataset(preferences, ("prompt", "chosen", "rejected"))
    network, tokenizer = _load(model, settings)
    dataset = dataset.filter(lambda row: _prompt_tokens(row, tokenizer) <= settings.max_prompt_length)
    _check_pairs(dataset, tokenizer, settings)
    network = PeftModel.from_pretrained(network, str(sft_adapter)).merge_and_unload()
    config = DPOConfig(
        **_arguments(settings, out),
        beta=settings.beta,
        max_length=settings.max_length,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=settings.micro_batch_size,
    )
    trainer = DPOTrainer(  # given peft_config, its reference is the model with the new adapter switched off
        network, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=_ia3()
    )
    return _run(trainer, out, progress)


def _dataset(rows: Sequence[Mapping[str, Any]] | Dataset, columns: Sequence[str]) -> Dataset:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    missing = [column for column in columns if column not in dataset.column_names]
    if not len(dataset) or missing:
        got = f"{len(dataset)} rows with columns {dataset.column_names}"
        raise SnpatchError(f"training data: wanted rows with the columns {list(columns)}, got {got}")
    return dataset.select_columns(list(columns))


def _load(model: str | Path, settings: TrainSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_pretrained(AutoTokenizer, model)
    tokenizer.chat_template = TULU
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return load_pretrained(AutoModelForCausalLM, model, dtype=dtype), tokenizer


def _ia3() -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])


def _arguments(settings: TrainSettings, out: Path) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share."""
    return {
        "output_dir": str(out),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _prompt_tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])


def _check_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DpoSettings) -> None:
    if not len(dataset):
        raise SnpatchError(
            f"training data: every prompt is longer than max_prompt_length={settings.max_prompt_length} tokens"
        )
    for index, row in enumerate(dataset):
        chosen, rejected = (
            tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise SnpatchError(f"training data: chosen and rejected of pair {index} are the same tokens")


class _Lines(TrainerCallback):
    """Reports the loss in one line every `logging_steps` steps."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress

    def on_log(self, args, state, control, logs, **kwargs) -> None:  # the signature is transformers'
        if "loss" in logs:
            self.progress(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}")


def _run(trainer: Trainer, out: Path, progress: Callable[[str], None]) -> dict[str, float]:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Lines(progress))
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(loss) for loss in losses):
        raise SnpatchError(f"training: the loss is not finite (last {losses[-1]}); lower the learning rate")
    trainer.model.save_pretrained(str(out))
    write_text(out / FILE, TULU)  # so that prompts are made with it
    return {"steps": trainer.state.global_step, "first_loss": losses[0], "last_loss": losses[-1]}
