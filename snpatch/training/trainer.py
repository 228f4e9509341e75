"""SFT and DPO with the trainers of TRL, the adapters of PEFT and the processes of accelerate.

README.md in this folder derives the memory and time that training needs.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import transformers
from jinja2 import TemplateError
from transformers import PrinterCallback, ProgressCallback, Trainer

from snpatch.errors import SnpatchError, first_line
from snpatch.models.hub import resolve_adapter_folder
from snpatch.models.templates import ChatTemplate
from snpatch.training import record, row_filters
from snpatch.training.callbacks import LossMonitor, StepCallback, WeightDecayTowards
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.utils.optional import install_hint, require

try:
    import datasets
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # public

    from snpatch.training import models
except ImportError as error:
    raise ImportError(f"training needs more packages: {install_hint('train')}") from error

PROCESS_TIMEOUT = timedelta(hours=2)  # of processes that wait while one of them reads and tokenizes the rows
SAVE_STEPS = 100  # optimizer steps between checkpoints


def train_sft(
    model: str | Path,
    messages: Sequence[Mapping],
    out: Path,
    settings: TrainSettings | None = None,
    *,
    on_step: StepCallback | None = None,
    save_steps: int = SAVE_STEPS,
    report_to: Sequence[str] = (),
) -> dict:
    """Train on conversations and save an adapter in PEFT's format, or a checkpoint with method = full.

    An interrupted training in `out` resumes from its last checkpoint; a finished one is not repeated. `out` also gets
    training.csv (a row per step), training.json (with provenance), training.png and training.svg.

    Args:
        model: Folder, hub name or name@revision.
        messages: Rows `{"messages": [{"role", "content"}, ...]}`, for example from `Dataset.conversations`. The loss
            covers the assistant's tokens and EOS only.
        out: Output folder: new, empty, or of a training with the same inputs.
        settings: Settings; default: the paper's.
        on_step: Called as `on_step(step, total_steps, logs)` after each step.
        save_steps: Optimizer steps between checkpoints.
        report_to: Integrations of transformers, such as wandb or tensorboard.

    Returns:
        Figures: steps, first_loss, last_loss, rows, truncated, dropped (by reason), unchanged_parameters (names),
        changed_fraction (of the trained values, after rounding to the saved dtype), tokens_per_s (all processes),
        seconds (since the last start), resumed_at (first step of that start), processes.

    Raises:
        SnpatchError: Rows cannot be trained on, the loss is not finite, no weight changed, or `out` contains anything
        else.
    """
    settings = settings or TrainSettings()
    row_filters.check_columns(messages, ("messages",))
    row_filters.check_answered(messages)
    row_filters.check_roles(messages, settings.template)
    inputs = record.describe_inputs("sft", model, None, messages, settings)
    if figures := _start_or_load(out, inputs):
        return figures
    tokenizer, template = models.load_tokenizer(model, settings)
    base = models.load_model(model, settings, _on_gpu())
    config = _build_config(SFTConfig, settings, out, save_steps, report_to, assistant_only_loss=True, max_length=None)
    with _trl_errors():
        trainer = SFTTrainer(
            base,
            config,
            train_dataset=_to_dataset(messages, ("messages",)),
            processing_class=tokenizer,
            peft_config=models.new_adapter_config(settings),
        )
    first_row = _tokenized(trainer)[0]
    row_filters.check_ends(first_row, tokenizer.all_special_ids)
    row_filters.check_prompt_ids(template.encode, _prompt_turns(messages[0]["messages"]), first_row["input_ids"])
    trainer.train_dataset, stats = row_filters.filter_conversations(
        trainer.train_dataset, settings, _context_length(base), row_filters.count_dropped(messages)
    )
    trainer.add_callback(LossMonitor(on_step))
    return _run(trainer, _TrainingJob(model, out, inputs, messages, settings, stats, template, {}))


def train_dpo(
    model: str | Path,
    sft: str | Path | None,
    preferences: Sequence[Mapping],
    out: Path,
    settings: DpoSettings | None = None,
    *,
    on_step: StepCallback | None = None,
    save_steps: int = SAVE_STEPS,
    report_to: Sequence[str] = (),
) -> dict:
    """Train on preference pairs from the SFT model, which is the reference as well, and save the result.

    The reference's log-probabilities are computed at every step by the model that is trained, so at step 1 policy and
    reference are equal bit for bit. IA3 on IA3 saves DPO's own factor (engines stack both: `["sft", "dpo"]`); LoRA on
    LoRA saves one LoRA that contains both.

    Args:
        model: Folder, hub name or name@revision.
        sft: PEFT folder of the SFT adapter on `model`; None if `model` is the SFT model.
        preferences: Rows `{"prompt", "chosen", "rejected"}`, each a list of `{"role", "content"}`.
        out: Output folder, as in `train_sft`.
        settings: Settings; default: the paper's.
        on_step: Called as `on_step(step, total_steps, logs)` after each step.
        save_steps: Optimizer steps between checkpoints.
        report_to: Integrations of transformers, such as wandb or tensorboard.

    Returns:
        Figures as in `train_sft`, with margin and accuracy of the last step.

    Raises:
        SnpatchError: As in `train_sft`, or an SFT scale is exactly 0 (the message names its neuron).
    """
    settings = settings or DpoSettings()
    row_filters.check_columns(preferences, ("prompt", "chosen", "rejected"))
    row_filters.check_roles(preferences, settings.template)
    sft = None if sft is None else resolve_adapter_folder(sft)
    inputs = record.describe_inputs("dpo", model, sft, preferences, settings)
    if figures := _start_or_load(out, inputs):
        return figures
    tokenizer, template = models.load_tokenizer(model, settings)
    models.check_template(sft, template)
    start, adapter = models.prepare_dpo_model(models.load_model(model, settings, _on_gpu()), sft, settings)
    scales = {} if adapter else models.ia3_scales(start)
    sft_scales = {name: scale.detach().clone() for name, scale in scales.items()}
    lengths = {"beta": settings.beta, "max_length": settings.max_length}
    config = _build_config(DPOConfig, settings, out, save_steps, report_to, **lengths)
    with _trl_errors():
        trainer = DPOTrainer(
            start,
            args=config,
            train_dataset=_to_dataset(preferences, ("prompt", "chosen", "rejected")),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    models.freeze_reference(require(trainer.model), sft_scales)
    if len(_tokenized(trainer)):
        first_row = _tokenized(trainer)[0]
        row_filters.check_prompt_ids(template.encode, first_row["prompt"], first_row["prompt_ids"])
    trainer.train_dataset, stats = row_filters.filter_pairs(
        trainer.train_dataset,
        len(preferences),
        settings,
        _context_length(start),
        row_filters.count_dropped(preferences),
    )
    trainer.add_callback(LossMonitor(on_step, first_loss=math.log(2)))
    return _run(trainer, _TrainingJob(model, out, inputs, preferences, settings, stats, template, sft_scales))


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes, of those that accelerate has started."""
    return _processes().is_main_process


