"""What a twin engine is built with, and the vLLM settings under which it refuses to be built.

The settings travel inside vLLM's own config (`additional_config`), so that every process has them and vLLM's
compile cache tells them apart.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from snpatch.config import Capacity, ModelSource
from snpatch.errors import SnpatchError
from snpatch.executors.vllm import quantization
from snpatch.models.fingerprint import local_adapter_folder, local_snapshot

SCORE_BIAS = "score_bias"  # in the config that a score model's worker gets: whether its head has a bias
SAME_WEIGHTS = "snpatch_same_weights"  # of extra_args: both models of the request are on one of two sets of weights
KEY = "snpatch"  # of additional_config, and of each request's extra_args: [ticket, *row]


@dataclass(frozen=True)
class DualStreamSettings(Capacity):
    """The sizes, and what else every process has to know.

    ends: of each set of weights the tokens that end its texts; their positions do not count where a request says so.
    weights, lora: of the second set; see ModelSource. supports_row_routing: nothing is compiled, so that
    a row can go through the other stream's set. allow_untested: try quantisations that no test
    covers.
    """

    eos_ids: tuple[tuple[int, ...], ...] = ((),)
    has_secondary: bool = False
    weights: str | None = None
    supports_row_routing: bool = True
    lora: tuple[str, ...] = ()
    allow_untested: bool = False

    @classmethod
    def made(
        cls,
        sizes: Capacity,
        ends: Iterable[Iterable[int]],
        second: ModelSource | None,
        *,
        is_eager: bool,
        allow_untested: bool,
    ) -> "DualStreamSettings":
        parts = {"supports_row_routing": is_eager}
        if second is not None:
            lora = tuple(str(local_adapter_folder(one)) for one in second.lora)
            parts |= {
                "has_secondary": True,
                "weights": second.checkpoint and local_snapshot(second.checkpoint),
                "lora": lora,
            }
        every = tuple(tuple(sorted(one)) for one in ends)
        return cls(**asdict(sizes), eos_ids=every, allow_untested=allow_untested, **parts)

    def as_config(self) -> dict:
        """For vLLM's `additional_config`."""
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, vllm_config) -> "DualStreamSettings":
        """The settings inside a vLLM config; the defaults where it has none."""
        return cls(**vllm_config.additional_config.get(KEY, {}))


