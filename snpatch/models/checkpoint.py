"""What a checkpoint tells: its architecture, where its texts end, and whether its weights are numbers.

Why weights are looked at while they are loaded: an engine may pack them afterwards, and empty what it has packed.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from snpatch.errors import SnpatchError, first_line, shown
from snpatch.models.fingerprint import local_snapshot
from snpatch.models.pretrained import load_pretrained
from snpatch.tensors import is_finite

ARCHITECTURES = (
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
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def load_config(model: str | Path, allow_untested: bool):
    """The model's config; an error for an architecture that was not tested."""
    config = load_pretrained(AutoConfig, model)
    if config.model_type not in ARCHITECTURES and not allow_untested:
        raise SnpatchError(
            f"{model}: architecture {config.model_type} is not tested (tested: {', '.join(ARCHITECTURES)}); "
            "allow_untested=True tries it"
        )
    varying = _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}
    if varying:
        raise SnpatchError(
            f"{model}: {', '.join(varying)} rotary positions depend on the longest text of a batch, so a request "
            "would not give what it gives alone"
        )
    return config


def load_model_shape(model: str | Path, allow_untested: bool) -> tuple[int, int]:
    """(layers, neurons of a layer) of a model, by its config."""
    config = load_config(model, allow_untested).get_text_config()
    return config.num_hidden_layers, config.intermediate_size


def check_has_weights(model: str | Path) -> None:
    """An error for a local folder without a file of weights; a name from the hub passes."""
    folder = Path(model)
    if folder.is_dir() and not any(found for pattern in WEIGHTS for found in folder.glob(pattern)):
        raise SnpatchError(f"cannot load {model}: it holds no weights ({', '.join(WEIGHTS)})")


def _rope_types(parameters) -> set[str]:
    """All rope_type of a config, which may nest them by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    return {str(parameters.get("rope_type", "default"))}.union(*map(_rope_types, parameters.values()))


def eos_ids(model: str | Path, config, tokenizer) -> frozenset[int]:
    """Tokens that end a text: the generation config's (else the config's) and the tokenizer's."""
    declared = read_generation_eos_ids(local_snapshot(model))
    if declared is None:
        declared = _numbers(config.eos_token_id, model)
    return frozenset(declared + _numbers(tokenizer.eos_token_id, model))


def read_generation_eos_ids(folder: str | Path) -> list[int] | None:
    """Return the tokens that end a text by a folder's generation config; None where there is none."""
    try:
        declared = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except OSError:
        return None
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise SnpatchError(f"{folder}: its generation_config.json cannot be read: {first_line(error)}") from error
    return _numbers(declared, folder)


def _numbers(declared: object, name: str | Path) -> list[int]:
    ids = declared if isinstance(declared, list) else [declared]
    if wrong := [i for i in ids if i is not None and type(i) is not int]:
        raise SnpatchError(f"{name}: eos_token_id: expected numbers of tokens, got {shown(wrong[0])}")
    return [i for i in ids if i is not None]


def check_finite(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """NaN or infinity in any weight is an error that names it."""
    for _ in iter_finite(weights, name):
        pass


@torch.no_grad()
def iter_finite(
    weights: Iterable[tuple[str, Tensor]], name: str, used: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as they come; NaN or infinity is an error that names the weight. Integers pass.

    used: the type that they are run in, in which they must be finite, too; None: their own.
    """
    for weight_name, weight in weights:
        if weight.is_complex():
            raise SnpatchError(f"{name}: weight {weight_name}: expected real numbers, got {weight.dtype}")
        if not is_finite(weight, used):
            where = f" in {used}" if is_finite(weight) else ""
            raise SnpatchError(f"{name}: weight {weight_name} holds NaN or infinity{where}")
        yield weight_name, weight
