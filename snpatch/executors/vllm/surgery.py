"""One of vLLM's own models, made to run every token twice: as the recipient and as the donor.

Rows come in pairs, so [2T, heads * size] and [T, 2 * heads * size] are the same numbers in the same order: to the
attention layer the donor is simply more heads, under the request's own block table. Nothing else of vLLM changes.

    embedding    gives each token's row twice
    attention    its block gets each position twice; the layer itself is built with twice the heads
    activation   becomes the op
    forward      returns the recipients' rows

Why a module gets another class instead of a wrapper around it: its weights keep their names.
"""

from collections.abc import Iterator
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

from snpatch import ops
from snpatch.errors import SnpatchError
from snpatch.executors.vllm import processes
from snpatch.executors.vllm.banks import Banks
from snpatch.executors.vllm.feed import Feed
from snpatch.executors.vllm.plugin import PREFIX
from snpatch.executors.vllm.settings import TwinSettings, refuse
from snpatch.plan import Column

# Opaque to torch.compile: what a layer adds to and reads is looked up by its name, as vLLM's attention finds its cache.
_LIBRARY = torch.library.Library("snpatch", "FRAGMENT")
_LIBRARY.define("twin_glu(Tensor gate_up, str layer) -> Tensor")
_LIBRARY.define("twin_scale_kv(Tensor qkv, str layer) -> Tensor")
_LIBRARY.define("twin_tokens(Tensor ids, str layer) -> Tensor")


def _layer(name: str) -> nn.Module:
    return get_forward_context().no_compile_layers[name]


_LIBRARY.impl("twin_glu", lambda gate_up, layer: _layer(layer).run(gate_up), "CompositeExplicitAutograd")
_LIBRARY.impl("twin_scale_kv", lambda qkv, layer: _layer(layer).scale_kv(qkv), "CompositeExplicitAutograd")
_LIBRARY.impl("twin_tokens", lambda ids, layer: _layer(layer).take_tokens(ids), "CompositeExplicitAutograd")
torch.library.register_fake(
    "snpatch::twin_glu", lambda gate_up, layer: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), lib=_LIBRARY
)
for _name in ("twin_scale_kv", "twin_tokens"):
    torch.library.register_fake(f"snpatch::{_name}", lambda rows, layer: torch.empty_like(rows), lib=_LIBRARY)


