"""Checks of tensors from files and callers: dtype, and finite values in the dtype that is used.

Values are checked after conversion, because 1e300 is finite in a float64 file and infinite on the device.
"""

import torch
from torch import Tensor

from snpatch.errors import SnpatchError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of adapters and checkpoints


def check_tensor(value: object, name: str, *allowed: torch.dtype, used: torch.dtype | None = None) -> Tensor:
    """Return a tensor, converted to the dtype that is used.

    Args:
        value: Value from a file or a caller.
        name: Names it in errors.
        allowed: Dtypes of its format.
        used: Dtype that is used. None: the tensor's own.

    Raises:
        SnpatchError: It is not a dense tensor of an allowed dtype, or a value is not finite in the dtype that is used.
    """
    tensor = check_type(value, name, *allowed)
    converted = tensor.detach().to(used or tensor.dtype)
    if not is_finite(converted):
        place = torch.nonzero(~torch.isfinite(converted))[0].tolist()
        got = f"{converted[tuple(place)].item()} at {place}"
        raise SnpatchError(f"{name} holds NaN or infinity: expected finite values in {converted.dtype}, got {got}")
    return converted


def check_type(value: object, name: str, *allowed: torch.dtype) -> Tensor:
    """Return a value. Raise SnpatchError unless it is a dense tensor of an allowed dtype."""
    expected = " or ".join(map(str, allowed))
    if not isinstance(value, Tensor):
        raise SnpatchError(f"{name}: expected a tensor of {expected}, got {type(value).__name__}")
    if value.dtype not in allowed or value.layout != torch.strided or value.is_meta:
        kind = "" if value.layout == torch.strided and not value.is_meta else f", {value.layout} on {value.device}"
        raise SnpatchError(f"{name}: expected a tensor of {expected}, got {value.dtype}{kind}")
    return value


def is_finite(tensor: Tensor, used: torch.dtype | None = None) -> bool:
    """Return whether all values are finite, after conversion to `used` if given. Integers are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    is_float8 = tensor.dtype.itemsize == 1
    extremes = torch.stack(
        torch.aminmax(tensor.bfloat16() if is_float8 else tensor)
    )  # 30 times as fast as isfinite on a CPU
    return bool(torch.isfinite(extremes if used is None else extremes.to(used)).all())
