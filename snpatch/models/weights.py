"""Tensors of a checkpoint, read one by one by name, without a model around them.

Why columns are read on their own: the output directions of a few neurons are needed, from matrices that do not fit into
memory together with an engine's own copy.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from snpatch.errors import SnpatchError
from snpatch.models.checkpoint import TESTED_ARCHITECTURES
from snpatch.models.checkpoint_files import WEIGHT_FILES, WEIGHT_PATTERNS, find_weight_files, read_index
from snpatch.models.hub import resolve_model_folder
from snpatch.models.pretrained import build_untied_error, check_tensor_names
from snpatch.utils.files import check_no_lfs_pointer, read_state

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BUFFER_PATTERNS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # in old checkpoints; they follow from the config
MISTRAL_PATTERN = "consolidated*.safetensors"
TRAINER_FILES = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")  # ignored by vLLM


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

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return {*self._files}

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
    index, paths = find_weight_files(resolve_model_folder(model))
    if not paths:
        raise SnpatchError(f"cannot load {model}: it holds no weights ({', '.join(WEIGHT_PATTERNS)})")
    files = read_index(index) if index else {name: path for path in paths for name in _read_names(path)}
    return CheckpointWeights(str(model), files)


def check_weights(model: str | Path, config) -> None:
    """Check the tensors of a checkpoint that vLLM will load, from the headers of its files.

    vLLM takes tensors from all weight files of a folder, leaves out biases that a model does not have, and does not
    notice that secondary weights lack a tensor. Names are compared for tested, not quantized architectures.

    Args:
        model: Folder or hub name.
        config: The model's transformers config.

    Raises:
        SnpatchError: There are no weights, files of two checkpoints, missing or unexpected tensors, or a head that is
            not the embedding that the config ties it to.
    """
    folder = resolve_model_folder(model)
    weights = open_weights(folder)
    if any(folder.glob(MISTRAL_PATTERN)):  # vLLM prefers them; they have names of their own
        return
    _check_no_other_files(folder)
    if config.model_type not in TESTED_ARCHITECTURES or getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    ignored = re.compile("|".join([*(network._keys_to_ignore_on_load_unexpected or ()), *BUFFER_PATTERNS]))
    names, expected = weights.names, {*network.state_dict()}
    missing = expected - names - {*(network.all_tied_weights_keys or ())}
    unexpected = {name for name in names - expected if not ignored.search(name)}
    check_tensor_names(model, type(network).__name__, missing, unexpected)
    if config.tie_word_embeddings and HEAD in weights and not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
        raise build_untied_error(model)


def _check_no_other_files(folder: Path) -> None:
    """Raise a SnpatchError for a weight file that vLLM loads and transformers does not."""
    index, used = find_weight_files(folder)
    if index is not None and index.name == f"{WEIGHT_FILES[0]}.index.json":
        return  # vLLM, too, takes the files of this index alone
    ignored = {folder / name for name in TRAINER_FILES}
    files = next(filter(None, ({*folder.glob(pattern)} - ignored for pattern in WEIGHT_PATTERNS)), set())
    if others := sorted(file.name for file in files - {*used}):
        raise SnpatchError(
            f"{folder}: expected the weights of one checkpoint, got {others[0]} and {used[0].name}. Move one away."
        )


def _read_names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(read_state(path))
    with _open_safetensors(path) as file:
        return list(file.keys())


def _open_safetensors(path: Path) -> safe_open:
    try:
        check_no_lfs_pointer(path)
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise SnpatchError(f"{path}: no such file, and the index names it: download the model again") from None
    except (SafetensorError, OSError) as error:
        raise SnpatchError(f"{path}: not a safetensors file: {error}") from error