def silence_libraries() -> None:
    """Hide progress bars and all messages but errors of transformers, TRL and datasets."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.get_logger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


@dataclass(frozen=True)
class _TrainingJob:
    """A training that is ready to start. sft_scales: IA3 scales that DPO starts from, by module."""

    model: str | Path
    out: Path
    inputs: dict
    data: Sequence[Mapping]
    settings: TrainSettings
    stats: row_filters.RowStats
    template: ChatTemplate
    sft_scales: dict[str, torch.Tensor]


def _processes() -> PartialState:
    """Return accelerate's processes as transformers finds them: on CPUs only with ACCELERATE_USE_CPU."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PROCESS_TIMEOUT)


def _on_gpu() -> bool:
    return require(_processes().device).type == "cuda"


def _start_or_load(out: Path, inputs: dict) -> dict | None:
    """Return the figures of a finished training; None once all processes may start."""
    state = _processes()
    figures = record.start_or_load(out, inputs, state.is_main_process)
    if figures is None:
        state.wait_for_everyone()
    return figures


def _to_dataset(data: Sequence[Mapping], columns: Sequence[str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row[name] for name in columns} for row in data])


def _tokenized(trainer: Trainer) -> datasets.Dataset:
    """Return the rows that TRL has tokenized."""
    return cast(datasets.Dataset, trainer.train_dataset)


def _prompt_turns(turns: list[dict]) -> list[dict]:
    """Return the turns before the assistant's first."""
    end = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return turns[:end]


def _context_length(model) -> int:
    return model.config.get_text_config().max_position_embeddings


