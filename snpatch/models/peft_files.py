"""PEFT's adapter folders: a config, its patterns, and tensors, as files hold them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.files import read_state
from snpatch.models import sandbox
from snpatch.schema import parse_json

CONFIG = "adapter_config.json"
MAX_NAME = 500  # characters of a tensor's name: matching it takes quadratic time


def read_config(folder: Path, *kinds: str) -> dict:
    """The config of an adapter of one of PEFT's types `kinds` (IA3, LORA)."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise SnpatchError(f"{folder}: no such folder (wanted a PEFT adapter)")
    if not path.is_file():
        raise SnpatchError(f"{folder}: no {CONFIG}: not a PEFT adapter folder")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SnpatchError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SnpatchError(f"{path}: wanted a JSON object, got {type(config).__name__}")
    if config.get("peft_type") not in kinds:
        named = " and ".join(kinds)
        raise SnpatchError(f"{folder}: adapter type {config.get('peft_type')} is not supported, only {named}")
    return config


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
