"""PEFT adapter folders: the config, its module patterns, and the tensors.

Why config fields are read by allow-list: PEFT's next field may change what an adapter computes, and an ignored field
would give another model without an error.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from snpatch.errors import SnpatchError, shown
from snpatch.models import sandbox
from snpatch.models.checkpoint_files import ADAPTER_CONFIG_FILE, find_adapter_weights
from snpatch.utils.files import check_no_lfs_pointer, read_state
from snpatch.utils.schema import parse_json

MAX_TENSOR_NAME = 500  # characters: matching a name takes quadratic time
# Fields of every PEFT config that say where an adapter comes from, not what it computes.
ORIGIN_FIELDS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                 "inference_mode")  # fmt: skip
TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
OUTPUT_MODULES = ("lm_head", "embed_tokens")  # not covered by "all-linear"
REMEDIES = {  # by the type of an adapter that was passed as one of another type
    "LORA": '. Pass a LoRA as models={"name": {"lora": folder}} (command line: --lora name=folder)',
    "IA3": '. Pass an IA3 adapter as adapters={"name": folder} (command line: --adapter name=folder)',
}
MERGE_WITH_PEFT = "Merge the adapter with PEFT (merge_and_unload) and pass the checkpoint."
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def read_adapter_config(folder: Path, *kinds: str) -> dict:
    """Return the config of an adapter of one of the PEFT types `kinds` (IA3, LORA)."""
    path = folder / ADAPTER_CONFIG_FILE
    if not folder.is_dir():
        raise SnpatchError(f"{folder}: no such folder (expected a PEFT adapter)")
    if not path.is_file():
        raise SnpatchError(f"{folder}: no {ADAPTER_CONFIG_FILE}: not a PEFT adapter folder")
    check_no_lfs_pointer(path)
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SnpatchError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SnpatchError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") not in kinds:
        kind = config.get("peft_type")
        remedy = REMEDIES.get(kind, "") if isinstance(kind, str) else ""
        raise SnpatchError(f"{folder}: expected an adapter of type {' or '.join(kinds)}, got {shown(kind)}{remedy}")
    return config


def check_fields(
    folder: Path, config: Mapping, known: Collection[str], harmless: Mapping[str, Collection[object]]
) -> None:
    """Raise a SnpatchError for a field that may change what an adapter computes.

    Args:
        folder: The adapter's folder, for errors.
        config: The adapter's config.
        known: Fields that are read, or that mean nothing for a trained adapter.
        harmless: Values of further fields that change nothing. For all other fields these are null, false and empty.
    """
    for name, value in config.items():
        is_off = value is None or value is False or value == [] or value == {}
        if is_off or name in known or name in ORIGIN_FIELDS:
            continue
        if not any(type(value) is type(allowed) and value == allowed for allowed in harmless.get(name, ())):
            raise SnpatchError(f"{folder}: {name} = {shown(value)} is not supported. {MERGE_WITH_PEFT}")


def read_module_names(folder: Path, config: Mapping, field: str) -> str | list[str]:
    """Return a config field that selects modules.

    It is a regular expression or a list of names; [] if it is not set.
    """
    value = config.get(field) or []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise SnpatchError(
            f"{folder / ADAPTER_CONFIG_FILE}: {field}: expected a string or a list of strings, got {shown(value)}"
        )
    return value


def match_modules(folder: Path, field: str, targets: str | Sequence[str], modules: Sequence[str]) -> set[str]:
    """Return the modules that a field selects, by PEFT's rule.

    A string is a regular expression for the whole name; a list holds names or their last parts.
    """
    if isinstance(targets, str):
        matches = sandbox.match([targets], modules, f"{folder / ADAPTER_CONFIG_FILE}: {field}: {shown(targets)}")
        return {module for module, index in zip(modules, matches, strict=True) if index is not None}
    return {module for module in modules if any(module == name or module.endswith(f".{name}") for name in targets)}


def find_target_modules(folder: Path, config: Mapping, modules: Sequence[str]) -> set[str]:
    """Return the modules that a config puts its adapter on, by PEFT's rule.

    These are the modules of target_modules without those of exclude_modules and, if target_modules is a list, in the
    layers of layers_to_transform.
    """
    targets, excluded = (read_module_names(folder, config, field) for field in ("target_modules", "exclude_modules"))
    if targets == "all-linear":
        selected = {module for module in modules if module.rpartition(".")[2] not in OUTPUT_MODULES}
    else:
        selected = match_modules(folder, "target_modules", targets, modules)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if pattern not in (None, [], "", "layers", ["layers"]):
        raise SnpatchError(f"{folder / ADAPTER_CONFIG_FILE}: layers_pattern: expected 'layers', got {shown(pattern)}")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise SnpatchError(
            f"{folder / ADAPTER_CONFIG_FILE}: layers_to_transform: expected numbers of layers, got {shown(layers)}"
        )
    if layers and isinstance(targets, list):
        matches = {module: _LAYER.match(module) for module in selected - {*targets}}
        selected -= {module for module, match in matches.items() if not match or int(match[1]) not in layers}
    return selected - match_modules(folder, "exclude_modules", excluded, modules)


def match_numbers(folder: Path, config: Mapping, field: str, modules: Sequence[str]) -> dict[str, float]:
    """Return for each module the number of the first pattern that fits it.

    field: name of the patterns in the config, such as rank_pattern. By PEFT's rule a pattern is the end of a name, or a
    regular expression for it.
    """
    table = config.get(field) or {}
    if not isinstance(table, dict):
        raise SnpatchError(f"{folder / ADAPTER_CONFIG_FILE}: {field}: expected an object, got {shown(table)}")
    numbers = [parse_number(folder, f"{field} {shown(pattern)}", value) for pattern, value in table.items()]
    patterns = [rf"(.*\.)?({pattern})$" for pattern in table]
    if not patterns:
        return {}
    subject = f"{folder / ADAPTER_CONFIG_FILE}: {field}: {', '.join(map(shown, table))}"
    matches = sandbox.match(patterns, modules, subject)
    return {module: numbers[i] for module, i in zip(modules, matches, strict=True) if i is not None}


def find_other_base(config: Mapping, model: str) -> str | None:
    """Return the name of the base model in an adapter's config; None if it is absent or names `model`.

    Only the last parts of names and paths are compared, because folders are moved.
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or _get_model_name(base) == _get_model_name(model):
        return None
    return base


def _get_model_name(model: str) -> str:
    """Return the last part of a model's name or path, or the repository of a folder in the hub's cache."""
    parts = model.rstrip("/").split("/")
    repository = parts[-3] if len(parts) > 2 and parts[-2] == "snapshots" else parts[-1].partition("@")[0]
    return repository.rpartition("--")[2].casefold()


def parse_number(folder: Path, field: str, value: object) -> float:
    """Return a field's value if it is a finite number; raise a SnpatchError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise SnpatchError(f"{folder / ADAPTER_CONFIG_FILE}: {field}: expected a finite number, got {shown(value)}")
    return value


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names."""
    file = find_adapter_weights(folder)
    tensors = read_state(file)
    if too_long := [name for name in tensors if len(name) > MAX_TENSOR_NAME]:
        raise SnpatchError(f"{file}: unknown tensor {shown(too_long[0])}")
    return tensors