@contextmanager
def _trl_errors() -> Iterator[None]:
    """Raise what TRL refuses during set-up as one line.

    For example a template that it cannot mark, several GPUs in one process, or an integration that is not installed.
    """
    try:
        yield
    except (ValueError, RuntimeError, TemplateError) as error:
        raise SnpatchError(f"training: TRL refuses: {first_line(error)}") from error


def _build_config(kind: type, settings: TrainSettings, out: Path, save_steps: int, report_to: Sequence[str], **extra):
    """Return an SFTConfig or a DPOConfig. extra: arguments of that kind alone."""
    for name in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise SnpatchError(
                f"training: expected data parallel training, accelerate's config selects {name}. Weights are compared "
                "and saved whole, by one process; choose another accelerate config"
            )
    in_bf16 = settings.dtype != "float32" and _on_gpu()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bf16 else "no"  # accelerate's config may set another
    processes = _processes().num_processes
    step_rows = settings.micro_batch_size * processes
    if settings.batch_size % step_rows:
        raise SnpatchError(
            f"batch_size: expected a multiple of micro_batch_size x processes = {settings.micro_batch_size} x "
            f"{processes}, got {settings.batch_size}"
        )
    arguments = {
        "output_dir": str(out / record.CHECKPOINTS),
        "learning_rate": settings.peak_learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // step_rows,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "bf16": in_bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": 1,
        "report_to": list(report_to) or "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log the mean of other steps instead
        "dataloader_pin_memory": _on_gpu(),
        "ddp_find_unused_parameters": False if processes > 1 else None,
    }
    with _trl_errors():
        return kind(**arguments, **extra)


def _run(trainer: SFTTrainer | DPOTrainer, job: _TrainingJob) -> dict:
    """Train, check that weights changed, save model and record, and return the figures."""
    state = _processes()
    with record.lock_folder(job.out, state.is_main_process):
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if job.settings.weight_decay_target:
            trainer.add_callback(WeightDecayTowards(_decay_targets(trainer, job.sft_scales)))
        checkpoint = record.find_checkpoint(job.out)
        before = models.trainable_snapshot(require(trainer.model))
        if state.is_main_process:
            record.remove_other_checkpoints(job.out, checkpoint, models.REFERENCE)
        state.wait_for_everyone()
        seconds = _train_from(trainer, checkpoint)
        model = require(trainer.model)
        unchanged, changed_fraction = models.assert_trained(model, before, models.saved_dtype(model, job.model))
        table = record.build_table(trainer.state.log_history)
        figures = {
            "steps": trainer.state.global_step,
            "first_loss": table[0]["loss"],
            "last_loss": table[-1]["loss"],
            **{name: table[-1][name] for name in ("margin", "accuracy") if name in table[-1]},
            "rows": job.stats.rows,
            "truncated": job.stats.truncated,
            "dropped": dict(job.stats.dropped),
            "unchanged_parameters": unchanged,
            "changed_fraction": round(changed_fraction, 4),
            "tokens_per_s": round(trainer._total_train_tokens / seconds, 1),
            "resumed_at": record.checkpoint_step(checkpoint) if checkpoint else 0,
            "seconds": round(seconds, 1),
            "processes": state.num_processes,
        }
        if state.is_main_process:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            tokenizer = cast(transformers.PreTrainedTokenizerBase, trainer.processing_class)
            models.save(trained, job.out, tokenizer, job.template, job.sft_scales, job.model)
            record.write_record(job.out, job.inputs, job.data, figures, job.stats, table)
        state.wait_for_everyone()
        return figures


def _decay_targets(trainer: Trainer, sft_scales: dict[str, torch.Tensor]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return the value without effect of each trained IA3 scale: SFT's in DPO, else 1."""
    scales = models.ia3_scales(require(trainer.model))
    ones = {name: torch.ones_like(scale) for name, scale in scales.items()}
    return {scales[name]: target for name, target in (sft_scales or ones).items()}


def _train_from(trainer: Trainer, checkpoint: Path | None) -> float:
    """Train from a checkpoint, or from the start; return the seconds."""
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise SnpatchError(
            f"training: the GPU is out of memory ({first_line(error)}). Lower micro_batch_size or max_length"
        ) from error
    return time.monotonic() - start
