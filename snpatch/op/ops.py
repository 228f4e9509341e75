"""The torch ops: schemas, fake implementations and dispatch.

C++ (csrc/) serves CPU tensors, Triton (kernels/) CUDA tensors, and snpatch/op/reference.py all others.
SNPATCH_OPS=reference|cpp|triton forces one implementation for every tensor. Why `Library.define` and not
`torch.library.custom_op`: a call takes 8 us instead of 35, once per layer and step.
"""

import importlib.util
import os
import warnings

import torch
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.op import reference
from snpatch.op.plan import ReceiptColumn, num_plan_interventions, plan_width

_MISSING_KERNELS = (
    "the C++ kernels cannot be loaded: {}. To build them, run in snpatch's checkout: pip install --no-build-isolation ."
)
_LIBRARY = torch.library.Library("snpatch", "DEF")
_LIBRARY.define(
    "patched_glu(Tensor gate_up, Tensor scale, Tensor rank, Tensor constant, Tensor plan, Tensor(a!) stats, "
    "Tensor(b!) count, Tensor(c!) capture, Tensor(d!) receipt, str activation, int streams, int layer, "
    "int first_neuron) -> Tensor"
)


def patched_glu(
    gate_up: Tensor,
    scale: Tensor,
    rank: Tensor,
    constant: Tensor,
    plan: Tensor,
    stats: Tensor,
    count: Tensor,
    capture: Tensor,
    receipt: Tensor,
    *,
    activation: str,
    streams: int,
    layer: int,
    first_neuron: int = 0,
) -> Tensor:
    """Run `reference.patched_glu` by the implementation for this device; shapes and meaning are the same."""
    return torch.ops.snpatch.patched_glu(
        gate_up,
        scale,
        rank,
        constant,
        plan,
        stats,
        count,
        capture,
        receipt,
        activation,
        streams,
        layer,
        first_neuron,
    )


def implementations() -> dict[str, str]:
    """Return the implementation that serves each op and device, as `snpatch env` prints it."""
    return {f"patched_glu ({device})": server for device, server in _SERVERS.items()}


def _check_arguments(gate_up, scale, rank, constant, plan, stats, count, capture, receipt, activation, streams, *_):
    """Check the shapes and types that every implementation relies on."""
    width = gate_up.shape[1] // 2
    expected = {
        "gate_up": (gate_up, (streams * plan.shape[0], 2 * width), gate_up.dtype),
        "scale": (scale, (None, width), torch.float32),
        "rank": (rank, (None, width), torch.int32),
        "constant": (constant, (None, width), torch.float32),
        "plan": (plan, (None, plan_width(num_plan_interventions(plan.shape[1]))), torch.int32),
        "stats": (stats, (None, reference.SUMS, width), torch.float64),
        "count": (count, (stats.shape[0],), torch.int64),
        "capture": (capture, (None, None), torch.float32),
        "receipt": (receipt, (None, len(ReceiptColumn)), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        has_shape = tensor.dim() == len(shape) and all(
            size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
        )
        is_dense = tensor.is_contiguous() if name != "gate_up" else tensor.numel() < 2 or tensor.stride(1) == 1
        if not (has_shape and is_dense) or tensor.dtype != dtype:
            got = f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
            raise SnpatchError(f"patched_glu: {name}: expected {list(shape)} {dtype} with dense rows, got {got}")
    if streams not in (1, 2):
        raise SnpatchError(f"patched_glu: streams: expected 1 or 2, got {streams}")
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise SnpatchError(f"patched_glu: activation: expected one of {known}, got {activation!r}")


def _serve_reference(*arguments):
    _check_arguments(*arguments)
    return reference.patched_glu(*arguments)


def _fake(*arguments):
    _check_arguments(*arguments)
    gate_up = arguments[0]
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _serve_triton(*arguments):
    _check_arguments(*arguments)
    with torch.cuda.device_of(arguments[0]):
        return importlib.import_module("snpatch.kernels.patched_glu").patched_glu(*arguments)


def _register() -> dict[str, str]:
    """Register the requested implementations; return device -> implementation."""
    forced = os.environ.get("SNPATCH_OPS", "")
    if forced not in ("", "reference", "cpp", "triton"):
        raise SnpatchError(f"SNPATCH_OPS: expected reference, cpp or triton, got {forced!r}")
    _LIBRARY.impl("patched_glu", _serve_reference, "CompositeExplicitAutograd")
    torch.library.register_fake("snpatch::patched_glu", _fake, lib=_LIBRARY)
    servers = {"cpu": "reference (PyTorch)", "cuda": "reference (PyTorch)"}
    if forced in ("", "cpp"):
        try:
            importlib.import_module("snpatch._C")
            servers["cpu"] = "C++"
        except ImportError as error:
            if forced:
                raise SnpatchError(f"SNPATCH_OPS=cpp: {_MISSING_KERNELS.format(error)}") from error
            warnings.warn(
                f"snpatch: CPU ops run in plain PyTorch because {_MISSING_KERNELS.format(error)}", stacklevel=2
            )
    has_triton = importlib.util.find_spec("triton") is not None
    if forced == "triton" and not has_triton:
        raise SnpatchError("SNPATCH_OPS=triton: triton is not installed")
    if not forced and not has_triton and torch.cuda.is_available():
        warnings.warn("snpatch: CUDA ops run in plain PyTorch because triton is not installed", stacklevel=2)
    if has_triton and forced in ("", "triton"):
        for key in ("CUDA", "CPU") if forced else ("CUDA",):
            _LIBRARY.impl("patched_glu", _serve_triton, key)
            servers[key.lower()] = "Triton"
    return servers


_SERVERS = _register()
