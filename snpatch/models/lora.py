"""LoRA adapters in PEFT's folder format, merged into a checkpoint's weights while they are loaded.

Why PEFT does not merge them: it needs the whole model in memory in addition to the engine's, and adds in the weights'
own dtype. Here each weight is merged as it is loaded, in float32, and rounded once.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.models.hub import resolve_adapter_folder
from snpatch.models.peft_files import (
    MERGE_WITH_PEFT,
    TARGET_FIELDS,
    check_fields,
    find_target_modules,
    match_modules,
    match_numbers,
    parse_number,
    read_adapter_config,
    read_adapter_tensors,
    read_module_names,
)
from snpatch.utils.tensors import FLOATS, check_tensor, is_finite

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# PEFT saves a copy of the embeddings together with a LoRA on lm_head, or if their sizes were changed.
_COPY = re.compile(r"base_model\.model\.(?P<module>(?:.+\.)?(?:lm_head|embed_tokens))(?:\.base_layer)?\.weight")
# Fields that are read here, and fields that mean nothing once an adapter is trained.
LORA_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters",
               *TARGET_FIELDS, "lora_dropout", "eva_config", "runtime_config", "megatron_core", "qalora_group_size",
               "ensure_weight_tying")  # fmt: skip
# Initializations that keep the base weights. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ subtract a part from them.
HARMLESS_VALUES = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"), "bias": ("none",)}


@dataclass(frozen=True, eq=False)
class Lora:
    """LoRA adapter of one folder.

    Attributes:
        folder: The adapter's folder.
        updates: Weight name -> (A [r, in], B [out, r], scale).
        copies: Name of a weight of the model -> the value that it must have.
        config: The folder's adapter config.
    """

    folder: str
    updates: dict[str, tuple[Tensor, Tensor, float]]
    copies: dict[str, Tensor]
    config: dict

    @property
    def is_zero(self) -> bool:
        """Return whether all updates are zero: the adapter was never trained, or saved wrong."""
        return not any(scale and a.any() and b.any() for a, b, scale in self.updates.values())


def load_lora(adapter: str | Path) -> Lora:
    """Load a PEFT LoRA adapter.

    Args:
        adapter: Folder or hub adapter, see `hub.resolve_adapter_folder`.

    Raises:
        SnpatchError: Its merge is not W + scale * B A, or the folder is damaged; the error names the field or tensor.
    """
    folder = resolve_adapter_folder(adapter)
    config = _read_config(folder)
    matrices: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in read_adapter_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if copy := _COPY.fullmatch(key):
            copies[f"{copy['module']}.weight"] = tensor
            continue
        if not match or tensor.dim() != 2:
            raise SnpatchError(
                f"{folder}: {key} {list(tensor.shape)} is not a LoRA matrix of a linear layer. {MERGE_WITH_PEFT}"
            )
        checked = check_tensor(tensor, f"{folder}: {key}", *FLOATS, used=torch.float32)
        matrices.setdefault(match["module"], {})[match["side"]] = checked
    if unexpected := matrices.keys() - _find_targets(folder, config, list(matrices), matrices):
        raise SnpatchError(f"{folder}: its adapter_config.json puts no LoRA on {min(unexpected)}, and its tensors do")
    updates, modules = {}, list(matrices)
    ranks, alphas = (match_numbers(folder, config, name, modules) for name in ("rank_pattern", "alpha_pattern"))
    for module, pair in matrices.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise SnpatchError(f"{folder}: {module} lacks a matrix, or its two do not fit each other")
        rank, config_rank = pair["A"].shape[0], ranks.get(module, config["r"])
        if rank != config_rank or not rank:
            raise SnpatchError(f"{folder}: {module} has rank {rank}, its config says {config_rank}")
        alpha = alphas[module] if module in alphas else config["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[f"{module}.weight"] = pair["A"], pair["B"], scale
    if not updates:
        raise SnpatchError(f"{folder}: it holds no LoRA matrices")
    return Lora(str(folder), updates, copies, config)


def merge_loras(weights: Iterable[tuple[str, Tensor]], folders: Sequence[str | Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's weights with LoRA adapters merged into them in order.

    Args:
        weights: (weight name, tensor) pairs of the checkpoint.
        folders: LoRA folders or hub adapters.

    Raises:
        SnpatchError: An update finds no weight, does not fit it, or its sum overflows the weight's dtype.
    """
    loras = [load_lora(folder) for folder in folders]
    unused, matrices = [{*lora.updates, *lora.copies} for lora in loras], []
    for name, weight in weights:
        if name.endswith(".weight") and weight.dim() == 2:
            matrices.append(name.removesuffix(".weight"))
        yield name, _merge_weight(loras, unused, name, weight)
    for lora, names in zip(loras, unused, strict=True):
        if names:
            why = "it is tied to the embedding" if "lm_head.weight" in names else "a LoRA of another model"
            raise SnpatchError(f"{lora.folder}: the model has no weight {min(names)}: {why}")
        updated = {name.removesuffix(".weight") for name in lora.updates}
        if missing := _find_targets(Path(lora.folder), lora.config, matrices, updated) - updated:
            raise SnpatchError(f"{lora.folder}: no matrices for {min(missing)}, which its adapter_config.json names")


def _find_targets(folder: Path, config: dict, modules: Sequence[str], tensors: Iterable[str]) -> set[str]:
    """Return the modules that a config puts a LoRA on, by the name of the module or of its weight."""
    if config.get("target_modules") is None and config.get("target_parameters") is None:
        return set(tensors)  # PEFT chose by architecture: take what the tensors cover
    parameters = read_module_names(folder, config, "target_parameters")
    weights = match_modules(folder, "target_parameters", list(parameters), [f"{module}.weight" for module in modules])
    return find_target_modules(folder, config, modules) | {weight.removesuffix(".weight") for weight in weights}


def _merge_weight(loras: Sequence[Lora], unused: Sequence[set[str]], name: str, weight: Tensor) -> Tensor:
    total = weight
    for lora, names in zip(loras, unused, strict=True):
        names.discard(name)
        if name in lora.copies and not _is_copy(lora.copies[name], weight):
            raise SnpatchError(f"{lora.folder}: expected {name} as in the model, got other weights. {MERGE_WITH_PEFT}")
        if name not in lora.updates:
            continue
        a, b, scale = lora.updates[name]
        if total.shape != (b.shape[0], a.shape[1]):
            raise SnpatchError(f"{lora.folder}: {name} is {list(weight.shape)}, its update {[len(b), a.shape[1]]}")
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise SnpatchError(f"{lora.folder}: {name} is quantized ({weight.dtype}): nothing can be merged into it")
        total = total.float() + scale * (b.to(weight.device) @ a.to(weight.device))
        if not is_finite(total, weight.dtype):
            raise SnpatchError(f"{lora.folder}: {name}: the merged weight overflows in {weight.dtype}")
    return total.to(weight.dtype)


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    """Return whether two tensors have the same values in the coarser of their dtypes."""
    coarser = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return copy.shape == weight.shape and torch.equal(copy.to(weight.device, coarser), weight.to(coarser))


def _read_config(folder: Path) -> dict:
    config = read_adapter_config(folder, "LORA")
    check_fields(folder, config, LORA_FIELDS, HARMLESS_VALUES)
    if not isinstance(config.get("use_rslora", False), bool):
        raise SnpatchError(f"{folder}: use_rslora: expected true or false, got {shown(config['use_rslora'])}")
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if missing:
        raise SnpatchError(f"{folder}: adapter_config.json lacks {', '.join(missing)}")
    for name in ("r", "lora_alpha"):
        parse_number(folder, name, config[name])
    return config
