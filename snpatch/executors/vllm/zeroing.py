"""Zeroing of KV cache blocks before vLLM reuses them, in every process of a dual-stream engine.

A patch may overflow and write NaN into its request's blocks. vLLM gives them to the next request unchanged, and
attention multiplies the values past that request's end by a probability of 0: 0 * NaN = NaN. vLLM can zero blocks, but
does so for some models only (KVCacheConfig.needs_kv_cache_zeroing). On a CPU it skips sliding windows, and before 0.28
all layers.
"""

import os
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch

from snpatch.errors import SnpatchError

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

ENABLED = "SNPATCH_ZERO_BLOCKS"  # environment variable, set in all processes of a dual-stream engine


def enable() -> None:
    """Make vLLM zero blocks in this process; may be called more than once."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    config_class = cast(Any, KVCacheConfig)  # its property is replaced
    original = config_class.needs_kv_cache_zeroing.fget
    if not hasattr(original, "snpatch"):

        def needs_kv_cache_zeroing(config) -> bool:
            return ENABLED in os.environ or original(config)

        cast(Any, needs_kv_cache_zeroing).snpatch = True
        config_class.needs_kv_cache_zeroing = property(needs_kv_cache_zeroing)


def cache_tensors(caches: Iterable) -> list[torch.Tensor]:
    """Return the tensors of a runner's caches: one per attention layer, several per state-space layer."""
    return [tensor for cache in caches for tensor in ([cache] if isinstance(cache, torch.Tensor) else cache)]


def zero_on_cpu(runner, block_ids: list[int]) -> None:
    """Zero blocks of all layers; replaces CPUModelRunner._zero_block_ids."""
    ids = torch.tensor(block_ids)
    for kv in {cache.data_ptr(): cache for cache in cache_tensors(runner.kv_caches)}.values():
        # vLLM 0.24 stores keys and values apart, [2, blocks, ...]; later versions have [blocks, ...].
        has_parts = kv.shape[:2] == (2, runner.kv_cache_config.num_blocks)
        kv.index_fill_(1 if has_parts else 0, ids, 0)


def widen_windows(attention: Iterable["Attention"]) -> None:
    """Give layers with a sliding window a full cache.

    vLLM before 0.28 zeroes blocks of full caches only.
    """
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
    """Raise if the scheduler sends no blocks to zero although new requests start.

    Each new request gets at least one block.
    """
    if scheduler_output.scheduled_new_reqs and not scheduler_output.new_block_ids_to_zero:
        raise SnpatchError("vLLM's scheduler does not zero blocks of the KV cache: is snpatch's plugin switched off?")


def check_runner(runner) -> None:
    """Raise if this worker would not zero blocks."""
    if runner.device.type == "cpu":
        is_ready = type(runner)._zero_block_ids is zero_on_cpu
    else:  # Model Runner V1 and V2
        zeroer = getattr(runner, "_kv_block_zeroer", None) or getattr(runner, "kv_block_zeroer", None)
        is_ready = getattr(zeroer, "_meta", None) is not None
    if not is_ready:
        raise SnpatchError(f"{type(runner).__name__} does not zero blocks of the KV cache. Use another vLLM version.")
