"""One of vLLM's own models, made to run every token twice: as the recipient and as the donor.

Rows come in pairs, so [2T, heads * size] and [T, 2 * heads * size] are the same numbers in the same order: to the
attention layer the donor is simply more heads, under the request's own block table. Nothing else of vLLM changes.

    forward      gets each position twice, and returns the recipients' rows (with a second set of weights: both
                 rows side by side, and zeros for the one that is silent)
    embedding    gives each token's row twice
    attention    is built with twice the heads
    activation   becomes the op

Why a module gets another class instead of a wrapper around it: its weights keep their names.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import processes, versions, zeroing
from snpatch.executors.vllm.settings import DualStreamSettings, check_supported
from snpatch.executors.vllm.worker.banks import Banks
from snpatch.executors.vllm.worker.feed import Feed
from snpatch.executors.vllm.worker.plugin import PREFIX
from snpatch.executors.vllm.worker.secondary_weights import SECOND, SecondaryWeights, used_dtype
from snpatch.models.checkpoint import iter_finite
from snpatch.models.compatibility import total_bytes
from snpatch.op import ops, reference
from snpatch.op.plan import PlanColumn

# Opaque to torch.compile: what a layer adds to and reads is looked up by its name, as vLLM's attention finds its cache.
# The name is of vLLM's type for it: a plain str would be a constant of each layer's graph, and each would be compiled.
_LIBRARY = torch.library.Library("snpatch", "FRAGMENT")


def _layer(name: LayerNameType) -> nn.Module:
    return get_forward_context().no_compile_layers[_resolve_layer_name(name)]


def _dual_stream_glu(gate_up: Tensor, layer: LayerNameType) -> Tensor:
    return _layer(layer).run(gate_up)


def _dual_stream_scale_kv(qkv: Tensor, layer: LayerNameType) -> Tensor:
    return _layer(layer).scale_kv(qkv)


def _like(rows: Tensor, layer: LayerNameType) -> Tensor:
    return torch.empty_like(rows)


def _half_as_wide(gate_up: Tensor, layer: LayerNameType) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


for _op, _fake in ((_dual_stream_glu, _half_as_wide), (_dual_stream_scale_kv, _like)):
    _name = _op.__name__.removeprefix("_")
    _LIBRARY.define(_name + torch.library.infer_schema(_op, mutates_args=()))
    _LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snpatch::{_name}", _fake, lib=_LIBRARY)


class DualStreamGLU(nn.Module):
    """The op where the gated activation stood. It is given its banks once the model is whole."""

    def __init__(self, activation: str, layer: int, name: str, settings: DualStreamSettings, context: dict) -> None:
        super().__init__()
        self.activation, self.layer, self.name, self.streams = activation, layer, name, settings.streams
        context[name] = self

    def join(self, banks: Banks, first_neuron: int) -> None:
        self.banks, bank = banks, banks.layers[self.layer]
        self.read = bank.scale, bank.rank, bank.constant
        self.written = bank.stats, bank.count, banks.capture, banks.receipt
        self.attributes = {
            "activation": self.activation,
            "streams": self.streams,
            "layer": self.layer,
            "first_neuron": first_neuron,
        }

    def forward(self, gate_up: Tensor) -> Tensor:
        rows = gate_up.flatten(0, -2)
        if torch.compiler.is_compiling():
            out = torch.ops.snpatch.dual_stream_glu(rows, _encode_layer_name(self.name))
        else:
            out = self.run(rows)
        return out.view(*gate_up.shape[:-1], -1)

    def run(self, gate_up: Tensor) -> Tensor:
        plan = self.banks.plan_of(gate_up.shape[0] // self.streams)
        return ops.patched_glu(gate_up, *self.read, plan, *self.written, **self.attributes)

    def scale_kv(self, qkv: Tensor) -> Tensor:
        """Keys and values [2T, 2 * width] at the end of each row, times their row's IA3 vectors."""
        factor = self.banks.layers[self.layer].attention_scale["kv"]
        plan = self.banks.plan_of(len(qkv) // self.streams)[
            :, PlanColumn.ADAPTER_0 : PlanColumn.ADAPTER_0 + self.streams
        ]
        query = qkv.shape[1] - factor.shape[1]
        scaled = (qkv[:, query:] * factor[plan.reshape(-1).long()]).to(qkv.dtype)
        return torch.cat([qkv[:, :query], scaled], dim=1)


class DualStreamModelConfig(ModelConfig):
    """A model config that tells the twin's head counts to those who plan attention by them."""

    def get_num_attention_heads(self, *args, **kwargs) -> int:
        return 2 * super().get_num_attention_heads(*args, **kwargs)

    def get_num_kv_heads(self, *args, **kwargs) -> int:
        return 2 * super().get_num_kv_heads(*args, **kwargs)


