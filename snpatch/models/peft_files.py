"""PEFT's adapter folders: a config, its patterns, and tensors, as files hold them.

Why fields are read by allow-list: PEFT's next field may change what an adapter computes, and a field passed over makes
another model and no error.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.files import read_state
from snpatch.models import sandbox
from snpatch.schema import parse_json

CONFIG = "adapter_config.json"
MAX_NAME = 500  # characters of a tensor's name: matching it takes quadratic time
# Fields of every PEFT config that say where an adapter comes from, and not what it computes.
ORIGIN = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
          "inference_mode")  # fmt: skip
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
OUTPUTS = ("lm_head", "embed_tokens")  # modules that "all-linear" leaves out
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def read_adapter_config(folder: Path, *kinds: str) -> dict:
    """The config of an adapter of one of PEFT's types `kinds` (IA3, LORA)."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise SnpatchError(f"{folder}: no such folder (wanted a PEFT adapter)")
    if not path.is_file():
        raise SnpatchError(f"{folder}: no {CONFIG}: not a PEFT adapter folder")
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SnpatchError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SnpatchError(f"{path}: wanted a JSON object, got {type(config).__name__}")
    if config.get("peft_type") not in kinds:
        named = " and ".join(kinds)
        raise SnpatchError(f"{folder}: adapter type {config.get('peft_type')} is not supported, only {named}")
    return config


def check_fields(
    folder: Path, config: Mapping, known: Collection[str], harmless: Mapping[str, Collection[object]]
) -> None:
    """Raise an error for a field that may change what an adapter computes.

    Args:
        folder: the adapter's.
        config: its fields.
        known: fields that are read, or that mean nothing for a trained adapter.
        harmless: of further fields, the values that change nothing. Of all others these are null, false and empty.
    """
    for name, value in config.items():
        is_off = value is None or value is False or value == [] or value == {}
        if is_off or name in known or name in ORIGIN:
            continue
        if not any(type(value) is type(one) and value == one for one in harmless.get(name, ())):
            raise SnpatchError(
                f"{folder}: {name} = {shown(value)} is not supported: merge this adapter with PEFT (merge_and_unload) "
                "and give the checkpoint"
            )


def modules_of(folder: Path, config: Mapping, field: str) -> str | list[str]:
    """Return a field that names modules: a regular expression, or a list of names; empty where it is not set."""
    value = config.get(field) or []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise SnpatchError(f"{folder / CONFIG}: {field}: expected a text or a list of texts, got {shown(value)}")
    return value


def covered(folder: Path, field: str, targets: str | Sequence[str], modules: Sequence[str]) -> set[str]:
    """Return the modules that a field covers, by PEFT's rule: a text is a regular expression for the whole name, a list
    holds names or their ends."""
    if isinstance(targets, str):
        found = sandbox.match([targets], modules, f"{folder / CONFIG}: {field}: {shown(targets)}")
        return {module for module, index in zip(modules, found, strict=True) if index is not None}
    return {module for module in modules if any(module == one or module.endswith(f".{one}") for one in targets)}


def targeted(folder: Path, config: Mapping, modules: Sequence[str]) -> set[str]:
    """Return the modules that a config puts its adapter on, by PEFT's rule.

    Those of target_modules but not of exclude_modules, and, where target_modules is a list, in the layers of
    layers_to_transform.
    """
    targets, excluded = (modules_of(folder, config, field) for field in ("target_modules", "exclude_modules"))
    if targets == "all-linear":
        found = {module for module in modules if module.rpartition(".")[2] not in OUTPUTS}
    else:
        found = covered(folder, "target_modules", targets, modules)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if pattern not in (None, [], "", "layers", ["layers"]):
        raise SnpatchError(f"{folder / CONFIG}: layers_pattern: expected 'layers', got {shown(pattern)}")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(type(one) is int for one in layers):
        raise SnpatchError(f"{folder / CONFIG}: layers_to_transform: expected numbers of layers, got {shown(layers)}")
    if layers and isinstance(targets, list):
        matches = {module: _LAYER.match(module) for module in found - {*targets}}
        found -= {module for module, match in matches.items() if not match or int(match[1]) not in layers}
    return found - covered(folder, "exclude_modules", excluded, modules)


def by_pattern(folder: Path, config: Mapping, field: str, modules: Sequence[str]) -> dict[str, float]:
    """Return the number that a field's first fitting pattern gives each module, by PEFT's rule: a pattern is the end of
    a name, or a regular expression for it."""
    table = config.get(field) or {}
    if not isinstance(table, dict):
        raise SnpatchError(f"{folder / CONFIG}: {field}: expected an object, got {shown(table)}")
    numbers = [number_of(folder, f"{field} {shown(pattern)}", value) for pattern, value in table.items()]
    patterns = [rf"(.*\.)?({pattern})$" for pattern in table]
    if not patterns:
        return {}
    found = sandbox.match(patterns, modules, f"{folder / CONFIG}: {field}: {', '.join(map(shown, table))}")
    return {module: numbers[i] for module, i in zip(modules, found, strict=True) if i is not None}


def number_of(folder: Path, field: str, value: object) -> float:
    """Return a field's number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise SnpatchError(f"{folder / CONFIG}: {field}: expected a finite number, got {shown(value)}")
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Its tensors by PEFT's names."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            tensors = read_state(folder / name)
            if too_long := [one for one in tensors if len(one) > MAX_NAME]:
                raise SnpatchError(f"{folder / name}: unknown tensor {shown(too_long[0])}")
            return tensors
    raise SnpatchError(f"{folder}: neither adapter_model.safetensors nor adapter_model.bin")
