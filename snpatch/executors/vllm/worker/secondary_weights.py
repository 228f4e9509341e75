"""Secondary weights of a dual-stream model.

Modules apply the primary weights to stream 0 and the secondary weights to stream 1. If both models of a request are on
the same weights, the donor's rows go through those instead; only an engine that compiles nothing can route single rows.

The secondary weights are loaded into vLLM's own model class by vLLM's own loader, without attention and without being
registered in the engine's config. Then each secondary module whose weights differ is attached to its primary
counterpart; equal tensors are stored once. The rows keep their order, so attention, op, scheduler and plan do not
change.

Why `quant_method.apply` of a linear layer is replaced and not its forward: what follows in forward, such as the sum
over tensor-parallel workers, then runs once for both streams.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader

from snpatch.errors import SnpatchError
from snpatch.executors.vllm.engine_settings import KEY, DualStreamSettings
from snpatch.executors.vllm.worker.step_planner import StepPlanner
from snpatch.models.checkpoint import iter_finite
from snpatch.models.compatibility import have_equal_weights, total_bytes
from snpatch.models.lora import merge_loras

SECONDARY = "secondary"  # name under which a module holds its secondary counterpart
VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


class SecondaryWeights:
    """Secondary weights of one worker.

    planner: has the streams and rows of the current step. bytes: memory of the modules in `attached`, the names of
    primary modules that have a secondary counterpart. has_head: the output head is one of them.
    """

    def __init__(
        self, base: type[nn.Module], vllm_config: VllmConfig, prefix: str, planner: StepPlanner, primary_bytes: int
    ) -> None:
        self._config, self._settings = vllm_config, DualStreamSettings.from_vllm_config(vllm_config)
        self._planner = planner
        self.name = self._settings.secondary_checkpoint or vllm_config.model_config.model
        self.bytes, self.attached, self.has_head = 0, [], False
        # Swapped rows, and the row indices of each set of weights for them.
        self._rows: tuple[Any, Any, Any] = (None, None, None)
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        check_free_memory(primary_bytes, vllm_config)
        with _weights_only_config(vllm_config) as weights_only:
            self._holder: Any = base(vllm_config=weights_only, prefix=prefix)

    def load(self, model: nn.Module) -> set[str]:
        """Load the weights and attach them to a loaded model.

        Return the parameter names under which the model has them.
        """
        config = copy.copy(self._config.model_config)
        if self._settings.secondary_checkpoint is not None:
            config.model, config.revision = self._settings.secondary_checkpoint, None
        loader: Any = get_model_loader(self._config.load_config)
        if not hasattr(loader, "get_all_weights"):
            raise SnpatchError(f"load_format {self._config.load_config.load_format} cannot load secondary weights")
        weights = merge_loras(loader.get_all_weights(config, self._holder), self._settings.secondary_lora)
        weights = self._resize_vocabulary(weights)
        self._holder.load_weights(iter_finite(weights, self.name, used=used_dtype(self._config)))
        return self.attach(model)

    def attach(self, model: nn.Module, is_shared: Callable[[nn.Module, nn.Module], bool] | None = None) -> set[str]:
        """Attach every secondary module whose weights differ to its primary counterpart."""
        is_shared = is_shared or have_equal_weights
        secondary_modules, names = dict(self._holder.named_modules()), set()
        for name, primary in list(model.named_modules()):
            parameters = dict(primary.named_parameters(recurse=False))
            if not parameters or is_shared(primary, secondary_modules[name]):
                continue
            secondary = secondary_modules[name]
            self._replace_forward(name, primary, secondary)
            primary.add_module(SECONDARY, secondary)
            self.attached.append(name)
            self.bytes += total_bytes(secondary.parameters(recurse=False))
            names |= {f"{name}.{SECONDARY}.{parameter}" for parameter in parameters}
        self._holder = None
        # Attached modules change the graphs that vLLM compiles and caches, so they have to be in its cache key.
        cast(dict, self._config.additional_config)[f"{KEY}_paired"] = self.attached
        return names

    def _replace_forward(self, name: str, primary: nn.Module, secondary: Any) -> None:
        if isinstance(primary, LinearBase):
            if primary.skip_bias_add and primary.bias is not None:
                raise SnpatchError(f"{name}: a layer with skip_bias_add and a bias cannot have secondary weights")
            primary.quant_method.apply = self._linear(primary, secondary)
        elif isinstance(primary, VocabParallelEmbedding):
            primary.quant_method.apply = self._head(primary, secondary)  # surgery.py replaces the input embedding
            self.has_head |= (
                isinstance(primary, ParallelLMHead) or self._config.model_config.hf_text_config.tie_word_embeddings
            )
        elif isinstance(primary, RMSNorm | GemmaRMSNorm):
            primary.forward = self._norm(primary.forward, secondary)
        else:
            raise SnpatchError(f"{name}: a {type(primary).__name__} cannot have secondary weights")

    def embed(self, ids: Tensor, primary: Callable[[Tensor], Tensor], secondary: Callable[[Tensor], Tensor]) -> Tensor:
        """Return each row's embedding of its token by the row's own weights, [2T, H]."""
        first, second = self._split(ids.repeat_interleave(2))
        return self._join(primary(first), secondary(second))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of [2T, ...] for the primary weights, and those for the secondary weights."""
        swapped = self._planner.swapped_rows
        if swapped is None:
            return rows[0::2], rows[1::2]
        if self._rows[0] is not swapped:
            is_second = torch.arange(len(rows), device=rows.device) % 2 == 1
            is_second[torch.from_numpy(swapped).to(rows.device)] ^= True
            self._rows = swapped, (~is_second).nonzero().squeeze(1), is_second.nonzero().squeeze(1)
        return rows[self._rows[1]], rows[self._rows[2]]

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """Undo `_split`."""
        if self._planner.swapped_rows is None:
            return interleave(first, second)
        rows = first.new_empty(len(first) + len(second), *first.shape[1:])
        rows[self._rows[1]], rows[self._rows[2]] = first, second
        return rows

    def _linear(self, primary: Any, secondary: Any) -> Callable[..., Tensor]:
        """Return the `apply` of a linear layer with two sets of weights."""
        apply = primary.quant_method.apply

        def apply_both(layer: nn.Module, rows: Tensor, bias: Tensor | None = None) -> Tensor:
            second_bias = secondary.bias if bias is not None else None
            first, second = self._split(rows.flatten(0, -2))  # vLLM's Transformers models pass a batch of one
            outputs = apply(layer, first, bias), secondary.quant_method.apply(secondary, second, second_bias)
            return self._join(*outputs).view(*rows.shape[:-1], -1)

        return apply_both

    def _norm(self, forward: Callable, secondary: Callable) -> Callable:
        """Return the forward of a norm with two sets of weights.

        It can add a residual first. vLLM's kernels need contiguous rows.
        """

        def norm(rows: Tensor, residual: Tensor | None = None):
            inputs = [tensor[0] if len(tensor) == 1 else tensor for tensor in (rows, residual) if tensor is not None]
            first, second = zip(*map(self._split, inputs), strict=True)
            first_output = forward(*(tensor.contiguous() for tensor in first))
            second_output = secondary(*(tensor.contiguous() for tensor in second))
            if residual is None:
                return self._join(first_output, second_output).view_as(rows)
            pairs = zip(first_output, second_output, strict=True)
            return tuple(self._join(*pair).view_as(rows) for pair in pairs)

        return norm

    def _head(self, primary: Any, secondary: Any) -> Callable[..., Tensor]:
        """Return the `apply` of the head.

        Rows [n, 2H] have zeros in the half that is not the recipient's stream.
        """
        apply = primary.quant_method.apply

        def head(layer: nn.Module, rows: Tensor, bias: Tensor | None = None) -> Tensor:
            first, second = (half.contiguous() for half in rows.chunk(2, dim=1))
            has_first, has_second = self._planner.recipient_streams
            if not has_second:
                return apply(layer, first, bias)
            second_bias = secondary.bias if bias is not None else None
            logits = secondary.quant_method.apply(secondary, second, second_bias)
            end = self._vocabulary - secondary.shard_indices.org_vocab_start_index
            if end < logits.shape[1]:
                logits[:, max(end, 0) :] = -torch.inf
            if not has_first:
                return logits
            is_second = second.any(dim=1, keepdim=True)
            return torch.where(is_second, logits, apply(layer, first, bias))

        return head

    def _resize_vocabulary(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Cut or pad vocabulary weights to the primary model's size; rows past the smaller one are no tokens."""
        size = self._config.model_config.get_vocab_size()
        for name, weight in weights:
            if name.endswith(VOCABULARY_WEIGHTS) and len(weight) != size:
                self._vocabulary = min(len(weight), size)
                padding = weight.new_zeros(max(0, size - len(weight)), *weight.shape[1:])
                weight = torch.cat([weight[:size], padding])
            yield name, weight


def used_dtype(vllm_config: VllmConfig) -> torch.dtype | None:
    """Return the dtype in which weights are used; None for quantized ones, which keep their own."""
    model = vllm_config.model_config
    return model.dtype if model.quantization is None else None


def check_free_memory(weight_bytes: int, vllm_config: VllmConfig) -> None:
    """Raise if secondary weights and the requested KV cache do not fit into the device's memory."""
    cache_bytes = vllm_config.cache_config.kv_cache_memory_bytes or 0
    free = free_bytes()
    missing_bytes = weight_bytes + cache_bytes - free
    if missing_bytes > 0:
        weights, cache, available, missing = (
            f"{n / 1e9:.2f} GB" for n in (weight_bytes, cache_bytes, free, missing_bytes)
        )
        raise SnpatchError(
            f"not enough memory for secondary weights: they need {weights}, the KV cache {cache} "
            f"(kv_cache_memory_bytes), and {available} are free, so {missing} are missing. Set kv_cache_memory_bytes "
            "lower, or use more devices (tensor_parallel_size)."
        )


def free_bytes() -> int:
    """Return the free memory of this worker's device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Return [2T, ...]: row 2t is row t of the first tensor, row 2t + 1 of the second."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


@contextmanager
def _weights_only_config(vllm_config: VllmConfig) -> Iterator[VllmConfig]:
    """Set a config under which a model is built with weights only: no attention, cache or compilation."""
    weights_only = copy.copy(vllm_config)
    weights_only.compilation_config = copy.copy(vllm_config.compilation_config)
    weights_only.compilation_config.static_forward_context = {}
    weights_only.compilation_config.mode = CompilationMode.NONE
    init = Attention.__init__
    Attention.__init__ = lambda self, *_, **__: nn.Module.__init__(self)
    try:
        with set_current_vllm_config(weights_only):
            yield weights_only
    finally:
        Attention.__init__ = init
