"""SFT and DPO through TRL, PEFT and accelerate: what is trained, resumed, checked and told. No trainer of its own.

Several GPUs: `accelerate launch -m snpatch.cli train ...`, by accelerate's own config; batch_size is over all of them.

What bounds it, for Llama-2-7B (bf16) with IA3 on `down_proj`. Memory: the weights are 13.5 GB; the 352,256 scales,
their gradients and AdamW's two moments 5.6 MB. Gradient checkpointing of a micro batch of 4 x 4096 tokens keeps 33
inputs of layers, 4 x 4096 x 4096 x 2 B each: 4.4 GB; while a layer is computed again its MLP holds 4 x 4096 x 11008
numbers about four times in bf16 and, for IA3's product, twice in float32: 2.9 GB; its attention 0.7 GB. TRL's LM head
never holds all logits (they would be 2.1 GB). 22 GB in all, so that a card of 40 GB does; DPO's 4 pairs are 8
sequences: 30 GB at full length. Time: a frozen weight has no gradient of its own, so a token costs 2 x 6.7e9 FLOP
forward, as much when it is computed again, and as much backward: 40 GFLOP; DPO's reference adds a forward pass: 54. It
is bound by the rate of matrix products: at 40 % of an H100's peak 9,800 tokens a second for SFT, so that three epochs
of ShareGPT (estimated 1.2e8 tokens) take 10.4 hours, and 7,300 for DPO: 1.9 hours for HH harmless. `snpatch reproduce
--dry-run` multiplies this out, by a measured rate where there is one.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from matplotlib.figure import Figure
from transformers import PrinterCallback, ProgressCallback, Trainer

from snpatch.data.dataset import TrainingRows
from snpatch.environment import describe
from snpatch.errors import SnpatchError, first_line
from snpatch.files import check_writable, write_text
from snpatch.models.fingerprint import (
    fingerprint_adapter,
    fingerprint_checkpoint,
    fingerprint_tokenizer_files,
    local_model_folder,
    local_adapter_folder,
)
from snpatch.report import files
from snpatch.report.report import Report, TableView
from snpatch.training import row_filters
from snpatch.training.callbacks import LossMonitor, Watch, WeightDecayTowards
from snpatch.training.settings import DpoSettings, TrainSettings

try:
    import datasets
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from snpatch.training import models
except ImportError as error:
    raise ImportError("training needs more packages: pip install 'snpatch[train]'") from error

PATIENCE = timedelta(hours=2)  # of processes that wait while one of them reads and tokenizes the rows
SAVE_STEPS = 100  # optimiser steps
RECORD = "training"  # OUT/training.json tells that the training is done, and of what
CHECKPOINTS, ASKED, LOCK = "checkpoints", "asked.json", "lock"
LOGGED = {  # a column of the table -> TRL's name for it
    "epoch": "epoch",
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "token_accuracy": "mean_token_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


def train_sft(
    model: str | Path,
    messages: Sequence[Mapping],
    out: Path,
    settings: TrainSettings | None = None,
    *,
    watch: Watch | None = None,
    save_steps: int = SAVE_STEPS,
    report_to: Sequence[str] = (),
) -> dict:
    """Train on conversations and save to `out`: an adapter in PEFT's format, or with method = full a checkpoint.

    model: folder, name or name@revision. messages: rows {"messages": [{"role", "content"}, ...]}, as
    `Dataset.conversations` gives them with a count of what it left out; the loss covers the assistant's tokens and EOS
    only. watch: is told of each step. save_steps: steps between checkpoints. report_to:
    transformers' integrations (wandb, tensorboard, ...).

    `out` may hold the very same training: one that is done is not done again, one that was interrupted goes on from its
    last checkpoint. It gets training.csv (a row a step), .json (with provenance), .png and .svg. Returns the figures:
    steps, first_loss, last_loss, rows, truncated, dropped, unchanged_parameters, changed_fraction (share of the trained
    numbers that are others as they are saved), tokens_per_s (of all processes), seconds (of the last leg), resumed_at
    (the step that it began with). Raises SnpatchError for rows that cannot be trained on, a loss that is not a number,
    weights that did not move, and an `out` that holds anything else.
    """
    settings = settings or TrainSettings()
    row_filters.check_columns(messages, ("messages",))
    row_filters.check_answered(messages)
    row_filters.check_roles(messages, settings.template)
    asked = _asked("sft", model, None, messages, settings)
    if kept := _begin(out, asked):
        return kept
    tokenizer, template = models.open_tokenizer(model, settings)
    network = models.open_network(model, settings, _on_gpu())
    config = _config(SFTConfig, settings, out, save_steps, report_to, assistant_only_loss=True, max_length=None)
    with _refusals():
        trainer = SFTTrainer(
            network,
            config,
            train_dataset=_dataset(messages, ("messages",)),
            processing_class=tokenizer,
            peft_config=models.fresh_adapter(settings),
        )
    row_filters.check_ends(trainer.train_dataset[0], tokenizer.all_special_ids)
    first = messages[0]["messages"]
    asked_first = first[: next((i for i, turn in enumerate(first) if turn["role"] == "assistant"), len(first))]
    row_filters.check_read_alike(template.ids, asked_first, trainer.train_dataset[0]["input_ids"])
    trainer.train_dataset, counts = row_filters.conversations(
        trainer.train_dataset, settings, _context(network), row_filters.dropped_before(messages)
    )
    trainer.add_callback(LossMonitor(watch))
    return _run(trainer, model, out, asked, messages, settings, counts, template, {})


def train_dpo(
    model: str | Path,
    sft: str | Path | None,
    preferences: Sequence[Mapping],
    out: Path,
    settings: DpoSettings | None = None,
    *,
    watch: Watch | None = None,
    save_steps: int = SAVE_STEPS,
    report_to: Sequence[str] = (),
) -> dict:
    """Train on pairs of a better and a worse answer, from the SFT model, which is the reference, too; save to `out`.

    sft: the SFT model's PEFT folder on `model`; None: `model` is the SFT model. preferences: rows {"prompt", "chosen",
    "rejected"}, each a list of {"role", "content"}. The reference's log-probabilities are computed at every step by the
    very network that is trained, so that at the first step the two are equal, bit for bit.

    What is saved: of IA3 on IA3 DPO's own factor (engines stack both: `["sft", "dpo"]`); of LoRA on LoRA one LoRA that
    holds both. Further arguments, figures (margin and accuracy of the last step, too) and errors as `train_sft`'s; an
    SFT scale of exactly 0 is an error that names its neuron.
    """
    settings = settings or DpoSettings()
    row_filters.check_columns(preferences, ("prompt", "chosen", "rejected"))
    row_filters.check_roles(preferences, settings.template)
    sft = None if sft is None else local_adapter_folder(sft)
    asked = _asked("dpo", model, sft, preferences, settings)
    if kept := _begin(out, asked):
        return kept
    tokenizer, template = models.open_tokenizer(model, settings)
    models.check_template(sft, template)
    network, adapter = models.on_sft(models.open_network(model, settings, _on_gpu()), sft, settings)
    start = {} if adapter else {name: vector.detach().clone() for name, vector in models.scales(network).items()}
    lengths = {"beta": settings.beta, "max_length": settings.max_length}
    config = _config(DPOConfig, settings, out, save_steps, report_to, **lengths)
    with _refusals():
        trainer = DPOTrainer(
            network,
            args=config,
            train_dataset=_dataset(preferences, ("prompt", "chosen", "rejected")),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    models.freeze_reference(trainer.model, start)
    if len(trainer.train_dataset):
        row_filters.check_read_alike(
            template.ids, trainer.train_dataset[0]["prompt"], trainer.train_dataset[0]["prompt_ids"]
        )
    trainer.train_dataset, counts = row_filters.pairs(
        trainer.train_dataset, len(preferences), settings, _context(network), row_filters.dropped_before(preferences)
    )
    trainer.add_callback(LossMonitor(watch, first=math.log(2)))
    return _run(trainer, model, out, asked, preferences, settings, counts, template, start)


def is_done(out: Path) -> bool:
    """Whether a folder holds a training that has ended."""
    return (out / f"{RECORD}.json").is_file()


def told(out: Path) -> list[str]:
    """What a training that is done says of itself."""
    return json.loads((out / f"{RECORD}.json").read_text(encoding="utf-8"))["headline"]


def is_main() -> bool:
    """Whether this is the process that tells and writes, of those that accelerate has started."""
    return _processes().is_main_process


def quiet() -> None:
    """Keep what transformers, TRL and datasets say besides errors to themselves: training tells of itself."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.get_logger("trl").setLevel("ERROR")
    datasets.disable_progress_bars()


