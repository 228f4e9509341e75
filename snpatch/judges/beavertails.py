"""Checkpoints in the Beavertails layout: a Llama body under `model.` and a one-row `score_head` on its last state.

They are a class of their authors' own code, which neither transformers nor vLLM can load. Old and new ones differ in
what else they hold, so every tensor is accounted for: what is neither needed nor known is an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from snpatch.errors import SnpatchError
from snpatch.models.checkpoint_files import find_shards
from snpatch.utils.files import read_state
from snpatch.utils.tensors import FLOATS, check_tensor

ARCHITECTURES = ("LlamaModelForScore", "LlamaForScore")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # if there is no index
SMALLEST_VARIANCE = 1e-8  # of a normalizer, as its authors have it


def is_beavertails(config) -> bool:
    """Whether a model's config names the Beavertails layout."""
    return bool({*(config.architectures or ())} & {*ARCHITECTURES})


@dataclass(frozen=True, eq=False)
class ScoreCheckpoint:
    """body: LlamaModel's tensors by its own names. head [1, H] and bias [1] or None, float32. mean, std: of the
    normalizer, or 0 and 1."""

    config: LlamaConfig
    body: dict[str, Tensor]
    head: Tensor
    bias: Tensor | None
    mean: float
    std: float

    def normalized(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


def read_score_checkpoint(folder: Path, config: LlamaConfig, dtype: str, device: torch.device) -> ScoreCheckpoint:
    """Read and check every tensor of the folder. Device "meta" checks all the same and keeps no weights."""
    body_dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    tensors = dict(_tensors(folder, body_dtype, device))

    def take(name: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = tensors.pop(name, None)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SnpatchError(
                f"score model {folder}: {name} has the wrong shape, wanted {list(shape)}, got {list(tensor.shape)}"
            )
        return tensor

    head, bias = take("score_head.weight", (1, config.hidden_size)), take("score_head.bias", (1,))
    if head is None:
        raise SnpatchError(f"score model {folder}: the tensor score_head.weight is missing")
    mean, variance = take("normalizer.mean", (1,)), take("normalizer.var", (1,))
    tensors.pop("normalizer.count", None)
    if not getattr(config, "do_normalize", False):
        mean, variance = torch.zeros(1), torch.ones(1)
    if mean is None or variance is None:
        raise SnpatchError(
            f"score model {folder}: config.json says do_normalize, but normalizer.mean or .var is missing"
        )
    std = variance.clamp_min(SMALLEST_VARIANCE).sqrt()
    return ScoreCheckpoint(config, _body(folder, config, tensors), head, bias, mean.item(), std.item())


def _body(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left belongs to the body: all of it, and nothing else."""
    with torch.device("meta"):
        wanted = {f"model.{name}": tuple(t.shape) for name, t in LlamaModel(config).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for what, names in (
        ("are missing", sorted(wanted.keys() - got.keys())),
        ("are unknown", sorted(got.keys() - wanted.keys())),
        ("have the wrong shape", sorted(n for n in wanted.keys() & got.keys() if wanted[n] != got[n])),
    ):
        if names:
            first = names[0]
            detail = f"{first}: wanted {wanted.get(first)}, got {got.get(first)}"
            raise SnpatchError(f"score model {folder}: {len(names)} tensors {what} ({detail})")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _tensors(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, file by file: the body's in dtype on the device, all others in float32, of which
    the normalizer's stay on the host."""
    for path in _find_weight_files(folder):
        for name, tensor in read_state(path).items():
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold it; it follows from the config
                continue
            where, is_count = f"score model {folder}: {name} in {path.name}", name.startswith("normalizer.")
            types = (*FLOATS, torch.float64, torch.int64) if is_count else FLOATS
            used = dtype if name.startswith("model.") else torch.float32
            checked = check_tensor(tensor, where, *types, used=used)
            yield name, checked if is_count else checked.to(device)


def _find_weight_files(folder: Path) -> list[Path]:
    index, files = find_shards(folder, WEIGHT_FILES)
    if index and (missing := [file.name for file in files if not file.is_file()]):
        raise SnpatchError(f"score model {folder}: {index.name} names files that are not there: {missing}")
    if index is None and not files:
        raise SnpatchError(
            f"score model {folder}: no weights there ({' or '.join(WEIGHT_FILES)}, or an index). Download it again."
        )
    return files
