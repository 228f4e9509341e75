"""PEFT's adapter folders: a config and tensors, as files hold them."""

import json
from pathlib import Path

from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.files import read_checkpoint


def read_config(folder: Path, *kinds: str) -> dict:
    """The config of an adapter of one of PEFT's types `kinds` (IA3, LORA)."""
    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise SnpatchError(f"{folder}: no such folder (wanted a PEFT adapter)")
    if not path.is_file():
        raise SnpatchError(f"{folder}: no adapter_config.json: not a PEFT adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SnpatchError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SnpatchError(f"{path}: wanted a JSON object, got {type(config).__name__}")
    if config.get("peft_type") not in kinds:
        named = " and ".join(kinds)
        raise SnpatchError(f"{folder}: adapter type {config.get('peft_type')} is not supported, only {named}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Its tensors by PEFT's names."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return read_checkpoint(folder / name)
    raise SnpatchError(f"{folder}: neither adapter_model.safetensors nor adapter_model.bin")
