"""Checks of a checkpoint: its architecture, its EOS tokens, and whether its weights are finite.

Why weights are checked while they are loaded: an engine may pack them afterwards and free the originals.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from snpatch.errors import SnpatchError, first_line, shown
from snpatch.models.hub import resolve_revision
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


def load_config(model: str | Path, allow_untested: bool):
    """Load a model's config.

    Raises:
        SnpatchError: The architecture is not tested, or its rotary positions depend on other requests of a batch.
    """
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
    declared = read_generation_eos_ids(resolve_revision(model))
    if declared is None:
        declared = _parse_ids(config.eos_token_id, model)
    return frozenset(declared + _parse_ids(tokenizer.eos_token_id, model))


def read_generation_eos_ids(folder: str | Path) -> list[int] | None:
    """Return the EOS tokens in a folder's generation config; None if it has no generation config."""
    try:
        declared = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except OSError:
        return None
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise SnpatchError(f"{folder}: its generation_config.json cannot be read: {first_line(error)}") from error
    return _parse_ids(declared, folder)


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
