"""Tensors on their way between the user's process and vLLM's: (dtype, shape, bytes), no pickle."""

import numpy as np
import torch
from torch import Tensor

Packed = list  # [dtype's name, shape, bytes]


def pack(tensor: Tensor) -> Packed:
    array = tensor.contiguous().numpy()
    return [array.dtype.name, list(array.shape), array.tobytes()]


def unpack(packed: Packed) -> Tensor:
    name, shape, data = packed
    return torch.from_numpy(np.frombuffer(data, dtype=name).reshape(shape).copy())
