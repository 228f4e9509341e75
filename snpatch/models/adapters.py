"""IA3 adapters: from PEFT's folder format to one scale vector per layer and module.

Why PEFT does not load them: its layers hold one adapter for all rows of a batch, and here each row has its own. The
rules for which modules an adapter covers are PEFT's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.models.checkpoint_files import ADAPTER_CONFIG_FILE
from snpatch.models.hub import resolve_adapter_folder
from snpatch.models.peft_files import (
    check_fields,
    find_target_modules,
    match_modules,
    read_adapter_config,
    read_adapter_tensors,
    read_module_names,
)
from snpatch.utils.hashing import hash_bytes
from snpatch.utils.tensors import FLOATS, check_tensor

MODULES = {"down_proj": "mlp.down_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
IA3_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights")
# PEFT loads the names of the causal language model alone, and ignores all others.
_KEY = re.compile(r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>[0-9]+)\.(?P<path>.+))\.ia3_l")


@dataclass(frozen=True, eq=False)
class IA3Scales:
    """IA3 vectors of all layers.

    Attributes:
        vectors: Module of MODULES -> [L, width] float32; ones where nothing is scaled.
    """

    vectors: dict[str, Tensor]

    @classmethod
    def ones(cls, n_layers: int, widths: Mapping[str, int]) -> "IA3Scales":
        """Return vectors of ones, [n_layers, widths[module]] for each module: no adapter."""
        return cls({name: torch.ones(n_layers, width) for name, width in widths.items()})

    @cached_property
    def fingerprint(self) -> str:
        """Return the content hash of the vectors."""
        return hash_bytes(b"".join(self.vectors[name].numpy().tobytes() for name in sorted(self.vectors)))

    @cached_property
    def is_identity(self) -> bool:
        """Return whether all vectors are ones."""
        return all(bool((vectors == 1).all()) for vectors in self.vectors.values())

    def multiply(self, other: "IA3Scales") -> "IA3Scales":
        """Return the elementwise products: both adapters, one after the other."""
        products = {name: self.vectors[name] * other.vectors[name] for name in self.vectors}
        for name, product in products.items():
            check_tensor(product, f"stacked adapters: {name}", torch.float32)
        return IA3Scales(products)


def load_adapters(folders: str | Path | Sequence[str | Path], n_layers: int, widths: dict[str, int]) -> IA3Scales:
    """Load one IA3 adapter, or the product of several stacked in order.

    Args:
        folders: Folders or hub adapters, see `hub.resolve_adapter_folder`.
        n_layers: Layers of the model.
        widths: Width of the IA3 vector of each module that the model has.

    Raises:
        SnpatchError: A tensor is missing, unexpected or has a wrong shape, or the adapter has another type or covers an
            unsupported module; the error names it.
    """
    scales = IA3Scales.ones(n_layers, widths)
    folders = [folders] if isinstance(folders, str | Path) else folders
    if not folders:
        raise SnpatchError("an adapter needs at least one folder, got none")
    for folder in folders:
        scales = scales.multiply(_load_folder(resolve_adapter_folder(folder), n_layers, widths))
    return scales


def _load_folder(folder: Path, n_layers: int, widths: dict[str, int]) -> IA3Scales:
    config = read_adapter_config(folder, "IA3")
    check_fields(folder, config, IA3_FIELDS, {})
    feedforward = read_module_names(folder, config, "feedforward_modules")
    expected = _find_expected_vectors(folder, config, n_layers, widths)
    tensors = read_adapter_tensors(folder)
    matches = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if unknown := [key for key in tensors if key not in matches]:
        raise SnpatchError(
            f"{folder}: expected tensors named base_model.model.model.layers.N.MODULE.ia3_l, as PEFT saves them for a "
            f"causal language model, got the unknown tensor {unknown[0]}. Load it into that model with PEFT, and save "
            "it again."
        )
    modules = [match["module"] for match in matches.values()]
    scales_input = match_modules(folder, "feedforward_modules", feedforward, modules)
    loaded, vectors = set(), IA3Scales.ones(n_layers, widths).vectors
    for key, match in matches.items():
        layer, name = int(match["layer"]), match["path"].rsplit(".", 1)[-1]
        if MODULES.get(name) != match["path"] or name not in widths:
            raise SnpatchError(
                f"{folder}: IA3 on {match['path']} is not supported, only on {', '.join(widths)} (tensor {key})"
            )
        if layer >= n_layers:
            raise SnpatchError(f"{folder}: {key} is for layer {layer}, the model has {n_layers} layers")
        if (layer, name) not in expected:
            raise SnpatchError(
                f"{folder}: its {ADAPTER_CONFIG_FILE} puts no IA3 on {match['module']}, and its tensors do"
            )
        is_input = match["module"] in scales_input
        if is_input != (name == "down_proj"):
            how = "as feed-forward" if is_input else "not as feed-forward"
            raise SnpatchError(f"{folder}: {name} {how} (feedforward_modules) is not supported")
        shape = [1, widths[name]] if is_input else [widths[name], 1]
        tensor = check_tensor(tensors[key], f"{folder}: {key}", *FLOATS, used=torch.float32)
        if list(tensor.shape) != shape:
            raise SnpatchError(f"{folder}: {key}: expected {shape} for this model, got {list(tensor.shape)}")
        if (layer, name) in loaded:
            raise SnpatchError(f"{folder}: {key} names layer {layer}'s {name} a second time")
        loaded.add((layer, name))
        vectors[name][layer] = tensor.flatten()
    missing = sorted(expected - loaded)
    if missing or not loaded:
        what = f"layer {missing[0][0]}'s {missing[0][1]}" if missing else "any IA3 vector"
        raise SnpatchError(f"{folder}: no tensor for {what}: the file is incomplete or for another model")
    return IA3Scales(vectors)


def _find_expected_vectors(
    folder: Path, config: Mapping, n_layers: int, widths: Mapping[str, int]
) -> set[tuple[int, str]]:
    """Return (layer, module of MODULES) of each IA3 vector that an adapter's config asks for."""
    targets = read_module_names(folder, config, "target_modules")
    if not targets:
        raise SnpatchError(f"{folder}: {ADAPTER_CONFIG_FILE} names no target_modules")
    modules = {f"model.layers.{layer}.{MODULES[name]}": (layer, name) for name in widths for layer in range(n_layers)}
    expected = {modules[module] for module in find_target_modules(folder, config, list(modules))}
    if isinstance(targets, str) and not expected:
        raise SnpatchError(
            f"{folder}: target_modules = {shown(targets)} is a regular expression for whole names, as "
            f"{next(iter(modules))}, and fits none that can be scaled; names, or their ends, are given as a list"
        )
    for target in [] if isinstance(targets, str) else targets:
        if not any(MODULES[name].endswith(target.rpartition(".")[2]) for name in widths):
            raise SnpatchError(f"{folder}: IA3 on {target} is not supported, only on {', '.join(widths)}")
    return expected
