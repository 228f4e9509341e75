"""Checks of a checkpoint: its architecture, its EOS tokens, and whether its weights are finite.

Why weights are checked while they are loaded: an engine may pack them afterwards and free the originals.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from snpatch.errors import SnpatchError, first_line, shown
from snpatch.models.checkpoint_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE
from snpatch.models.hub import resolve_model_folder
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained
from snpatch.utils.tensors import is_finite

TESTED_ARCHITECTURES = (
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen3",
    "phi3",
)
# Fields of a generation config that engines read, that requests set, or that change no completion.
KNOWN_GENERATION_FIELDS = (
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "temperature", "top_k",
    "top_p", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_return_sequences", "use_cache",
    "cache_implementation", "cache_config", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "return_dict_in_generate", "return_legacy_cache", "compile_config", "disable_compile",
    "prefill_chunk_size", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp", "early_stopping", "length_penalty",
    "low_memory", "generation_kwargs", "transformers_version", "trust_remote_code", "continuous_batching_config",
)  # fmt: skip


def load_config(model: str | Path, allow_untested: bool):
    """Load a model's config.

    Raises:
        SnpatchError: The architecture is not tested, its rotary positions depend on other requests of a batch, or the
            folder is a PEFT adapter.
    """
    if (Path(model) / ADAPTER_CONFIG_FILE).is_file() and not (Path(model) / CONFIG_FILE).is_file():
        raise SnpatchError(
            f"{model}: expected a model, got a PEFT adapter. Pass it as adapters={{...}}, or merge it into its base "
            "with PEFT (merge_and_unload)."
        )
    config = load_pretrained(AutoConfig, model)
    if config.model_type not in TESTED_ARCHITECTURES and not allow_untested:
        raise SnpatchError(
            f"{model}: architecture {config.model_type} is not tested (tested: {', '.join(TESTED_ARCHITECTURES)}); "
            "allow_untested=True tries it"
        )
    batch_dependent = _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}
    if batch_dependent:
        raise SnpatchError(
            f"{model}: {', '.join(batch_dependent)} rotary positions depend on the longest text of a batch, so "
            "a request would not give what it gives alone"
        )
    return config


def load_model_shape(model: str | Path, allow_untested: bool) -> tuple[int, int]:
    """Return (number of layers, neurons per layer) from a model's config."""
    config = load_config(model, allow_untested).get_text_config()
    return config.num_hidden_layers, config.intermediate_size


def _rope_types(parameters) -> set[str]:
    """Return all values of rope_type in a config, which may nest them by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    return {str(parameters.get("rope_type", "default"))}.union(*map(_rope_types, parameters.values()))


def load_eos_ids(model: str | Path, config, tokenizer) -> frozenset[int]:
    """Return the tokens that end a completion.

    They are the generation config's (else the config's) and the tokenizer's.
    """
    declared = read_generation_eos_ids(resolve_model_folder(model, has_weights=False))
    if declared is None:
        declared = _parse_ids(config.eos_token_id, model)
    return frozenset(declared + _parse_ids(tokenizer.eos_token_id, model))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return a folder's generation config; None if it has none."""
    if not (folder / GENERATION_CONFIG_FILE).exists():
        return None
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except (OSError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise SnpatchError(
            f"{folder}: its {GENERATION_CONFIG_FILE} cannot be read: {first_line(error).rstrip('.')}. Correct it, or "
            "remove it."
        ) from error


def read_generation_eos_ids(folder: Path) -> list[int] | None:
    """Return the EOS tokens in a folder's generation config; None if it has no generation config."""
    config = read_generation_config(folder)
    return None if config is None else _parse_ids(config.eos_token_id, folder)


def note_unapplied_settings(folder: Path, notes: Notes) -> None:
    """Add a note on settings of a folder's generation config that only transformers applies."""
    config = read_generation_config(folder)
    settings = {} if config is None else config.to_diff_dict()
    unapplied = sorted(
        name for name, value in settings.items() if name not in KNOWN_GENERATION_FIELDS and not _is_neutral(name, value)
    )
    if unapplied:
        values = ", ".join(f"{name} = {shown(settings[name])}" for name in unapplied)
        notes.add(f"generation config {folder}", f"{folder / GENERATION_CONFIG_FILE}: {values}: not applied")


def _is_neutral(name: str, value: object) -> bool:
    """Return whether a setting's value changes no completion."""
    is_number = isinstance(value, int | float) and not name.endswith("_token_id")
    return value in (None, "", [], {}) or (is_number and value in (0, 1))


def _parse_ids(declared: object, name: str | Path) -> list[int]:
    ids = declared if isinstance(declared, list) else [declared]
    if wrong := [i for i in ids if i is not None and type(i) is not int]:
        raise SnpatchError(f"{name}: eos_token_id: expected numbers of tokens, got {shown(wrong[0])}")
    return [i for i in ids if type(i) is int]


def check_finite(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Raise a SnpatchError for the first weight with NaN or infinity."""
    for _ in iter_finite(weights, name):
        pass


@torch.no_grad()
def iter_finite(
    weights: Iterable[tuple[str, Tensor]], name: str, used: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as they come, after checking that their values are finite.

    Args:
        weights: (weight name, tensor) pairs; integers are always finite.
        name: Checkpoint, for errors.
        used: Dtype in which the weights run and must be finite, too; None: their own.

    Raises:
        SnpatchError: A weight holds NaN, infinity or complex numbers.
    """
    for weight_name, weight in weights:
        if weight.is_complex():
            raise SnpatchError(f"{name}: weight {weight_name}: expected real numbers, got {weight.dtype}")
        if not is_finite(weight, used):
            after_cast = f" in {used}" if is_finite(weight) else ""
            raise SnpatchError(f"{name}: weight {weight_name} holds NaN or infinity{after_cast}")
        yield weight_name, weight
