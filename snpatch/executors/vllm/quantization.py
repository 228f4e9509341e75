"""Which quantised weights and caches a twin serves.

Why most of it needs nothing from us: a quantised layer replaces one product, row by row, and vLLM fuses an activation
into the next layer's quantisation only where it finds its own `SiluAndMul`, whose place the op has taken. What is named
here is what was not tested, and what gives a wrong text that no receipt would show.
"""

import torch
from torch import nn

from snpatch.errors import SnpatchError

METHODS = ("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin")  # two formats, by their names in vLLM
COMPRESSED = "compressed-tensors"
SCHEMES = ("int W4A16", "int W8A8", "float W8A8")
TESTED = f"AWQ, GPTQ, and {COMPRESSED} {', '.join(SCHEMES)}"
CPU_4_BITS = "cpu_gemm_wna16"  # the operator
CACHES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def untested_quantization(vllm_config) -> list[str]:
    """The quantisations of this config that no test of a twin covers."""
    method, cache = vllm_config.model_config.quantization, vllm_config.cache_config.cache_dtype
    found = [] if method is None or method in METHODS else [method]
    if method == COMPRESSED:
        schemes = {_scheme(group) for group in vllm_config.quant_config.target_scheme_map.values() if group}
        found = [f"{COMPRESSED} {scheme}" for scheme in sorted(schemes - set(SCHEMES))]
    return found + [f"kv_cache_dtype {cache}"] * (cache not in CACHES)


def _scheme(group: dict) -> str:
    weights, inputs = group["weights"], group["input_activations"]
    blocks = " in blocks" if weights.strategy == "block" else ""
    return f"{weights.type} W{weights.num_bits}A{inputs.num_bits if inputs else 16}{blocks}"


def has_per_head_scales(vllm_config) -> bool:
    """Whether the checkpoint scales each head of the cache; a twin has twice as many."""
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    return bool(scheme) and scheme.get("strategy") == "attn_head"


def check_kernels(vllm_config) -> None:
    """Raise for 4-bit weights on a CPU without AVX-512, for which vLLM has no kernel; it would fail while it loads."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and 4 in _weight_bits(vllm_config) and not hasattr(torch.ops._C, CPU_4_BITS):
        raise SnpatchError(
            f"{vllm_config.model_config.model}: its weights have 4 bits, and vLLM's kernel for them on a CPU "
            f"({CPU_4_BITS}) needs AVX-512, which this one lacks. Use a checkpoint that is not quantised, or a GPU."
        )


def _weight_bits(vllm_config) -> set[int]:
    """Return how many bits a checkpoint's quantised weights have, as the formats of METHODS and COMPRESSED say it."""
    table = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    groups = table.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    return {table.get("bits"), table.get("w_bit"), *(one.get("num_bits") for one in weights)} - {None}


def check_activation_scales(model: nn.Module) -> None:
    """An error for a layer that quantises all rows of a step by one scale, which every row of the step changes.

    The donor's rows, other requests and padding would be in a request's text, and its receipt would still be right.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel as Fp8

    for name, module in model.named_modules():
        holders = [getattr(module, holder, None) for holder in ("quant_method", "scheme")]
        kernels = [k for holder in holders if holder is not None for k in vars(holder).values() if isinstance(k, Fp8)]
        for kernel in kernels:
            quantises = type(kernel).apply_weights is Fp8.apply_weights  # others take their input as it is
            if quantises and not kernel.quant_fp8.static and kernel.quant_fp8.group_shape.is_per_tensor():
                raise SnpatchError(
                    f"{name}: {type(kernel).__name__} quantises all rows of a step by one scale, so that a request "
                    "would hang on the others of its batch; use a checkpoint with static or per-token activation scales"
                )