def _processes() -> PartialState:
    """The processes that accelerate has started, found as transformers finds them: on CPUs only where it is told so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def _on_gpu() -> bool:
    return _processes().device.type == "cuda"


def _asked(kind: str, model: str | Path, sft: Path | None, data: Sequence[Mapping], settings: TrainSettings) -> dict:
    """All that the result hangs on, by content."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    dropped = {"dropped": found} if (found := row_filters.dropped_before(data)) else {}
    return {
        "kind": kind,
        "model": fingerprint_checkpoint(model),
        "tokenizer": fingerprint_tokenizer_files(local_model_folder(model)),
        "sft": sft and fingerprint_adapter(sft),
        "data": {"rows": len(data), "sha256": digest.hexdigest(), **dropped},
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def _begin(out: Path, asked: dict) -> dict | None:
    """The figures of this very training, if `out` has it done; an error if `out` has another."""
    record, begun = out / f"{RECORD}.json", out / CHECKPOINTS / ASKED
    if record.is_file():
        figures = _read(record, "provenance", "figures")
        _check_same(out, asked, _read(record, "provenance", "asked"))
        if _processes().is_main_process:  # what a kill after the record left
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        return figures
    if begun.is_file():
        _check_same(out, asked, _read(begun))
    check_writable(record)
    if not begun.is_file() and (any(out.glob("adapter_model.*")) or (out / "config.json").exists()):
        raise SnpatchError(f"{out}: holds a model that was not trained here; choose another folder")
    state = _processes()
    if state.is_main_process:
        write_text(begun, json.dumps(asked, indent=1) + "\n")
    state.wait_for_everyone()
    return None


def _read(path: Path, *keys: str) -> dict:
    """A table of a training's record, by the keys that lead to it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            told = told[key]
        return dict(told)
    except (ValueError, KeyError, TypeError) as error:
        raise SnpatchError(f"{path}: damaged ({error}): remove its folder, or choose another") from error


def _check_same(out: Path, asked: dict, kept: dict) -> None:
    """An error that names what a folder's training has otherwise than what is asked for."""
    name = next((name for name in asked if kept.get(name) != asked[name]), None)
    if name is None:
        return
    wanted, got = asked[name], kept.get(name)
    if name == "settings":
        both = {**got, **wanted}
        name = next(n for n in both if got.get(n) != wanted.get(n))
        wanted, got = wanted.get(name), got.get(name)
    raise SnpatchError(
        f"{out}: holds another training: {name} is to be {wanted}, it has {got}; "
        "choose another folder, or remove this one"
    )


def _dataset(data: Sequence[Mapping], columns: Sequence[str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row[name] for name in columns} for row in data])


