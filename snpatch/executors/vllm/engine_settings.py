"""Settings of a dual-stream engine, and the vLLM features it cannot be combined with.

The settings travel inside vLLM's own config (`additional_config`), so that every process has them and vLLM's
compile cache depends on them.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from snpatch.config import Capacity, ModelSource
from snpatch.errors import SnpatchError
from snpatch.executors.vllm import quantization
from snpatch.models.hub import resolve_adapter_folder, resolve_revision

SCORE_BIAS = "score_bias"  # key of a score model's config: whether its head has a bias
SAME_WEIGHTS = "snpatch_same_weights"  # key of extra_args: recipient and donor are on the same of two sets of weights
KEY = "snpatch"  # of additional_config, and of each request's extra_args: [ticket, *row]


@dataclass(frozen=True)
class DualStreamSettings(Capacity):
    """Capacity of an engine, and what else all of its processes need.

    eos_ids: for each set of weights the tokens that end its texts; requests can exclude their positions from the
    statistics. secondary_checkpoint, secondary_lora: see ModelSource. supports_row_routing: nothing is compiled, so
    that a row can go through the weights of the other stream. allow_untested: accept quantizations that no test covers.
    """

    eos_ids: tuple[tuple[int, ...], ...] = ((),)
    has_secondary: bool = False
    secondary_checkpoint: str | None = None
    supports_row_routing: bool = True
    secondary_lora: tuple[str, ...] = ()
    allow_untested: bool = False

    @classmethod
    def build(
        cls,
        capacity: Capacity,
        eos_ids: Iterable[Iterable[int]],
        secondary: ModelSource | None,
        *,
        is_eager: bool,
        allow_untested: bool,
    ) -> "DualStreamSettings":
        """Build an engine's settings; secondary LoRAs and name@revision checkpoints become local folders.

        Args:
            capacity: Sizes of the tables on the device, and the number of streams.
            eos_ids: EOS ids of each set of weights, in any order.
            secondary: Source of the secondary weights; None without them.
            is_eager: Whether vLLM compiles nothing; sets `supports_row_routing`.
            allow_untested: Accept quantizations that no test covers.
        """
        values: dict[str, Any] = {"supports_row_routing": is_eager}
        if secondary is not None:
            values |= {
                "has_secondary": True,
                "secondary_checkpoint": secondary.checkpoint and resolve_revision(secondary.checkpoint),
                "secondary_lora": tuple(str(resolve_adapter_folder(folder)) for folder in secondary.lora),
            }
        sorted_ids = tuple(tuple(sorted(ids)) for ids in eos_ids)
        return cls(**asdict(capacity), eos_ids=sorted_ids, allow_untested=allow_untested, **values)

    def as_config(self) -> dict:
        """Return the settings as an entry of vLLM's `additional_config`."""
        return {KEY: asdict(self)}

    @classmethod
    def from_vllm_config(cls, vllm_config) -> "DualStreamSettings":
        """Return the settings in a vLLM config; the defaults if it has none."""
        return cls(**vllm_config.additional_config.get(KEY, {}))


def check_heads(vllm_config) -> None:
    """Raise for a head size that vLLM's attention on a CPU does not support.

    It would fail at its first step.
    """
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


class Conflict(NamedTuple):
    """A vLLM feature that a dual-stream model cannot be combined with. applies: whether a config uses it."""

    feature: str
    reason: str
    applies: bool


def check_supported(vllm_config) -> None:
    """Raise if a vLLM config uses a feature that a dual-stream model cannot be combined with."""
    settings = DualStreamSettings.from_vllm_config(vllm_config)
    conflicts = _conflicts(vllm_config, settings)
    if settings.streams == 2:
        conflicts += _two_stream_conflicts(vllm_config)
    for conflict in conflicts:
        if conflict.applies:
            raise SnpatchError(
                f"a dual-stream model cannot be combined with {conflict.feature}, because {conflict.reason}"
            )


