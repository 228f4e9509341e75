"""Zeroing of the KV cache's blocks before vLLM uses them again, in every process of a twin.

A patch may overflow and write NaN into its text's blocks. vLLM gives them to the next text as they are, and attention
multiplies the values past that text's end by a probability of 0: 0 * NaN = NaN. vLLM can zero blocks, and does so for
some models only (KVCacheConfig.needs_kv_cache_zeroing). On a CPU it skips sliding windows, and before 0.28 everywhere.
"""

import os
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import nn

from snpatch.errors import SnpatchError

ENABLED = "SNPATCH_ZERO_BLOCKS"  # set in all processes of a twin


def enable() -> None:
    """Let vLLM zero blocks in the processes of a twin. To be called in each process; may be called more than once."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    original = KVCacheConfig.needs_kv_cache_zeroing
    if not hasattr(original.fget, "snpatch"):

        def needs_kv_cache_zeroing(config) -> bool:
            return ENABLED in os.environ or original.fget(config)

        needs_kv_cache_zeroing.snpatch = True
        KVCacheConfig.needs_kv_cache_zeroing = property(needs_kv_cache_zeroing)


def tensors_of(caches: Iterable) -> list[torch.Tensor]:
    """Return the tensors of a runner's caches: one of an attention layer, several of a state-space layer."""
    return [tensor for cache in caches for tensor in ([cache] if isinstance(cache, torch.Tensor) else cache)]


def zero_on_cpu(runner, block_ids: list[int]) -> None:
    """Zero blocks of all layers: in the place of CPUModelRunner._zero_block_ids."""
    ids = torch.tensor(block_ids)
    for kv in {cache.data_ptr(): cache for cache in tensors_of(runner.kv_caches)}.values():
        # vLLM 0.24 keeps keys and values apart, [2, blocks, ...]; later versions have [blocks, ...].
        has_parts = kv.shape[:2] == (2, runner.kv_cache_config.num_blocks)
        kv.index_fill_(1 if has_parts else 0, ids, 0)


def widen_windows(attention: Iterable[nn.Module]) -> None:
    """Let layers with a sliding window keep a full cache: vLLM before 0.28 zeroes the blocks of no other."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    for layer in attention:

        def get_kv_cache_spec(vllm_config, original=layer.get_kv_cache_spec):
            spec = original(vllm_config)
            if not isinstance(spec, SlidingWindowSpec):
                return spec
            shared = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if hasattr(spec, f.name)}
            return FullAttentionSpec(**shared)

        layer.get_kv_cache_spec = get_kv_cache_spec


def check_step(scheduler_output) -> None:
    """Raise an error if the scheduler does not send the blocks to zero: each new request gets one at least."""
    if scheduler_output.scheduled_new_reqs and not scheduler_output.new_block_ids_to_zero:
        raise SnpatchError("vLLM's scheduler does not zero blocks of the KV cache: is snpatch's plugin switched off?")


def check(runner) -> None:
    """Raise an error if this worker would not zero blocks."""
    if runner.device.type == "cpu":
        is_ready = type(runner)._zero_block_ids is zero_on_cpu
    else:  # Model Runner V1 and V2
        zeroer = getattr(runner, "_kv_block_zeroer", None) or getattr(runner, "kv_block_zeroer", None)
        is_ready = getattr(zeroer, "_meta", None) is not None
    if not is_ready:
        raise SnpatchError(f"{type(runner).__name__} does not zero blocks of the KV cache: use another vLLM version")
