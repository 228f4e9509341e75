"""Tensors of a checkpoint, read one by one by name, without a model around them.

Why columns are read on their own: the output directions of a few neurons are needed, from matrices that do not fit into
memory together with an engine's own copy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.models.checkpoint_files import SHARD_PATTERNS, find_shards, read_index
from snpatch.models.hub import resolve_model_folder
from snpatch.utils.files import read_state


class CheckpointWeights:
    """Tensors of a checkpoint; built by `open_weights`.

    Args:
        model: Name of the checkpoint in errors.
        files: Tensor name -> file that contains it.
    """

    def __init__(self, model: str, files: Mapping[str, Path]) -> None:
        self._model, self._files = model, files
        self._loaded: dict[Path, dict[str, Tensor]] = {}  # torch files, which can only be read whole

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, in the checkpoint's dtype."""
        path = self._get_path(name)
        if path.suffix != ".safetensors":
            return self._read_torch(path, name)
        with _open_safetensors(path) as file:
            return file.get_tensor(name)

    def columns(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return columns of a matrix, [rows, len(indices)].

        Nothing else of a safetensors file is kept in memory.
        """
        path = self._get_path(name)
        if path.suffix != ".safetensors":
            return self._read_torch(path, name)[:, list(indices)]
        with _open_safetensors(path) as file:
            matrix = file.get_slice(name)
            return torch.cat([matrix[:, index : index + 1] for index in indices], dim=1)

    def _get_path(self, name: str) -> Path:
        if name not in self._files:
            raise SnpatchError(f"{self._model}: its checkpoint has no tensor {name}; quantized ones are not read")
        return self._files[name]

    def _read_torch(self, path: Path, name: str) -> Tensor:
        if path not in self._loaded:
            self._loaded[path] = read_state(path)
        return self._loaded[path][name]


def open_weights(model: str | Path) -> CheckpointWeights:
    """Open the weights of a Hugging Face folder or hub model; safetensors are preferred to torch files."""
    index, paths = find_shards(resolve_model_folder(model))
    if index is None and not paths:
        raise SnpatchError(f"{model}: it holds no weights ({', '.join(SHARD_PATTERNS)})")
    files = read_index(index) if index else {name: path for path in paths for name in _read_names(path)}
    return CheckpointWeights(str(model), files)


def _read_names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(read_state(path))
    with _open_safetensors(path) as file:
        return list(file.keys())


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise SnpatchError(f"{path}: no such file, and the index names it: download the model again") from None
    except (SafetensorError, OSError) as error:
        raise SnpatchError(f"{path}: not a safetensors file: {error}") from error
