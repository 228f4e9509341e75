"""A second set of weights in a twin: each module that has weights applies the first to stream 0, the second to 1.
Where both models of a request are on one set, the donor's rows go through that one instead; only an engine that
compiles nothing can tell such rows apart.

The second set is loaded into vLLM's own model class, by vLLM's own loader, without attention and outside of the
engine's books; then each of its modules is hung into its like of the first. What is equal in both is held once. Rows
stay as they are, so that attention, op, scheduler and plan know nothing of it.

Why a linear layer's `quant_method.apply` is replaced and not its forward: what follows in there, as the sum over
tensor-parallel workers, is then done once for both.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

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
from snpatch.executors.vllm.settings import KEY, DualStreamSettings
from snpatch.executors.vllm.worker.feed import Feed
from snpatch.models.checkpoint import iter_finite
from snpatch.models.compatibility import have_equal_weights, total_bytes
from snpatch.models.lora import merge_loras

SECOND = "second"  # the name under which a module holds its like of the second set
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


class SecondaryWeights:
    """The second set of weights of one worker, from its making to its place in the model.

    feed: tells which streams speak in the step under way, and which rows go through the other stream's set.
    """

    def __init__(self, base: type[nn.Module], vllm_config: VllmConfig, prefix: str, feed: Feed, own_bytes: int) -> None:
        self._config, self._settings, self._feed = vllm_config, DualStreamSettings.from_vllm_config(vllm_config), feed
        self.name = self._settings.secondary_checkpoint or vllm_config.model_config.model
        self.bytes, self.paired, self.has_head = 0, [], False
        self._rows: tuple | None = None  # what they were split for, and the rows of each set
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        check_room(own_bytes, vllm_config)
        with _apart(vllm_config) as apart:
            self._holder = base(vllm_config=apart, prefix=prefix)

    def load(self, model: nn.Module) -> set[str]:
        """Load the weights and join them to a model whose own are loaded; the names under which it has them now."""
        config = copy.copy(self._config.model_config)
        if self._settings.secondary_checkpoint is not None:
            config.model, config.revision = self._settings.secondary_checkpoint, None
        loader = get_model_loader(self._config.load_config)
        if not hasattr(loader, "get_all_weights"):
            raise SnpatchError(
                f"load_format {self._config.load_config.load_format} cannot load a second set of weights"
            )
        weights = self._fitted(merge_loras(loader.get_all_weights(config, self._holder), self._settings.secondary_lora))
        self._holder.load_weights(iter_finite(weights, self.name, used=used_dtype(self._config)))
        return self.join(model)

    def join(self, model: nn.Module, is_shared: Callable[[nn.Module, nn.Module], bool] | None = None) -> set[str]:
        """Hang each module of the second set that differs from the model's own into it."""
        is_shared, others, names = is_shared or have_equal_weights, dict(self._holder.named_modules()), set()
        for name, own in list(model.named_modules()):
            parameters = dict(own.named_parameters(recurse=False))
            if not parameters or is_shared(own, others[name]):
                continue
            other = others[name]
            self._pair(name, own, other)
            own.add_module(SECOND, other)
            self.paired.append(name)
            self.bytes += total_bytes(other.parameters(recurse=False))
            names |= {f"{name}.{SECOND}.{parameter}" for parameter in parameters}
        self._holder = None
        # Which modules are paired shapes the graphs that vLLM compiles and keeps: its key has to know.
        self._config.additional_config[f"{KEY}_paired"] = self.paired
        return names

    def _pair(self, name: str, own: nn.Module, other: nn.Module) -> None:
        if isinstance(own, LinearBase):
            if own.skip_bias_add and own.bias is not None:
                raise SnpatchError(f"{name}: a bias that is added later cannot be paired")
            own.quant_method.apply = self._product(own, other)
        elif isinstance(own, VocabParallelEmbedding):
            own.quant_method.apply = self._by_speaker(own, other)  # of the head; the input's is the surgery's
            self.has_head |= (
                isinstance(own, ParallelLMHead) or self._config.model_config.hf_text_config.tie_word_embeddings
            )
        elif isinstance(own, RMSNorm | GemmaRMSNorm):
            own.forward = self._norm(own.forward, other)
        else:
            raise SnpatchError(f"{name}: a {type(own).__name__} cannot have a second set of weights")

    def embed(self, ids: Tensor, own: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Tensor:
        """[2 * T, H]: each row's embedding of its token, by its own set."""
        first, second = self._split(ids.repeat_interleave(2))
        return self._joined(own(first), other(second))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [2 * T, ...] of the first set, and those of the second."""
        if self._feed.flipped is None:
            return rows[0::2], rows[1::2]
        if self._rows is None or self._rows[0] is not self._feed.flipped:
            is_second = torch.arange(len(rows), device=rows.device) % 2 == 1
            is_second[torch.from_numpy(self._feed.flipped).to(rows.device)] ^= True
            self._rows = self._feed.flipped, (~is_second).nonzero().squeeze(1), is_second.nonzero().squeeze(1)
        return rows[self._rows[1]], rows[self._rows[2]]

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        """The rows in their order again."""
        if self._feed.flipped is None:
            return interleaved(first, second)
        rows = first.new_empty(len(first) + len(second), *first.shape[1:])
        rows[self._rows[1]], rows[self._rows[2]] = first, second
        return rows

    def _product(self, own: nn.Module, other: nn.Module) -> Callable[..., Tensor]:
        """A linear layer's: each row with its own set."""
        apply = own.quant_method.apply

        def product(layer: nn.Module, rows: Tensor, bias: Tensor | None = None) -> Tensor:
            theirs = other.bias if bias is not None else None
            first, second = self._split(rows.flatten(0, -2))  # vLLM's Transformers models give a batch of one
            both = self._joined(apply(layer, first, bias), other.quant_method.apply(other, second, theirs))
            return both.view(*rows.shape[:-1], -1)

        return product

    def _norm(self, forward: Callable, other: nn.Module) -> Callable:
        """A norm, perhaps with the residual that it adds first; vLLM's kernels want rows side by side."""

        def norm(rows: Tensor, residual: Tensor | None = None):
            given = [tensor[0] if len(tensor) == 1 else tensor for tensor in (rows, residual) if tensor is not None]
            first, second = zip(*map(self._split, given), strict=True)
            mine, theirs = forward(*(t.contiguous() for t in first)), other(*(t.contiguous() for t in second))
            if residual is None:
                return self._joined(mine, theirs).view_as(rows)
            return tuple(self._joined(*both).view_as(rows) for both in zip(mine, theirs, strict=True))

        return norm

    def _by_speaker(self, own: nn.Module, other: nn.Module) -> Callable[..., Tensor]:
        """The head: rows [n, 2 * H] whose silent half is zero, through the speaker's own."""
        apply = own.quant_method.apply

        def head(layer: nn.Module, rows: Tensor, bias: Tensor | None = None) -> Tensor:
            first, second = (half.contiguous() for half in rows.chunk(2, dim=1))
            if not self._feed.speaks[1]:
                return apply(layer, first, bias)
            logits = other.quant_method.apply(other, second, other.bias if bias is not None else None)
            past = self._vocabulary - other.shard_indices.org_vocab_start_index
            if past < logits.shape[1]:
                logits[:, max(past, 0) :] = -torch.inf
            if not self._feed.speaks[0]:
                return logits
            is_second = second.any(dim=1, keepdim=True)
            return torch.where(is_second, logits, apply(layer, first, bias))

        return head

    def _fitted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The vocabulary's padding made as long as the first set's: what lies past the shorter one is no token."""
        size = self._config.model_config.get_vocab_size()
        for name, weight in weights:
            if name.endswith(VOCABULARY) and len(weight) != size:
                self._vocabulary = min(len(weight), size)
                padding = weight.new_zeros(max(0, size - len(weight)), *weight.shape[1:])
                weight = torch.cat([weight[:size], padding])
            yield name, weight


def used_dtype(vllm_config: VllmConfig) -> torch.dtype | None:
    """Return the dtype in which weights are used; None for quantized ones, which keep their own."""
    model = vllm_config.model_config
    return model.dtype if model.quantization is None else None


def check_room(needed: int, vllm_config: VllmConfig) -> None:
    """An error where a second set of so many bytes, and the cache that was asked for, do not fit the memory."""
    cache = vllm_config.cache_config.kv_cache_memory_bytes or 0
    free = free_bytes()
    if needed + cache > free:
        second, kv, room, missing = (f"{n / 1e9:.2f} GB" for n in (needed, cache, free, needed + cache - free))
        raise SnpatchError(
            f"no room for a second set of weights: it needs {second}, the KV cache {kv} (kv_cache_memory_bytes), and "
            f"{room} are free, so that {missing} are missing: set kv_cache_memory_bytes lower, or spread the engine by "
            "tensor_parallel_size"
        )


def free_bytes() -> int:
    """What is free on this worker's device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """[2 * T, ...]: row 2t is row t of the first, row 2t + 1 of the second."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


@contextmanager
def _apart(vllm_config: VllmConfig) -> Iterator[VllmConfig]:
    """A config under which a model is made that has weights and nothing else: no attention, cache or compilation."""
    apart = copy.copy(vllm_config)
    apart.compilation_config = copy.copy(vllm_config.compilation_config)
    apart.compilation_config.static_forward_context = {}
    apart.compilation_config.mode = CompilationMode.NONE
    init = Attention.__init__
    Attention.__init__ = lambda self, *_, **__: nn.Module.__init__(self)
    try:
        with set_current_vllm_config(apart):
            yield apart
    finally:
        Attention.__init__ = init
