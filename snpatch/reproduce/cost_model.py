"""Estimated time and disk space of each step, before it runs.

Modeled, not measured: training is bound by matrix products, generation by reading weights and KV cache from memory.
Both are computed for one H100 at a share of its peaks that such programs commonly reach. A finished training in the
folder, or the record of a shipped preset, replaces the model. Judging, plots and small files are not included.
"""

import json
import math
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from snpatch import experiments
from snpatch.data.prompt_set import PromptSet
from snpatch.experiments.config import ExperimentConfig
from snpatch.models.checkpoint import load_config
from snpatch.names import CONTRAST_POSITIONS, ROLES
from snpatch.reproduce.pipeline import ADAPTERS, CONTRAST_STEPS, AdapterTraining, Pipeline
from snpatch.reproduce.preset import PRESET_NAMES, Size
from snpatch.utils.optional import require

TRAIN_FLOPS = 0.4 * 989e12  # per second: 40 % of an H100's dense bfloat16 peak
READ_BYTES = 0.6 * 3.35e12  # per second: 60 % of an H100's memory bandwidth
GENERATION_BATCH_SIZE = 128  # pairs of rows per decode step
MEAN_CONTEXT_TOKENS = 400  # per row and decode step
PASSES = {"sft": 3, "dpo": 4}  # forward, recomputation, backward through frozen weights; DPO: the reference's forward
COMPLETION_BYTES, TOKEN_BYTES = 700, 6  # in the store: of a completion with its labels and scores, and of each token
WIKITEXT_TOKENS = 341_469  # Wikitext-2 test
BYTES_PER_TOKEN = 4  # of text files, about
DEFAULT_PROMPTS = 200  # in a dataset of unknown size


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of a step.

    Args:
        seconds: GPU seconds; None if the size of an input is not known before it is loaded.
        disk_gb: Completions in the store, in GB.
        source: How the estimate was made.
    """

    seconds: float | None = 0.0
    disk_gb: float = 0.0
    source: str = ""


def estimate_cost(pipeline: Pipeline, name: str, size: Size | None) -> CostEstimate:
    """Return the estimated cost of a step. size: of the model."""
    record = _shipped_record(pipeline)
    if name in record.get("seconds", {}):
        tokens = pipeline.config.max_tokens
        completions = _num_completions(pipeline, name) if name in experiments.NAMES else 0
        return CostEstimate(record["seconds"][name], _store_gb(completions, tokens), f"measured: {record['machine']}")
    if name == "rows":
        return CostEstimate(1.0, source="files")
    if size is None:
        return CostEstimate(None, source="the model's size is not known; add [size] to the preset")
    if name in pipeline.trainings:
        return _estimate_training(pipeline, pipeline.trainings[name], size)
    if name.startswith(tuple(f"{prefix}-" for _, prefix in CONTRAST_STEPS)):
        return _estimate_generation(pipeline, _num_contrast_prompts(pipeline), pipeline.config.contrast_tokens, size)
    if name in pipeline.ability_targets:
        return _estimate_ability(pipeline, size)
    return _estimate_experiment(pipeline, name, size)


def model_size(pipeline: Pipeline) -> Size | None:
    """Return the size of the model: from its config if it is a local folder, else from the preset."""
    model = pipeline.config.resolve_path(pipeline.config.engine.model)
    if not Path(model).is_dir():
        return pipeline.preset.size
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, allow_untested=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Size(parameters, config.num_hidden_layers * config.num_key_value_heads * head_dim * 4)


@cache
def read_sizes() -> dict:
    """Return the sizes of published datasets, from sizes.toml."""
    return tomllib.loads((Path(__file__).parent / "sizes.toml").read_text(encoding="utf-8"))


@cache
def _read_measured() -> dict:
    """Return the machine and seconds of shipped presets that were run whole (make bench-reproduce)."""
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


def _shipped_record(pipeline: Pipeline) -> dict:
    is_shipped = pipeline.preset.name in PRESET_NAMES and pipeline.limit is None and pipeline.preset.size is not None
    return _read_measured().get(pipeline.preset.name, {}) if is_shipped else {}


# Trainings


def _estimate_training(pipeline: Pipeline, training: AdapterTraining, size: Size) -> CostEstimate:
    kind = "dpo" if training.sft else "sft"
    tokens = _num_training_tokens(pipeline, training.data, require(pipeline.preset.training).data[training.data])
    if tokens is None:
        return CostEstimate(None, source="rows of unknown size")
    tokens *= training.settings.epochs
    if measured := _measured_rate(pipeline):
        other, rate, processes = measured
        rate *= PASSES["dpo" if pipeline.trainings[other].sft else "sft"] / PASSES[kind]
        source = f"measured: {rate:.0f} tokens/s, by {other}" + (f", {processes} processes" if processes > 1 else "")
        return CostEstimate(processes * tokens / rate, source=source)
    rate = TRAIN_FLOPS / (2 * size.parameters * PASSES[kind])
    source = f"modeled for an H100: {tokens:.3g} tokens, {rate:.0f} tokens/s at 40 % of its peak"
    return CostEstimate(tokens / rate, source=source)


def _measured_rate(pipeline: Pipeline) -> tuple[str, float, int] | None:
    """Return a finished training of this folder, its tokens per second and its number of processes."""
    for name in pipeline.trainings:
        path = pipeline.out / ADAPTERS / name / "training.json"
        if name in pipeline.steps.steps and pipeline.steps.reason(name) is None:
            figures = json.loads(path.read_text(encoding="utf-8"))["provenance"]["figures"]
            if not figures["resumed_at"]:  # a resumed training's rate is that of its last part
                return name, figures["tokens_per_s"], figures["processes"]
    return None


def _num_training_tokens(pipeline: Pipeline, name: str, data: PromptSet) -> float | None:
    """Return the tokens of training data.

    They are computed from the size of a local file, or from sizes.toml for a published set.
    """
    path = Path(pipeline.config.resolve_path(data.source))
    limits = [n for n in (data.first, data.sample) if n is not None]
    if path.is_file():
        lines = _count_lines(path)
        return path.stat().st_size / BYTES_PER_TOKEN * min([lines, *limits]) / max(lines, 1)
    size = read_sizes().get(name) or read_sizes().get(data.source)
    return None if size is None else min([size["rows"], *limits]) * size["tokens"]


# Generation


def _estimate_experiment(pipeline: Pipeline, name: str, size: Size) -> CostEstimate:
    config, settings = pipeline.config, experiments.resolve_settings(pipeline.config, name)
    completions = _num_completions(pipeline, name)
    contrast_completions = _num_extra_contrasts(pipeline, name, settings) * _num_contrast_prompts(pipeline)
    cost = _estimate_generation(pipeline, completions, config.max_tokens, size, contrast_completions)
    if name in ("perplexity", "transfer") and settings.text:
        points = len(config.recipients) * (len({0, *settings.k}) if name == "perplexity" else 2) + 1
        seconds = points * WIKITEXT_TOKENS * 2 * 2 * size.parameters / TRAIN_FLOPS
        return CostEstimate(require(cost.seconds) + seconds, cost.disk_gb, f"{cost.source}; {points} perplexities")
    return cost


def _estimate_ability(pipeline: Pipeline, size: Size) -> CostEstimate:
    """Return the cost of all tasks of general ability: prompts and completions, in two streams."""
    sizes, prompt_tokens, new_tokens = read_sizes()["ability"], 0, 0
    for name, task in pipeline.preset.ability.tasks.items():
        if name not in sizes:
            return CostEstimate(None, source=f"rows of unknown size: {name}")
        task_size = sizes[name]
        rows = min(task_size["rows"], (task.limit or task_size["rows"]) * task_size.get("tasks", 1))
        prompt_tokens += rows * task_size["prompt_tokens"]
        new_tokens += rows * task_size["new_tokens"]
    generation = require(_estimate_generation(pipeline, 1, new_tokens, size).seconds)
    reading = prompt_tokens * 2 * 2 * size.parameters / TRAIN_FLOPS
    source = f"modeled for an H100: {prompt_tokens:.3g} prompt tokens and {new_tokens:.3g} new ones"
    return CostEstimate(generation + reading, source=source)


def _estimate_generation(
    pipeline: Pipeline, completions: int, tokens: int, size: Size, contrast_completions: int = 0
) -> CostEstimate:
    """Return the cost of `completions` of `tokens` each in two streams.

    It includes the completions that extra contrasts read.
    """
    if not completions and not contrast_completions:
        return CostEstimate(source="no completions of its own")
    weight_sets = 1 if pipeline.config.engine.secondary is None else 2
    kv_bytes = 2 * GENERATION_BATCH_SIZE * MEAN_CONTEXT_TOKENS * size.kv_bytes
    step_seconds = (2 * weight_sets * size.parameters + kv_bytes) / READ_BYTES
    rate = GENERATION_BATCH_SIZE / step_seconds
    seconds = (completions * tokens + contrast_completions * pipeline.config.contrast_tokens) / rate
    source = (
        f"modeled for an H100: {completions} completions of {tokens} tokens, {rate:.0f} tokens/s at 60 % of its memory "
        "bandwidth"
    )
    return CostEstimate(seconds, _store_gb(completions, tokens), source)


def _store_gb(completions: int, tokens: int) -> float:
    return completions * (COMPLETION_BYTES + TOKEN_BYTES * tokens) / 1e9


def _num_completions(pipeline: Pipeline, name: str) -> int:
    """Return the number of completions that an experiment generates and judges."""
    count = COMPLETION_COUNTS.get(name)
    return count(pipeline, experiments.resolve_settings(pipeline.config, name)) if count else 0


def _num_extra_contrasts(pipeline: Pipeline, name: str, settings) -> int:
    """Return the contrasts that an experiment makes besides those of the config."""
    if name == "positions":
        return len(CONTRAST_POSITIONS) - 1
    if name == "model_pairs":
        return len(ROLES) * math.comb(len(settings.models) or 3, 2) - 1
    return _num_contrast_sets(pipeline, settings) if name == "specificity" else 0


def _num_contrast_sets(pipeline: Pipeline, settings) -> int:
    return len(settings.contrast_prompts or pipeline.config.benchmarks)


def _num_contrast_prompts(pipeline: Pipeline) -> int:
    return _num_prompts(pipeline, pipeline.config.safety.prompts)


def _num_prompts(pipeline: Pipeline, name: str) -> int:
    """Return the number of prompts of a dataset.

    It is limited by the config, and by the file's lines or the published size.
    """
    prompts = pipeline.config.sets[name]
    limits = [n for n in (prompts.first, prompts.last, prompts.sample, pipeline.limit) if n is not None]
    path = Path(pipeline.config.resolve_path(prompts.source))
    if path.is_file():
        limits.append(_count_lines(path))
    elif prompts.source in read_sizes():
        limits.append(read_sizes()[prompts.source]["rows"])
    return min(limits, default=DEFAULT_PROMPTS)


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _num_points(pipeline: Pipeline, windows: int, controls: int) -> int:
    """Return the completions per prompt of a sweep over windows.

    It counts each recipient's, and the unpatched models'.
    """
    recipients = len(pipeline.config.recipients)
    return recipients * windows * (1 + controls) + recipients + 1


def _num_benchmark_prompts(pipeline: Pipeline, names: Sequence[str]) -> int:
    return sum(_num_prompts(pipeline, name) for name in names or pipeline.config.benchmarks)


def _sweep_counter(num_windows: Callable[[Any], int]) -> Callable[[Pipeline, Any], int]:
    def count(pipeline: Pipeline, settings) -> int:
        prompts = _num_prompts(pipeline, settings.prompts or pipeline.config.benchmarks[0])
        return prompts * _num_points(pipeline, num_windows(settings), settings.controls)

    return count


def _effect_counter(get_rankings: Callable[[ExperimentConfig], Collection]) -> Callable[[Pipeline, Any], int]:
    """Return a counter of an experiment that patches `effect_k` neurons of each of several rankings."""

    def count(pipeline: Pipeline, settings) -> int:
        num_rankings = len(get_rankings(pipeline.config))
        count_sweep = _sweep_counter(lambda s: len(s.effect_k) * num_rankings)
        return count_sweep(pipeline, settings) if settings.effect_k else 0

    return count


def _count_tax(pipeline: Pipeline, settings) -> int:
    sets = settings.prompts or pipeline.config.benchmarks[:1]
    return 2 * _num_benchmark_prompts(pipeline, sets) * (3 + settings.controls)


COMPLETION_COUNTS: dict[str, Callable[[Pipeline, Any], int]] = {  # of the experiments that generate any
    "curve": _sweep_counter(lambda s: len(s.k)),
    "curve_over_seeds": lambda p, s: len(p.config.seeds) * _sweep_counter(lambda s: len(s.k))(p, s),
    "sliding_window": _sweep_counter(lambda s: math.floor(s.last / s.stride) + 1),
    "positions": _effect_counter(lambda config: CONTRAST_POSITIONS),
    "objectives": _effect_counter(lambda config: config.contrasts),
    "stability": _effect_counter(lambda config: config.seeds),
    "transfer": lambda p, s: _num_benchmark_prompts(p, s.benchmarks) * _num_points(p, 1, s.controls),
    "model_pairs": _sweep_counter(lambda s: len(s.k) * len(ROLES) * math.comb(len(s.models) or 3, 2)),
    "specificity": lambda p, s: _sweep_counter(lambda s: len(s.k) * _num_contrast_sets(p, s))(p, s),
    "alignment_tax": _count_tax,
    "competition": lambda p, s: _num_benchmark_prompts(p, s.benchmarks) * (3 + s.controls),
    "judge_agreement": _sweep_counter(lambda _: 1),
    "guard": lambda p, s: _num_benchmark_prompts(p, s.prompts),
    "safeguard": lambda p, s: 2 * _num_benchmark_prompts(p, s.prompts),
}