def _context(network) -> int:
    """The longest sequence that a model was made for."""
    return network.config.get_text_config().max_position_embeddings


@contextmanager
def _refusals() -> Iterator[None]:
    """What TRL refuses as it is set up, in one line: templates that it cannot mark, several GPUs in one process, an
    integration that is not installed."""
    try:
        yield
    except (ValueError, RuntimeError, TemplateError) as error:
        raise SnpatchError(f"training: TRL refuses: {first_line(error)}") from error


def _config(kind: type, settings: TrainSettings, out: Path, save_steps: int, report_to: Sequence[str], **own):
    """An SFTConfig or a DPOConfig. own: what that kind alone has, or wants otherwise."""
    for name in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise SnpatchError(
                f"training: accelerate's config asks for {name}: only data parallel training is supported (weights are "
                "compared and saved whole, by one process)"
            )
    in_bf16 = settings.dtype != "float32" and _on_gpu()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bf16 else "no"  # accelerate's config has one, too
    processes = _processes().num_processes
    at_once = settings.micro_batch_size * processes
    if settings.batch_size % at_once:
        raise SnpatchError(
            f"batch_size must be divided by micro_batch_size x processes, got {settings.batch_size} and "
            f"{settings.micro_batch_size} x {processes}"
        )
    arguments = {
        "output_dir": str(out / CHECKPOINTS),
        "learning_rate": settings.rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // at_once,
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
        "logging_nan_inf_filter": False,  # it would show the mean of other steps instead
        "dataloader_pin_memory": _on_gpu(),
        "ddp_find_unused_parameters": False if processes > 1 else None,
    }
    with _refusals():
        return kind(**arguments, **own)