def _conflicts(vllm_config, settings: DualStreamSettings) -> list[Conflict]:
    """Return features that lose, split or reorder the tokens that are patched and counted.

    They conflict with one or two streams.
    """
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    passes = vllm_config.compilation_config.pass_config
    untested = [] if settings.allow_untested else quantization.untested_quantization(vllm_config)
    is_untested_pair = settings.has_secondary and model.quantization is not None and not settings.allow_untested
    splits_context = (
        getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    )
    is_batch_invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
    return [
        Conflict(
            "speculative decoding",
            "rejected draft tokens would be patched and counted",
            vllm_config.speculative_config is not None,
        ),
        Conflict(
            "LoRA",
            "its per-token adapters are not applied to the second stream",
            vllm_config.lora_config is not None,
        ),
        Conflict("pipeline parallel", "its stages exchange one row per token", parallel.pipeline_parallel_size > 1),
        Conflict("data parallel", "statistics of several engines are not gathered", parallel.data_parallel_size > 1),
        Conflict("context parallel", "it splits the keys that both streams share", splits_context),
        Conflict("dual-batch overlap", "it splits a step's tokens", bool(getattr(parallel, "use_ubatching", False))),
        Conflict("sequence parallel", "it splits a step's rows", bool(getattr(passes, "enable_sp", False))),
        Conflict(
            "fused all-reduce and norm (fuse_allreduce_rms)",
            "its buffers have one row per token, and a dual-stream model has two",
            bool(getattr(passes, "fuse_allreduce_rms", False)),
        ),
        Conflict(
            "prompt embeddings",
            "they have no second stream",
            bool(getattr(model, "enable_prompt_embeds", False)),
        ),
        Conflict(
            "sleep mode",
            "a sleeping worker loses its adapters, rankings and constants, and plain requests would run on what it "
            "wakes up with",
            bool(getattr(model, "enable_sleep_mode", False)),
        ),
        Conflict(
            "a KV connector (kv_transfer_config)",
            "it would give blocks of the dual-stream model to engines of the plain model",
            getattr(vllm_config, "kv_transfer_config", None) is not None,
        ),
        Conflict(
            "weights that change while the engine runs (weight_transfer_config)",
            "results are stored under the fingerprint of the weights that it started with",
            getattr(vllm_config, "weight_transfer_config", None) is not None,
        ),
        Conflict(
            "Ray as the executor of vLLM's workers",
            'they would end with the process that started Ray; use distributed_executor_backend="mp"',
            bool(parallel.use_ray),
        ),
        Conflict(
            "batch-invariant kernels (VLLM_BATCH_INVARIANT) and secondary weights",
            "the rows of one set of weights are not adjacent",
            settings.has_secondary and is_batch_invariant,
        ),
        Conflict("encoder-decoder models", "only decoders are patched", bool(model.is_encoder_decoder)),
        Conflict(
            "fast prefill with shared KV",
            "it skips tokens in later layers",
            bool(cache.kv_sharing_fast_prefill),
        ),
        Conflict(
            f"the quantization {', '.join(untested)}",
            f"it is not tested (tested: {quantization.TESTED}); allow_untested=True accepts it",
            bool(untested),
        ),
        Conflict(
            "secondary weights that are quantized",
            "they are not tested; allow_untested=True accepts them, or use one engine for each model",
            is_untested_pair,
        ),
        Conflict(
            "cache scales measured on the first batch (calculate_kv_scales)",
            "they depend on the patches of that batch",
            bool(getattr(cache, "calculate_kv_scales", False)),
        ),
        Conflict(f"the runner {model.runner_type!r}", "only generation is patched", model.runner_type != "generate"),
    ]


def _two_stream_conflicts(vllm_config) -> list[Conflict]:
    """Return features that conflict with two streams.

    They have one row per token outside of attention, or heads that cannot simply be doubled.
    """
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    shapes = getattr(getattr(compilation, "dynamic_shapes_config", None), "type", "backed")
    shapes = str(getattr(shapes, "value", shapes))
    alternative = "; streams=1 patches it with constants"
    return [
        Conflict(
            "multi-head latent attention (MLA)", f"its heads share one latent key{alternative}", bool(model.use_mla)
        ),
        Conflict(
            "hybrid and attention-free models",
            f"only attention layers support the second stream{alternative}",
            bool(model.is_hybrid or model.is_attention_free),
        ),
        Conflict(
            "several positions per token (M-RoPE, XD-RoPE)",
            f"each row would need all of them{alternative}",
            bool(model.uses_mrope or getattr(model, "uses_xdrope_dim", 0)),
        ),
        Conflict(
            f"{shapes} dynamic shapes",
            "vLLM declares as many positions as tokens, and a dual-stream model has twice as many",
            shapes != "backed",
        ),
        Conflict(
            "compile_sizes together with +rotary_embedding",
            "vLLM would compile as many positions as tokens",
            bool(compilation.compile_sizes) and "+rotary_embedding" in compilation.custom_ops,
        ),
        Conflict(
            "a scale for each head of the cache (kv_cache_scheme attn_head)",
            "a dual-stream model has twice the heads",
            quantization.has_per_head_scales(vllm_config),
        ),
    ]


def dual_stream_capture_sizes(max_num_seqs: int | None) -> list[int]:
    """Return the numbers of tokens to capture CUDA graphs for.

    vLLM's sizes, and some between its small ones, because each padded token is two rows. max_num_seqs: the engine
    argument, if it is given.
    """
    largest = 512 if max_num_seqs is None else min(512, 2 * max_num_seqs)
    sizes = (1, 2, 4, 6, 8, 12, 16, 20, *range(24, 256, 8), *range(256, 513, 16))
    return [size for size in sizes if size <= largest]
