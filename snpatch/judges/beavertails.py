"""Checkpoints in the Beavertails layout: a Llama body under `model.` and a one-row `score_head` on its last state.

Why they are read here: their class is in their authors' own code, which neither transformers nor vLLM can load. Old and
new checkpoints contain different further tensors, so every tensor is checked, and an unknown one is an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from snpatch.errors import SnpatchError
from snpatch.models.checkpoint_files import WEIGHT_FILES, find_weight_files
from snpatch.utils.files import read_state
from snpatch.utils.tensors import FLOATS, check_tensor

SCORE_ARCHITECTURES = ("LlamaModelForScore", "LlamaForScore")
MIN_VARIANCE = 1e-8  # of a normalizer, as in its authors' code


def is_beavertails(config) -> bool:
    """Return whether a model's config has an architecture of the Beavertails layout."""
    return bool({*(config.architectures or ())} & {*SCORE_ARCHITECTURES})


@dataclass(frozen=True, eq=False)
class ScoreCheckpoint:
    """Tensors of a checkpoint in the Beavertails layout.

    Attributes:
        config: The Llama body's config.
        body: LlamaModel's tensors by its own names.
        head: [1, H] float32.
        bias: [1] float32, or None.
        mean: Mean of the score normalizer, or 0.
        std: Standard deviation of the score normalizer, or 1.
    """

    config: LlamaConfig
    body: dict[str, Tensor]
    head: Tensor
    bias: Tensor | None
    mean: float
    std: float

    def normalize(self, scores: Tensor) -> Tensor:
        """Return (scores - mean) / std, in the shape of the scores.

        The scores of a model without a normalizer are unchanged.
        """
        return (scores - self.mean) / self.std


def read_score_checkpoint(folder: Path, config: LlamaConfig, dtype: str, device: torch.device) -> ScoreCheckpoint:
    """Read and check every tensor of a folder. On device "meta" all are checked and none is kept."""
    # transformers has replaced the name in config.json by a dtype.
    own_dtype = cast(torch.dtype | None, config.dtype)
    body_dtype = own_dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    tensors = dict(_read_tensors(folder, body_dtype, device))

    def take(name: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = tensors.pop(name, None)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SnpatchError(
                f"score model {folder}: {name} has the wrong shape, expected {list(shape)}, got {list(tensor.shape)}"
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
    std = variance.clamp_min(MIN_VARIANCE).sqrt()
    return ScoreCheckpoint(config, _check_body(folder, config, tensors), head, bias, mean.item(), std.item())


def _check_body(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the body's tensors; raise a SnpatchError if the remaining tensors are not exactly the body."""
    with torch.device("meta"):
        expected = {f"model.{name}": tuple(t.shape) for name, t in LlamaModel(config).state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for what, names in (
        ("are missing", sorted(expected.keys() - got.keys())),
        ("are unknown", sorted(got.keys() - expected.keys())),
        ("have the wrong shape", sorted(n for n in expected.keys() & got.keys() if expected[n] != got[n])),
    ):
        if names:
            first = names[0]
            detail = f"{first}: expected {expected.get(first)}, got {got.get(first)}"
            raise SnpatchError(f"score model {folder}: {len(names)} tensors {what} ({detail})")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _read_tensors(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, file by file: the body in `dtype` on the device, all others in float32.

    The normalizer's tensors stay on the host.
    """
    for path in _require_weight_files(folder):
        for name, tensor in read_state(path).items():
            if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; it follows from the config
                continue
            context, is_normalizer = f"score model {folder}: {name} in {path.name}", name.startswith("normalizer.")
            types = (*FLOATS, torch.float64, torch.int64) if is_normalizer else FLOATS
            used = dtype if name.startswith("model.") else torch.float32
            checked = check_tensor(tensor, context, *types, used=used)
            yield name, checked if is_normalizer else checked.to(device)


def _require_weight_files(folder: Path) -> list[Path]:
    index, files = find_weight_files(folder)
    if index and (missing := [file.name for file in files if not file.is_file()]):
        raise SnpatchError(f"score model {folder}: {index.name} names files that are not there: {missing}")
    if index is None and not files:
        raise SnpatchError(
            f"score model {folder}: no weights there ({' or '.join(WEIGHT_FILES)}, or an index). Download it again."
        )
    return files