def _last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint. trainer_state.json is what is written last."""
    found = sorted((out / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _clear(out: Path, checkpoint: Path | None) -> None:
    """Remove broken checkpoints, and TRL's reference from the one to go on from.

    Beside that, transformers would not load the trained adapter; the reference is made anew from SFT's folder.
    """
    for path in (out / CHECKPOINTS).glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path)
    if checkpoint:
        shutil.rmtree(checkpoint / models.REFERENCE, ignore_errors=True)


def _run(
    trainer: Trainer,
    model: str | Path,
    out: Path,
    asked: dict,
    data: Sequence[Mapping],
    settings: TrainSettings,
    counts: row_filters.Counts,
    template,
    start: dict[str, torch.Tensor],
) -> dict:
    """Train, check, save, tell. start: the SFT scales that DPO goes on from."""
    with _alone(out):
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if settings.weight_decay_target:
            vectors = models.scales(trainer.model)
            ones = {name: torch.ones_like(vector) for name, vector in vectors.items()}
            trainer.add_callback(WeightDecayTowards({vectors[name]: to for name, to in (start or ones).items()}))
        state, checkpoint = _processes(), _last_checkpoint(out)
        before = models.moving(trainer.model)
        if state.is_main_process:
            _clear(out, checkpoint)
        state.wait_for_everyone()
        begin = time.monotonic()
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise SnpatchError(
                f"training: the GPU's memory is full ({first_line(error)}): lower micro_batch_size or max_length"
            ) from error
        seconds = time.monotonic() - begin
        unchanged, changed_fraction = models.check_moved(trainer.model, before, models.kept_dtype(trainer.model, model))
        table = [
            {"step": entry["step"], **{name: entry[key] for name, key in LOGGED.items() if key in entry}}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        figures = {
            "steps": trainer.state.global_step,
            "first_loss": table[0]["loss"],
            "last_loss": table[-1]["loss"],
            **{name: table[-1][name] for name in ("margin", "accuracy") if name in table[-1]},
            "rows": counts.rows,
            "truncated": counts.truncated,
            "dropped": dict(counts.dropped),
            "unchanged_parameters": unchanged,
            "changed_fraction": round(changed_fraction, 4),
            "tokens_per_s": round(trainer._total_train_tokens / seconds, 1),
            "resumed_at": int(checkpoint.name.split("-")[1]) if checkpoint else 0,
            "seconds": round(seconds, 1),
            "processes": state.num_processes,
        }
        if state.is_main_process:
            network = trainer.accelerator.unwrap_model(trainer.model)
            models.save(network, out, trainer.processing_class, template, start, model)
            files.write(_report(asked, data, figures, counts, table), out)
            shutil.rmtree(out / CHECKPOINTS)
        state.wait_for_everyone()
        return figures


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """An error if another process trains in this folder."""
    with open(out / CHECKPOINTS / LOCK, "w") as file:
        try:
            if _processes().is_main_process:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnpatchError(f"{out}: another process trains in this folder") from None
        yield


def _report(
    asked: dict, data: Sequence[Mapping], figures: dict, counts: row_filters.Counts, table: list[dict]
) -> Report:
    """The run as a table of its steps, with a plot."""
    last = table[-1]
    told = [f"{asked['kind']}: {figures['steps']} steps, loss {table[0]['loss']:.4f} -> {last['loss']:.4f}"]
    if "margin" in last:
        told[0] += f", margin {last['margin']:.3f}, accuracy {last['accuracy']:.0%}"
    if names := figures["unchanged_parameters"]:
        told.append(f"{len(names)} trained parameters did not change, {names[0]} first")
    if figures["changed_fraction"] < 0.5:
        told.append(
            f"only {figures['changed_fraction']:.1%} of the trained numbers differ from the start's as they are saved"
        )
    shown = TableView.of([figures], {name: name for name in figures if name not in ("dropped", "unchanged_parameters")})
    source = {"source": data.source} if isinstance(data, TrainingRows) else {}
    provenance = {"asked": asked, "figures": figures, **source, **describe()}
    return Report(RECORD, {RECORD: table}, {RECORD: _plot(table)}, shown, [*told, *counts.told], provenance)


def _plot(table: list[dict]) -> Figure:
    """Each column that training is judged by, against the steps."""
    names = [name for name in ("loss", "margin", "accuracy", "token_accuracy") if name in table[0]]
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in table], [row[name] for row in table])
        axis.set(xlabel="step", ylabel=name.replace("_", " "))
        axis.grid(alpha=0.3)
    return figure