def check_heads(vllm_config) -> None:
    """An error for heads that vLLM's attention has no code for on a CPU; it would fail at its first step."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model, sizes = vllm_config.model_config, CPUAttentionBackend.get_supported_head_sizes()
    if not model.use_mla and model.get_head_size() not in sizes:
        raise SnpatchError(
            f"{model.model}: its heads have {model.get_head_size()} values, and on a CPU vLLM's attention takes "
            f'{", ".join(map(str, sizes))}; use backend="transformers"'
        )


def refuse(vllm_config) -> None:
    """Raise for what a twin cannot be combined with, with the reason."""
    settings = DualStreamSettings.of(vllm_config)
    reasons = _reasons(vllm_config, settings) | (_reasons_of_two_streams(vllm_config) if settings.streams == 2 else {})
    for reason, is_so in reasons.items():
        if is_so:
            raise SnpatchError(f"a twin model cannot be combined with {reason}")


def _reasons(vllm_config, settings: DualStreamSettings) -> dict[str, bool]:
    """Of one stream as of two: what loses, splits or reorders the tokens that are patched and counted."""
    model, parallel, passes = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.compilation_config.pass_config,
    )
    untested = [] if settings.allow_untested else quantization.untested_quantization(vllm_config)
    is_untried_pair = settings.has_secondary and model.quantization is not None and not settings.allow_untested
    return {
        "speculative decoding: draft tokens that are rejected would be patched and counted": (
            vllm_config.speculative_config is not None
        ),
        "LoRA: its per-token adapters do not know of the second stream": vllm_config.lora_config is not None,
        "pipeline parallel: its stages hand over one row a token": parallel.pipeline_parallel_size > 1,
        "data parallel: statistics of several engines are not gathered": parallel.data_parallel_size > 1,
        "context parallel: it splits the keys that both streams share": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "dual-batch overlap: it splits a step's tokens": bool(getattr(parallel, "use_ubatching", False)),
        "sequence parallel: it splits a step's rows": bool(getattr(passes, "enable_sp", False)),
        "fused all-reduce and norm (fuse_allreduce_rms): it is sized by tokens, and the rows are twice that": bool(
            getattr(passes, "fuse_allreduce_rms", False)
        ),
        "prompt embeddings: they have no second stream": bool(getattr(model, "enable_prompt_embeds", False)),
        "sleep mode: a worker that sleeps loses its adapters, rankings and constants, and plain requests would run on "
        "what it wakes up with": bool(getattr(model, "enable_sleep_mode", False)),
        "a KV connector (kv_transfer_config): it would hand the twin's blocks to engines of the plain model": (
            getattr(vllm_config, "kv_transfer_config", None) is not None
        ),
        "weights that change while the engine runs (weight_transfer_config): results are kept under the content of "
        "those that it started with": getattr(vllm_config, "weight_transfer_config", None) is not None,
        "Ray as the executor of vLLM's workers: they would end with the process that started Ray; use "
        'distributed_executor_backend="mp"': bool(parallel.use_ray),
        "batch-invariant kernels (VLLM_BATCH_INVARIANT) and a second set of weights: each set's rows are not side by "
        "side": settings.has_secondary and os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0",
        "encoder-decoder models: only decoders are patched": bool(model.is_encoder_decoder),
        "fast prefill with shared KV: it skips tokens of later layers": bool(
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        f"the quantisation {', '.join(untested)}, which is not tested (tested: {quantization.TESTED}); "
        "allow_untested=True tries it": bool(untested),
        "a second set of weights where they are quantised, which is not tested; allow_untested=True tries it, and one "
        "engine for each model does without": is_untried_pair,
        "cache scales measured on the first batch (calculate_kv_scales): they hang on its patches": bool(
            getattr(vllm_config.cache_config, "calculate_kv_scales", False)
        ),
        f"the runner {model.runner_type!r}: only generation is patched": model.runner_type != "generate",
    }


def _reasons_of_two_streams(vllm_config) -> dict[str, bool]:
    """What holds one row a token outside of attention, or heads that are not simply twice as many."""
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    shapes = getattr(getattr(compilation, "dynamic_shapes_config", None), "type", "backed")
    shapes = str(getattr(shapes, "value", shapes))
    alone = "; streams=1 patches it with constants"
    return {
        f"multi-head latent attention (MLA): its heads share one latent key{alone}": bool(model.use_mla),
        f"hybrid and attention-free models: only attention knows of the second stream{alone}": bool(
            model.is_hybrid or model.is_attention_free
        ),
        f"several positions a token (M-RoPE, XD-RoPE): each row would need all of them{alone}": bool(
            model.uses_mrope or getattr(model, "uses_xdrope_dim", 0)
        ),
        f"{shapes} dynamic shapes: vLLM declares as many positions as tokens, and the twin has twice as many": (
            shapes != "backed"
        ),
        "compile_sizes beside +rotary_embedding: vLLM would compile as many positions as tokens": (
            bool(compilation.compile_sizes) and "+rotary_embedding" in compilation.custom_ops
        ),
        "a scale for each head of the cache (kv_cache_scheme attn_head): the twin has twice the heads": (
            quantization.has_per_head_scales(vllm_config)
        ),
    }


def dual_stream_capture_sizes(max_num_seqs: int | None) -> list[int]:
    """Return the numbers of tokens to capture a graph of: vLLM's, and some between its small ones, since a padded token
    is two rows. max_num_seqs: of the engine's arguments, if they say it."""
    largest = 512 if max_num_seqs is None else min(512, 2 * max_num_seqs)
    sizes = (1, 2, 4, 6, 8, 12, 16, 20, *range(24, 256, 8), *range(256, 513, 16))
    return [size for size in sizes if size <= largest]
