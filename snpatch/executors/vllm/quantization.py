"""Quantized weights and KV caches that a dual-stream model supports.

Why most of them need no code: a quantized layer replaces one matrix product, row by row, and vLLM fuses an activation
into the next layer's quantization only where it finds its own `SiluAndMul`, which the op has replaced. The names here
exclude what was not tested and what gives wrong texts that no receipt would show.
"""

import torch
from torch import nn

from snpatch.errors import SnpatchError

METHODS = ("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin")  # two formats, by their names in vLLM
COMPRESSED = "compressed-tensors"
SCHEMES = ("int W4A16", "int W8A8", "float W8A8")
TESTED = f"AWQ, GPTQ, and {COMPRESSED} {', '.join(SCHEMES)}"
CPU_4_BIT_OPERATOR = "cpu_gemm_wna16"
CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def untested_quantization(vllm_config) -> list[str]:
    """Return the quantizations of this config that no test of a dual-stream model covers."""
    method, cache_dtype = vllm_config.model_config.quantization, vllm_config.cache_config.cache_dtype
    untested = [] if method is None or method in METHODS else [method]
    if method == COMPRESSED:
        schemes = {_scheme_name(group) for group in vllm_config.quant_config.target_scheme_map.values() if group}
        untested = [f"{COMPRESSED} {scheme}" for scheme in sorted(schemes - set(SCHEMES))]
    return untested + [f"kv_cache_dtype {cache_dtype}"] * (cache_dtype not in CACHE_DTYPES)


def _scheme_name(group: dict) -> str:
    weights, inputs = group["weights"], group["input_activations"]
    blocks = " in blocks" if weights.strategy == "block" else ""
    return f"{weights.type} W{weights.num_bits}A{inputs.num_bits if inputs else 16}{blocks}"


def has_per_head_scales(vllm_config) -> bool:
    """Return whether the checkpoint scales each head of the KV cache.

    A dual-stream model has twice as many heads.
    """
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    return bool(scheme) and scheme.get("strategy") == "attn_head"


def check_kernels(vllm_config) -> None:
    """Raise for 4-bit weights on a CPU without AVX-512.

    vLLM has no kernel for them and would fail while loading.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or hasattr(torch.ops._C, CPU_4_BIT_OPERATOR):
        return
    if 4 in _weight_bits(vllm_config):
        raise SnpatchError(
            f"{vllm_config.model_config.model}: its weights have 4 bits, and vLLM's kernel for them on a CPU "
            f"({CPU_4_BIT_OPERATOR}) needs AVX-512, which this one lacks. Use a checkpoint that is not quantized, or a "
            "GPU."
        )


def _weight_bits(vllm_config) -> set[int]:
    """Return the bits of a checkpoint's quantized weights.

    The formats of METHODS and COMPRESSED declare them.
    """
    table = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    groups = table.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    declared = [table.get("bits"), table.get("w_bit"), *(scheme.get("num_bits") for scheme in weights)]
    return {bits for bits in declared if bits is not None}


def check_activation_scales(model: nn.Module) -> None:
    """Raise for a layer that quantizes all rows of a step with one scale.

    Such a scale depends on every row of the step. Donor rows, other requests and padding would change a request's text,
    and its receipt would still be right.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel as Fp8Kernel

    for name, module in model.named_modules():
        owners = [getattr(module, attribute, None) for attribute in ("quant_method", "scheme")]
        owners = [owner for owner in owners if owner is not None]
        kernels = [kernel for owner in owners for kernel in vars(owner).values() if isinstance(kernel, Fp8Kernel)]
        for kernel in kernels:
            quantizes = type(kernel).apply_weights is Fp8Kernel.apply_weights  # others take their input unquantized
            if quantizes and not kernel.quant_fp8.static and kernel.quant_fp8.group_shape.is_per_tensor():
                raise SnpatchError(
                    f"{name}: {type(kernel).__name__} quantizes all rows of a step with one scale, so a request would "
                    "depend on the other requests of its batch. Use a checkpoint with static or per-token activation "
                    "scales."
                )
