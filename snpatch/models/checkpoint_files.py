"""Names of the files in a checkpoint's or an adapter's folder: weights, index, config and tokenizer."""

from pathlib import Path
from typing import Any

from snpatch.errors import SnpatchError
from snpatch.utils.schema import parse_json

CONFIG_FILE = "config.json"  # sizes, rotary base, epsilon of the norms: settings that change what weights compute
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")  # files that vLLM loads under any name
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # transformers loads the first of them, or its index
TOKENIZER_PATTERNS = (
    "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "chat_template*",
)  # fmt: skip
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
GENERATION_CONFIG_FILE = "generation_config.json"


def find_weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return (index, weight files) of a checkpoint; (None, []) if there are none.

    They are the files that transformers loads. If it finds none: the files of the first of WEIGHT_PATTERNS that has
    any, which vLLM loads.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return None, [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return index, sorted(set(read_index(index).values()))
    return None, next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])


def find_adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's tensors that PEFT loads."""
    for name in ADAPTER_WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise SnpatchError(f"{folder}: neither {' nor '.join(ADAPTER_WEIGHT_FILES)}")


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
