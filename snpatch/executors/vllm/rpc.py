"""Data of the commands in worker/commands.py: tensors as (dtype, shape, bytes), answers as tables.

Why not pickle: unpickling runs code, and an exception in a worker ends the engine.
"""

import numpy as np
import torch
from torch import Tensor

from snpatch.errors import SnpatchError

Packed = list  # [dtype's name, shape, bytes]


def pack(tensor: Tensor) -> Packed:
    """Serialize a tensor."""
    array = tensor.contiguous().numpy()
    return [array.dtype.name, list(array.shape), array.tobytes()]


def unpack(packed: Packed) -> Tensor:
    """Return the tensor that `pack` serialized."""
    name, shape, data = packed
    return torch.from_numpy(np.frombuffer(data, dtype=name).reshape(shape).copy())


def unwrap_answers(answers: list[dict]) -> list:
    """Return what each worker's command returned.

    Raises:
        SnpatchError: a worker answered with an error.
    """
    for answer in answers:
        if "error" in answer:
            raise SnpatchError(answer["error"])
    return [answer["ok"] for answer in answers]