class TwinGLU(nn.Module):
    """The op where the gated activation stood. `banks` is set once the model is whole."""

    def __init__(self, activation: str, layer: int, name: str, settings: TwinSettings, context: dict) -> None:
        super().__init__()
        self.activation, self.layer, self.name, self.streams = activation, layer, name, settings.streams
        self.banks: Banks | None = None
        self.first_neuron = 0
        context[name] = self

    def forward(self, gate_up: Tensor) -> Tensor:
        return torch.ops.snpatch.twin_glu(gate_up, self.name)

    def run(self, gate_up: Tensor) -> Tensor:
        bank = self.banks.layers[self.layer]
        return ops.patched_glu(
            gate_up,
            bank.scale,
            bank.rank,
            bank.constant,
            self.banks.plan[: len(gate_up) // self.streams],
            bank.stats,
            bank.count,
            self.banks.capture,
            self.banks.receipt,
            activation=self.activation,
            streams=self.streams,
            layer=self.layer,
            first_neuron=self.first_neuron,
        )

    def take_tokens(self, ids: Tensor) -> Tensor:
        """The step's tokens, before anything else of it is computed."""
        self.banks.settle_groups(ids)
        return ids.clone()  # what is computed from it comes after it, in a compiled graph, too

    def scale_kv(self, qkv: Tensor) -> Tensor:
        """Keys and values [2T, 2 * width] at the end of each row, times their row's IA3 vectors."""
        factor = self.banks.layers[self.layer].attention_scale["kv"]
        plan = self.banks.plan[: len(qkv) // self.streams, Column.RECIPIENT : Column.RECIPIENT + self.streams]
        query = qkv.shape[1] - factor.shape[1]
        scaled = (qkv[:, query:] * factor[plan.reshape(-1).long()]).to(qkv.dtype)
        return torch.cat([qkv[:, :query], scaled], dim=1)


class TwinModelConfig(ModelConfig):
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

    twin = type(f"Twin{own.__name__}", (own,), {"forward": twin_forward})
    module.__class__ = twin


def _twice(rows: Tensor) -> Tensor:
    return rows.repeat_interleave(2, dim=0)


def _attend_block(block, positions, *args, **kwargs):
    return block(_twice(positions), *args, **kwargs)


def _attend(attend, query, key, value, *args, **kwargs):
    rows = query.shape[0]
    tokens = (tensor.reshape(rows // 2, -1) for tensor in (query, key, value))
    return attend(*tokens, *args, **kwargs).view(rows, -1)


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


class Twin:
    """What surgery leaves on a model: its settings, the layers that run the op, their banks, and the feed."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, attention: list[Attention]) -> None:
        config = vllm_config.model_config.hf_text_config
        self.settings = settings = TwinSettings.of(vllm_config)
        self.n_layers, self.attention = config.num_hidden_layers, attention
        context = vllm_config.compilation_config.static_forward_context
        gated = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SiluAndMul | GeluAndMul)]
        self.glus = [self._replace(model, name, layer, settings, context) for layer, name in enumerate(gated)]
        embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        embeddings = [m for m in embeddings if not isinstance(m, ParallelLMHead)]
        blocks = [m for m in model.modules() if any(isinstance(child, Attention) for child in m.children())]
        qkv = [m for m in model.modules() if isinstance(m, QKVParallelLinear)]
        found = {"activation": len(self.glus)}
        if settings.streams == 2:
            found |= {"attention": len(attention), "attention block": len(blocks)}
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
        if any(layer.kv_sharing_target_layer_name is not None for layer in attention):
            raise SnpatchError("twin surgery: layers that share their keys and values cannot be patched")
        if settings.streams == 2:
            first = self.glus[0].name

            def embed(forward, ids, *args, **kwargs):
                return _twice(forward(torch.ops.snpatch.twin_tokens(ids, first), *args, **kwargs))

            _reclass(embeddings[0], embed)
            for block in blocks:
                _reclass(block, _attend_block)
            for layer in attention:
                _reclass(layer, _attend)
            vllm_config.model_config.__class__ = TwinModelConfig
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
            glu.banks, glu.first_neuron = self.banks, self.first_neuron
        self.feed = Feed(self.banks)

    def _replace(self, model, name: str, layer: int, settings: TwinSettings, context: dict) -> TwinGLU:
        module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        if isinstance(module, GeluAndMul) and module.approximate != "tanh":
            raise SnpatchError("activation gelu without the tanh approximation is not supported")
        glu = TwinGLU("gelu_tanh" if isinstance(module, GeluAndMul) else "silu", layer, name, settings, context)
        setattr(model.get_submodule(parent), child, glu)
        return glu

    def _scale_kv(self, qkv: list[QKVParallelLinear], rank: int) -> tuple[int, int]:
        """Scale what the projections give; returns (first, width) of this worker's keys within all of them."""
        for projection, glu in zip(qkv, self.glus, strict=True):

            def project(forward, *args, name: str = glu.name, **kwargs):
                out, bias = forward(*args, **kwargs)
                return torch.ops.snpatch.twin_scale_kv(out, name), bias

            _reclass(projection, project)
        width = qkv[0].num_kv_heads * qkv[0].head_size
        return rank // qkv[0].num_kv_head_replicas * width, width


def twin_of(base: type[nn.Module]) -> type[nn.Module]:
    """The twin of one of vLLM's model classes."""

    class TwinModel(base):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            from snpatch.executors.vllm import runners

            refuse(vllm_config)
            processes.watch()
            runners.hook_v1()
            if TwinSettings.of(vllm_config).streams == 2:
                with _twice_the_heads() as attention:
                    super().__init__(vllm_config=vllm_config, prefix=prefix)
            else:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                attention = [m for m in self.modules() if isinstance(m, Attention)]
            self.snpatch = Twin(self, vllm_config, attention)

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[:: self.snpatch.settings.streams]

        @classmethod
        def get_model_state_cls(cls):
            from snpatch.executors.vllm import runners

            return runners.twin_model_state()

    TwinModel.__name__ = TwinModel.__qualname__ = PREFIX + base.__name__
    TwinModel.__module__ = __name__
    return TwinModel


def __getattr__(name: str) -> type[nn.Module]:
    """Twin classes by name, made when vLLM asks for them."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX))
    if base is None:
        raise SnpatchError(f"vLLM has no model of the architecture {name.removeprefix(PREFIX)}")
    twin = twin_of(base)
    globals()[name] = twin
    return twin