def _reclass(module: nn.Module, forward) -> None:
    """Give a module a subclass of its own class whose forward is `forward(super_forward, *args)`."""
    own = type(module)

    def twin_forward(self, *args, **kwargs):
        return forward(super(twin, self).forward, *args, **kwargs)

    twin = type(f"DualStream{own.__name__}", (own,), {"forward": twin_forward})
    module.__class__ = twin


def _attend(layer: Attention):
    """Return a forward of an attention layer that gets rows [2T, width] and reads them as tokens [T, 2 * width].

    Values are a part of the projection's rows, so they are copied; into the shape that attention views them as, or
    Inductor copies them twice. Queries and keys come out of the rotary embedding, compiled, and are views. No copy at
    all would take a cache that is written by rows: its slots seen as [2 * slots, kv_heads, size], with row r of a token
    in slot 2 * s + r, and an update of the cache of our own for each backend.
    """
    kv_heads = layer.num_kv_heads // 2

    def attend(forward, query, key, value, *args, **kwargs):
        rows = query.shape[0]
        query, key = (tensor.reshape(rows // 2, -1) for tensor in (query, key))
        value = value.view(rows // 2, 2, kv_heads, -1).reshape(rows // 2, 2 * kv_heads, -1)
        return forward(query, key, value, *args, **kwargs).view(rows, -1)

    return attend


@contextmanager
def _twice_the_heads() -> Iterator[list[Attention]]:
    """Attention layers made in this context have twice the heads; the list fills with them."""
    made, init = [], Attention.__init__

    def twin_init(self, num_heads, head_size, scale, num_kv_heads=None, *args, **kwargs):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        init(self, 2 * num_heads, head_size, scale, 2 * kv_heads, *args, **kwargs)
        made.append(self)

    Attention.__init__ = twin_init
    try:
        yield made
    finally:
        Attention.__init__ = init


class DualStream:
    """What surgery leaves on a model: its settings, the layers that run the op, their banks, and the feed."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, attention: list[Attention]) -> None:
        config = vllm_config.model_config.hf_text_config
        self.settings = settings = DualStreamSettings.from_vllm_config(vllm_config)
        self.has_seen_weights = False
        self.dtype = used_dtype(vllm_config)
        self.second: SecondaryWeights | None = None
        self.own_bytes = total_bytes(model.parameters())
        self.n_layers, self.attention, self.name = config.num_hidden_layers, attention, vllm_config.model_config.model
        context = vllm_config.compilation_config.static_forward_context
        gated = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SiluAndMul | GeluAndMul)]
        self.glus = [self._replace(model, name, layer, settings, context) for layer, name in enumerate(gated)]
        embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        embeddings = [m for m in embeddings if not isinstance(m, ParallelLMHead)]
        qkv = [m for m in model.modules() if isinstance(m, QKVParallelLinear)]
        found = {"activation": len(self.glus)}
        if settings.streams == 2:
            found["attention"] = len(attention)
            if len(embeddings) != 1:
                raise SnpatchError(f"twin surgery: wanted 1 input embedding, the model has {len(embeddings)}")
        if settings.scales_kv:
            found["qkv projection"] = len(qkv)
        for kind, n in found.items():
            if n != self.n_layers:
                raise SnpatchError(
                    f"twin surgery: wanted {self.n_layers} {kind} modules, one a layer, the model has {n}: "
                    "an architecture like this (mixture of experts, shared layers) cannot be patched"
                )
        if settings.streams == 2:
            if any(layer.kv_sharing_target_layer_name is not None for layer in attention):
                raise SnpatchError(
                    "twin surgery: layers that share their keys and values cannot run two streams; streams=1 patches "
                    "them with constants"
                )
            embedding = embeddings[0]

            def embed(forward, given):
                ids = given.flatten()
                second = getattr(embedding, SECOND, None)
                if second is None:
                    both = forward(ids).repeat_interleave(2, dim=0)
                else:
                    both = self.second.embed(ids, forward, second)
                return both if given.dim() == 1 else both[None]  # vLLM's Transformers models want a batch of one

            _reclass(embedding, embed)
            for layer in attention:
                _reclass(layer, _attend(layer))
            vllm_config.model_config.__class__ = DualStreamModelConfig
        shards, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if config.intermediate_size % shards:
            raise SnpatchError(f"{config.intermediate_size} neurons cannot be split over {shards} workers")
        self.n_neurons = config.intermediate_size // shards
        self.first_neuron = rank * self.n_neurons
        kv = self._scale_kv(qkv, rank) if settings.scales_kv else None
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        max_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
        self.banks = Banks(
            settings, self.n_layers, self.first_neuron, self.n_neurons, kv, max_tokens, torch.empty(0).device
        )
        for glu in self.glus:
            glu.join(self.banks, self.first_neuron)
        self._warm_up(vllm_config.model_config.dtype)
        self.feed = Feed(self.banks)

    def count_logits(self, logits: Tensor | None) -> None:
        """Add the rows of a step's logits [n, V] that overflowed to the receipts of their requests."""
        slots = self.feed.take_sampled()
        if slots is None or logits is None:  # of prompts or a dummy run; of a worker that does not sample
            return
        if len(logits) != len(slots):
            raise SnpatchError(f"logits: expected a row for each of {len(slots)} requests, got {len(logits)}")
        reference.count_nonfinite(self.banks.receipt, slots, reference.has_overflowed(logits), self.n_layers)

    def _warm_up(self, dtype: torch.dtype) -> None:
        """Run the op once on a row that asks for nothing: its kernel must not be met first in a graph capture."""
        row = torch.zeros(self.settings.streams, 2 * self.n_neurons, dtype=dtype, device=self.banks.device)
        for glu in {glu.activation: glu for glu in self.glus}.values():
            glu.run(row)

    def _replace(self, model, name: str, layer: int, settings: DualStreamSettings, context: dict) -> DualStreamGLU:
        module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        if isinstance(module, GeluAndMul) and module.approximate != "tanh":
            raise SnpatchError("activation gelu without the tanh approximation is not supported")
        glu = DualStreamGLU("gelu_tanh" if isinstance(module, GeluAndMul) else "silu", layer, name, settings, context)
        setattr(model.get_submodule(parent), child, glu)
        return glu

    def _scale_kv(self, qkv: list[QKVParallelLinear], rank: int) -> tuple[int, int]:
        """Scale what the projections give; returns (first, width) of this worker's keys within all of them."""
        for projection, glu in zip(qkv, self.glus, strict=True):

            def project(forward, *args, name: str = glu.name, **kwargs):
                given = forward(*args, **kwargs)
                out, *bias = given if isinstance(given, tuple) else (given,)
                rows = out.flatten(0, -2)
                scaled = torch.ops.snpatch.dual_stream_scale_kv(rows, _encode_layer_name(name)).view_as(out)
                return (scaled, *bias) if isinstance(given, tuple) else scaled

            _reclass(projection, project)
        width = qkv[0].num_kv_heads * qkv[0].head_size
        return rank // qkv[0].num_kv_head_replicas * width, width


def dual_stream_class(base: type[nn.Module]) -> type[nn.Module]:
    """The twin of one of vLLM's model classes."""

    class DualStreamModel(base):
        @processes.report_errors()
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            from snpatch.executors.vllm.worker import runners

            check_supported(vllm_config)
            processes.exit_with_parent()
            runners.hook_v1()
            if DualStreamSettings.from_vllm_config(vllm_config).streams == 2:
                with _twice_the_heads() as attention:
                    super().__init__(vllm_config=vllm_config, prefix=prefix)
            else:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                attention = [m for m in self.modules() if isinstance(m, Attention)]
            if (versions.minor() or max(versions.KNOWN)) < (0, 28):
                zeroing.widen_windows(attention)
            self.snpatch = twin = DualStream(self, vllm_config, attention)
            if twin.settings.has_secondary:
                twin.second = SecondaryWeights(base, vllm_config, prefix, twin.feed, twin.own_bytes)
                if vllm_config.load_config.load_format == "dummy":  # vLLM fills what it finds, and loads nothing
                    twin.second.join(self, is_shared=lambda one, other: False)

        @processes.report_errors()
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            # Looked at on their way: afterwards they are packed for the device, and some are emptied.
            twin = self.snpatch
            twin.has_seen_weights = True
            loaded = super().load_weights(iter_finite(weights, twin.name, used=twin.dtype))
            return loaded if twin.second is None else loaded | twin.second.load(self)

        def forward(self, input_ids, positions, *args, **kwargs):
            if self.snpatch.settings.streams == 1:
                return super().forward(input_ids, positions, *args, **kwargs)
            banks = self.snpatch.banks
            rows = super().forward(input_ids, banks.twice(positions), *args, **kwargs)
            if self.snpatch.second is None:
                return rows[::2]
            speaks = banks.speaks(positions.shape[0])
            return torch.where(speaks[..., None], rows.view(*speaks.shape, -1), 0).flatten(1)

        def compute_logits(self, hidden_states, *args, **kwargs):
            second = self.snpatch.second
            if second is not None and not second.has_head:
                hidden_states = sum(hidden_states.chunk(2, dim=1))  # one half is zero
            logits = super().compute_logits(hidden_states, *args, **kwargs)
            self.snpatch.count_logits(logits)
            return logits

        @classmethod
        def get_model_state_cls(cls):
            from snpatch.executors.vllm.worker import runners

            return runners.dual_stream_model_state()

    DualStreamModel.__name__ = DualStreamModel.__qualname__ = PREFIX + base.__name__
    DualStreamModel.__module__ = __name__
    return DualStreamModel


def __getattr__(name: str) -> type[nn.Module]:
    """DualStream classes by name, made when vLLM asks for them."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX))
    if base is None:
        raise SnpatchError(f"vLLM has no model of the architecture {name.removeprefix(PREFIX)}")
    twin = dual_stream_class(base)
    globals()[name] = twin
    return twin
