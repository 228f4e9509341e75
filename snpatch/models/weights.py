"""Weights of a checkpoint, read one by one by their names, without a model around them.

Why columns are read on their own: a few neurons' output directions are wanted of matrices that do not fit beside an
engine's own copy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.files import read_state
from snpatch.models.fingerprint import local_model_folder
from snpatch.schema import parse_json

INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("*.safetensors", "pytorch_model*.bin")


class CheckpointWeights:
    """A checkpoint's tensors. files: name of a tensor -> the file that holds it. Make it by `open_weights`."""

    def __init__(self, model: str, files: Mapping[str, Path]) -> None:
        self._model, self._files = model, files
        self._loaded: dict[Path, dict[str, Tensor]] = {}  # torch files, which are read whole

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """A whole tensor, in the checkpoint's type."""
        path = self._path(name)
        if path.suffix != ".safetensors":
            return self._of_torch(path, name)
        with _opened(path) as file:
            return file.get_tensor(name)

    def columns(self, name: str, indices: Sequence[int]) -> Tensor:
        """Columns of a matrix, [rows, len(indices)]; of a safetensors file nothing else is kept in memory."""
        path = self._path(name)
        if path.suffix != ".safetensors":
            return self._of_torch(path, name)[:, list(indices)]
        with _opened(path) as file:
            matrix = file.get_slice(name)
            return torch.cat([matrix[:, index : index + 1] for index in indices], dim=1)

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise SnpatchError(f"{self._model}: its checkpoint has no tensor {name}; quantised ones are not read")
        return self._files[name]

    def _of_torch(self, path: Path, name: str) -> Tensor:
        if path not in self._loaded:
            self._loaded[path] = read_state(path)
        return self._loaded[path][name]


def open_weights(model: str | Path) -> CheckpointWeights:
    """The weights of a Hugging Face folder or of a model from the hub; safetensors go before torch files."""
    folder = local_model_folder(model)
    for index, pattern in zip(INDEXED, WHOLE, strict=True):
        if (folder / index).is_file():
            return CheckpointWeights(str(model), read_index(folder / index))
        if paths := sorted(folder.glob(pattern)):
            return CheckpointWeights(str(model), {name: path for path in paths for name in _names(path)})
    raise SnpatchError(f"{model}: it holds no weights ({', '.join(WHOLE)})")


def read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor from an index of weights; all lie in the index's own folder."""
    try:
        placed = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        files = {name: path.parent / file for name, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnpatchError(f"{path}: not an index of weights ({type(error).__name__}): download it again") from error
    for name, file in files.items():
        if file.parent != path.parent:
            raise SnpatchError(f"{path}: {name}: expected the name of a file in its folder, got {placed[name]}")
    return files


def _names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(read_state(path))
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise SnpatchError(f"{path}: no such file, and the index names it: download the model again") from None
    except (SafetensorError, OSError) as error:
        raise SnpatchError(f"{path}: not a safetensors file: {error}") from error
