"""LoRA adapters in PEFT's folder format, merged into a checkpoint's weights while they are loaded.

Why not by PEFT: it needs the whole model in memory beside an engine's own loader, and adds in the weights' own type.
Here each weight is merged on its way, in float32, and rounded once.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.models.peft_files import by_pattern, number_of, read_config, read_tensors
from snpatch.tensors import FLOATS, check_tensor, is_finite

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What of a LoRA config makes weights that are more than W + scale * B A: refused where it is set.
REFUSED = ("use_dora", "modules_to_save", "layer_replication", "fan_in_fan_out", "lora_bias", "trainable_token_indices")


@dataclass(frozen=True, eq=False)
class Lora:
    """One folder. updates: name of a weight -> (A [r, in], B [out, r], scale)."""

    folder: str
    updates: dict[str, tuple[Tensor, Tensor, float]]


def load_lora(folder: str | Path) -> Lora:
    """Read a PEFT LoRA folder; a variant whose merge is not W + scale * B A is a SnpatchError that names it."""
    folder = Path(folder)
    config = _read_config(folder)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if not match or tensor.dim() != 2:
            raise SnpatchError(f"{folder}: {key} {list(tensor.shape)} is not a LoRA matrix of a linear layer")
        checked = check_tensor(tensor, f"{folder}: {key}", *FLOATS, used=torch.float32)
        sides.setdefault(match["module"], {})[match["side"]] = checked
    updates, modules = {}, list(sides)
    ranks, alphas = (by_pattern(folder, config, name, modules) for name in ("rank_pattern", "alpha_pattern"))
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise SnpatchError(f"{folder}: {module} lacks a matrix, or its two do not fit each other")
        rank, wanted = pair["A"].shape[0], ranks.get(module, config["r"])
        if rank != wanted or not rank:
            raise SnpatchError(f"{folder}: {module} has rank {rank}, its config says {wanted}")
        scale = alphas.get(module, config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[f"{module}.weight"] = pair["A"], pair["B"], scale
    if not updates:
        raise SnpatchError(f"{folder}: it holds no LoRA matrices")
    return Lora(str(folder), updates)


def merged(weights: Iterable[tuple[str, Tensor]], folders: Sequence[str | Path]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint with LoRA folders merged into them, in order; all of each must find its weight."""
    loras = [load_lora(folder) for folder in folders]
    left = [set(lora.updates) for lora in loras]
    for name, weight in weights:
        yield name, _merged(loras, left, name, weight)
    for lora, names in zip(loras, left, strict=True):
        if names:
            raise SnpatchError(f"{lora.folder}: the model has no weight {min(names)}: a LoRA of another model")


def _merged(loras: Sequence[Lora], left: Sequence[set[str]], name: str, weight: Tensor) -> Tensor:
    total = weight
    for lora, names in zip(loras, left, strict=True):
        if name not in lora.updates:
            continue
        names.discard(name)
        a, b, scale = lora.updates[name]
        if total.shape != (b.shape[0], a.shape[1]):
            raise SnpatchError(f"{lora.folder}: {name} is {list(weight.shape)}, its update {[len(b), a.shape[1]]}")
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise SnpatchError(f"{lora.folder}: {name} is quantised ({weight.dtype}): nothing can be merged into it")
        total = total.float() + scale * (b.to(weight.device) @ a.to(weight.device))
        if not is_finite(total, weight.dtype):
            raise SnpatchError(f"{lora.folder}: {name}: the merged weight overflows in {weight.dtype}")
    return total.to(weight.dtype)


def _read_config(folder: Path) -> dict:
    config = read_config(folder, "LORA")
    for name in REFUSED:
        if config.get(name):
            raise SnpatchError(f"{folder}: {name} = {config[name]} is not supported: merge this adapter with PEFT")
    if config.get("bias", "none") != "none":
        raise SnpatchError(f"{folder}: bias = {config['bias']} is not supported: merge this adapter with PEFT")
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if missing:
        raise SnpatchError(f"{folder}: adapter_config.json lacks {', '.join(missing)}")
    for name in ("r", "lora_alpha"):
        number_of(folder, name, config[name])
    return config
