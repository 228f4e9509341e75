"""Names of the files in a checkpoint's or an adapter's folder: weights, index, config and tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snpatch.errors import SnpatchError
from snpatch.utils.schema import parse_json

CONFIG_FILE = "config.json"  # sizes, rotary base, epsilon of the norms: settings that change what weights compute
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")  # a checkpoint is the files of the first pattern that has any
# Of the formats that are read tensor by tensor: index, and the files of a checkpoint without one.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SHARD_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_PATTERNS = (
    "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "chat_template*",
)  # fmt: skip
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
GENERATION_CONFIG_FILE = "generation_config.json"


def find_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint or adapter, sorted; empty if there are none."""
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])


def find_shards(folder: Path, patterns: Sequence[str] = SHARD_PATTERNS) -> tuple[Path | None, list[Path]]:
    """Return (index, weight files) of a checkpoint; (None, []) if there are none.

    Safetensors files come before torch files.

    Args:
        folder: Folder of the checkpoint.
        patterns: For each of INDEX_FILES, the names of the weight files of a checkpoint without that index.
    """
    for name, pattern in zip(INDEX_FILES, patterns, strict=True):
        if (index := folder / name).is_file():
            return index, sorted(set(read_index(index).values()))
        if files := sorted(folder.glob(pattern)):
            return None, files
    return None, []


def read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor from an index of weights; all files are in the index's own folder."""
    try:
        index: Any = parse_json(path.read_text(encoding="utf-8"))
        names = index["weight_map"]
        files = {tensor: path.parent / name for tensor, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnpatchError(f"{path}: not an index of weights ({type(error).__name__}): download it again") from error
    for tensor, file in files.items():
        if file.parent != path.parent:
            raise SnpatchError(f"{path}: {tensor}: expected the name of a file in its folder, got {names[tensor]}")
    return files
