"""Checks of tensors that files and callers give: their type, and whether their values are finite in the type of use.

Why after conversion: 1e300 is finite in a file of float64, and infinite on the device.
"""

import torch
from torch import Tensor

from snpatch.errors import SnpatchError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # types of adapters and checkpoints


def check_tensor(value: object, name: str, *allowed: torch.dtype, used: torch.dtype | None = None) -> Tensor:
    """Return a tensor in the type of its use.

    Args:
        value: what a file or a caller gave.
        name: names it in errors.
        allowed: types that its format has.
        used: the type that it is used in; None: its own.

    Raises:
        SnpatchError: it is no dense tensor of an allowed type, or a value is not finite in the type of use.
    """
    check_type(value, name, *allowed)
    converted = value.detach().to(used or value.dtype)
    if not is_finite(converted):
        place = torch.nonzero(~torch.isfinite(converted))[0].tolist()
        got = f"{converted[tuple(place)].item()} at {place}"
        raise SnpatchError(f"{name} holds NaN or infinity: expected finite values in {converted.dtype}, got {got}")
    return converted


def check_type(value: object, name: str, *allowed: torch.dtype) -> None:
    """Raise a SnpatchError unless a value is a dense tensor of an allowed type."""
    expected = " or ".join(map(str, allowed))
    if not isinstance(value, Tensor):
        raise SnpatchError(f"{name}: expected a tensor of {expected}, got {type(value).__name__}")
    if value.dtype not in allowed or value.layout != torch.strided or value.is_meta:
        kind = "" if value.layout == torch.strided and not value.is_meta else f", {value.layout} on {value.device}"
        raise SnpatchError(f"{name}: expected a tensor of {expected}, got {value.dtype}{kind}")


def is_finite(tensor: Tensor, used: torch.dtype | None = None) -> bool:
    """Return whether a tensor of real numbers is finite, in the type `used` if there is one. Integers are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    of_bytes = tensor.dtype.itemsize == 1
    extremes = torch.stack(
        torch.aminmax(tensor.bfloat16() if of_bytes else tensor)
    )  # a CPU's isfinite: 30 times as slow
    return bool(torch.isfinite(extremes if used is None else extremes.to(used)).all())
