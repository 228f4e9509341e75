"""Surgery on a vLLM model: every token is run twice, as the recipient and as the donor.

Rows come in pairs, so [2T, heads * size] and [T, 2 * heads * size] are the same numbers in the same order: to the
attention layer the donor is additional heads, under the request's own block table. Nothing else in vLLM changes.

    forward      gets each position twice, and returns the recipients' rows (with secondary weights: both rows
                 concatenated, with zeros for the donor's)
    embedding    returns each token's row twice
    attention    is built with twice the heads
    activation   is replaced by the op

Why a module gets another class and no wrapper: its parameters keep their names.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

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
from snpatch.executors.vllm.engine_settings import DualStreamSettings, check_supported
from snpatch.executors.vllm.worker.op_tables import OpTables
from snpatch.executors.vllm.worker.plugin import PREFIX
from snpatch.executors.vllm.worker.request_tracker import RequestTracker
from snpatch.executors.vllm.worker.secondary_weights import SECONDARY, SecondaryWeights, used_dtype
from snpatch.executors.vllm.worker.step_planner import StepPlanner
from snpatch.models.checkpoint import iter_finite
from snpatch.models.compatibility import total_bytes
from snpatch.op import ops, reference
from snpatch.op.plan import PlanColumn

# Opaque to torch.compile: an op finds its layer by name, as vLLM's attention finds its cache. The name has vLLM's type
# for it, because a plain str would be a constant of each layer's graph, and each layer would be compiled on its own.
_LIBRARY = torch.library.Library("snpatch", "FRAGMENT")


def _layer(name: LayerNameType) -> "DualStreamGLU":
    return get_forward_context().no_compile_layers[_resolve_layer_name(name)]


def _dual_stream_glu(gate_up: Tensor, layer: LayerNameType) -> Tensor:
    return _layer(layer).run(gate_up)


def _dual_stream_scale_kv(qkv: Tensor, layer: LayerNameType) -> Tensor:
    return _layer(layer).scale_kv(qkv)


def _fake_same_shape(rows: Tensor, layer: LayerNameType) -> Tensor:
    return torch.empty_like(rows)


def _fake_half_width(gate_up: Tensor, layer: LayerNameType) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


for _op, _fake in ((_dual_stream_glu, _fake_half_width), (_dual_stream_scale_kv, _fake_same_shape)):
    _name = _op.__name__.removeprefix("_")
    _LIBRARY.define(_name + torch.library.infer_schema(_op, mutates_args=()))
    _LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snpatch::{_name}", _fake, lib=_LIBRARY)


class DualStreamGLU(nn.Module):
    """The op in place of a gated activation; `set_tables` completes it after the model is built."""

    def __init__(self, activation: str, layer: int, name: str, settings: DualStreamSettings, context: dict) -> None:
        super().__init__()
        self.activation, self.layer, self.name, self.streams = activation, layer, name, settings.streams
        context[name] = self

    def set_tables(self, tables: OpTables, first_neuron: int) -> None:
        """Set the op's tensors.

        first_neuron: index in the whole layer of the first neuron in this worker's shard.
        """
        layer = tables.layers[self.layer]
        self.tables = tables
        self.inputs = layer.scale, layer.rank, layer.constant
        self.outputs = layer.stats, layer.count, tables.capture, tables.receipt
        self.attributes: dict[str, Any] = {
            "activation": self.activation,
            "streams": self.streams,
            "layer": self.layer,
            "first_neuron": first_neuron,
        }

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return patched activations [..., F] for gate and up [..., 2F]; torch.compile sees one opaque op."""
        rows = gate_up.flatten(0, -2)
        if torch.compiler.is_compiling():
            out = torch.ops.snpatch.dual_stream_glu(rows, _encode_layer_name(self.name))
        else:
            out = self.run(rows)
        return out.view(*gate_up.shape[:-1], -1)

    def run(self, gate_up: Tensor) -> Tensor:
        """Apply the step's plan to the gate and up values [S*T, 2F] of T tokens in S streams; return [S*T, F]."""
        plan = self.tables.step_plan(gate_up.shape[0] // self.streams)
        return ops.patched_glu(gate_up, *self.inputs, plan, *self.outputs, **self.attributes)

    def scale_kv(self, qkv: Tensor) -> Tensor:
        """Scale the keys and values [2T, 2 * width] at the end of each row by the row's IA3 vectors."""
        vectors = self.tables.layers[self.layer].attention_scale["kv"]
        adapters = self.tables.step_plan(len(qkv) // self.streams)[
            :, PlanColumn.ADAPTER_0 : PlanColumn.ADAPTER_0 + self.streams
        ]
        query = qkv.shape[1] - vectors.shape[1]
        scaled = (qkv[:, query:] * vectors[adapters.reshape(-1).long()]).to(qkv.dtype)
        return torch.cat([qkv[:, :query], scaled], dim=1)


class DualStreamModelConfig(ModelConfig):
    """Model config with the doubled head counts, for backends that plan attention by them."""

    def get_num_attention_heads(self, *args, **kwargs) -> int:
        """Return twice vLLM's number of query heads per worker, because the donor's are additional heads."""
        return 2 * super().get_num_attention_heads(*args, **kwargs)

    def get_num_kv_heads(self, *args, **kwargs) -> int:
        """Return twice vLLM's number of key-value heads per worker, because the cache holds the donor's, too."""
        return 2 * super().get_num_kv_heads(*args, **kwargs)


def _override_forward(module: nn.Module, forward) -> None:
    """Give a module a subclass of its own class whose forward is `forward(super_forward, *args)`."""
    base = type(module)

    def dual_stream_forward(self, *args, **kwargs):
        # The class is made below, so that its type is not known.
        return forward(super(subclass, self).forward, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    subclass = type(f"DualStream{base.__name__}", (base,), {"forward": dual_stream_forward})
    module.__class__ = subclass


def _attend(layer: Attention):
    """Return a forward of an attention layer on dual-stream rows.

    It gets rows [2T, width] and reads them as tokens [T, 2 * width]. Values are a part of the projection's rows, so
    they are copied, into the shape that attention views them as: otherwise Inductor copies them twice. Queries and keys
    are compiled outputs of the rotary embedding, and are views. Without any copy the cache would have to be written by
    rows: its slots viewed as [2 * slots, kv_heads, size], with row r of a token in slot 2 * s + r, and a separate cache
    update for each backend.
    """
    kv_heads = layer.num_kv_heads // 2

    def attend(forward, query, key, value, *args, **kwargs):
        rows = query.shape[0]
        query, key = (tensor.reshape(rows // 2, -1) for tensor in (query, key))
        value = value.view(rows // 2, 2, kv_heads, -1).reshape(rows // 2, 2 * kv_heads, -1)
        return forward(query, key, value, *args, **kwargs).view(rows, -1)

    return attend


@contextmanager
def _double_heads() -> Iterator[list[Attention]]:
    """Build attention layers in this block with twice the heads, and append them to the list."""
    layers, init = [], Attention.__init__

    def dual_stream_init(self, num_heads, head_size, scale, num_kv_heads=None, *args, **kwargs):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        init(self, 2 * num_heads, head_size, scale, 2 * kv_heads, *args, **kwargs)
        layers.append(self)

    Attention.__init__ = dual_stream_init
    try:
        yield layers
    finally:
        Attention.__init__ = init


class DualStream:
    """Additions of the surgery to a model, at its attribute `snpatch`.

    settings: the engine's settings. glus: layers that run the op. tables: their tensors. tracker, planner: requests and
    plans of the steps. secondary: the secondary weights, None without them. has_checked_weights: load_weights has
    looked for NaN. primary_bytes: memory of the model's own parameters.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, attention: list[Attention]) -> None:
        config = vllm_config.model_config.hf_text_config
        self.settings = settings = DualStreamSettings.from_vllm_config(vllm_config)
        self.has_checked_weights = False
        self.dtype = used_dtype(vllm_config)
        self.secondary: SecondaryWeights | None = None
        self.primary_bytes = total_bytes(model.parameters())
        self.n_layers, self.attention, self.name = config.num_hidden_layers, attention, vllm_config.model_config.model
        self.glus = self._replace_activations(model, vllm_config)
        qkv = [module for module in model.modules() if isinstance(module, QKVParallelLinear)]
        self._check_counts(qkv)
        if settings.streams == 2:
            self._double_streams(model, vllm_config)
        num_shards, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if config.intermediate_size % num_shards:
            raise SnpatchError(
                f"tensor_parallel_size: expected a divisor of the {config.intermediate_size} neurons of a layer, got "
                f"{num_shards}"
            )
        self.n_neurons = config.intermediate_size // num_shards
        self.first_neuron = rank * self.n_neurons
        kv = self._scale_kv(qkv, rank) if settings.scales_kv else None
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        max_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
        self.tables = OpTables(
            settings, self.n_layers, self.first_neuron, self.n_neurons, kv, max_tokens, torch.empty(0).device
        )
        for glu in self.glus:
            glu.set_tables(self.tables, self.first_neuron)
        self._warm_up(vllm_config.model_config.dtype)
        self.tracker = RequestTracker(self.tables)
        self.planner = StepPlanner(self.tracker)

    def _replace_activations(self, model: nn.Module, vllm_config: VllmConfig) -> list[DualStreamGLU]:
        """Replace each gated activation by the op, and register it for `_layer`."""
        context = vllm_config.compilation_config.static_forward_context
        modules = model.named_modules(remove_duplicate=False)
        names = [name for name, module in modules if isinstance(module, SiluAndMul | GeluAndMul)]
        glus = []
        for layer, name in enumerate(names):
            module, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
            if isinstance(module, GeluAndMul) and module.approximate != "tanh":
                raise SnpatchError("activation gelu without the tanh approximation is not supported")
            activation = "gelu_tanh" if isinstance(module, GeluAndMul) else "silu"
            glu = DualStreamGLU(activation, layer, name, self.settings, context)
            setattr(model.get_submodule(parent), child, glu)
            glus.append(glu)
        return glus

    def _check_counts(self, qkv: list[QKVParallelLinear]) -> None:
        """Raise unless each layer has one module of each replaced kind."""
        counts = {"activation": len(self.glus)}
        if self.settings.streams == 2:
            counts["attention"] = len(self.attention)
        if self.settings.scales_kv:
            counts["qkv projection"] = len(qkv)
        for kind, n in counts.items():
            if n != self.n_layers:
                raise SnpatchError(
                    f"dual-stream surgery: expected {self.n_layers} {kind} modules, one per layer, got {n}. "
                    "Architectures with a mixture of experts or shared layers cannot be patched."
                )

    def _double_streams(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """Make the embedding return, and attention read, two rows per token."""
        if any(layer.kv_sharing_target_layer_name is not None for layer in self.attention):
            raise SnpatchError(
                "dual-stream surgery: layers that share their keys and values cannot run two streams; streams=1 "
                "patches them with constants"
            )
        embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        embeddings = [module for module in embeddings if not isinstance(module, ParallelLMHead)]
        if len(embeddings) != 1:
            raise SnpatchError(f"dual-stream surgery: expected 1 input embedding, got {len(embeddings)}")
        embedding = embeddings[0]

        def embed(forward, input_ids):
            ids = input_ids.flatten()
            secondary = getattr(embedding, SECONDARY, None)
            if secondary is None:
                rows = forward(ids).repeat_interleave(2, dim=0)
            else:
                rows = self.secondary.embed(ids, forward, secondary)  # pyright: ignore[reportOptionalMemberAccess]
            return rows if input_ids.dim() == 1 else rows[None]  # vLLM's Transformers models expect a batch of one

        _override_forward(embedding, embed)
        for layer in self.attention:
            _override_forward(layer, _attend(layer))
        vllm_config.model_config.__class__ = DualStreamModelConfig

    def count_logits(self, logits: Tensor | None) -> None:
        """Count rows of a step's logits [n, V] that overflowed in the receipts of their requests."""
        slots = self.planner.take_sampled()
        if slots is None or logits is None:  # logits of prompts or a dummy run; a worker that does not sample
            return
        if len(logits) != len(slots):
            raise SnpatchError(f"logits: expected one row for each of {len(slots)} requests, got {len(logits)}")
        reference.count_nonfinite(self.tables.receipt, slots, reference.has_overflowed(logits), self.n_layers)

    def _warm_up(self, dtype: torch.dtype) -> None:
        """Run the op once without a patch, because its kernel must not be compiled during a graph capture."""
        row = torch.zeros(self.settings.streams, 2 * self.n_neurons, dtype=dtype, device=self.tables.device)
        for glu in {glu.activation: glu for glu in self.glus}.values():
            glu.run(row)

    def _scale_kv(self, qkv: list[QKVParallelLinear], rank: int) -> tuple[int, int]:
        """Scale the outputs of the projections; return (first, width) of this worker's keys within all keys."""
        for projection, glu in zip(qkv, self.glus, strict=True):

            def project(forward, *args, name: str = glu.name, **kwargs):
                result = forward(*args, **kwargs)
                out, *bias = result if isinstance(result, tuple) else (result,)
                rows = out.flatten(0, -2)
                scaled = torch.ops.snpatch.dual_stream_scale_kv(rows, _encode_layer_name(name)).view_as(out)
                return (scaled, *bias) if isinstance(result, tuple) else scaled

            _override_forward(projection, project)
        width = qkv[0].num_kv_heads * qkv[0].head_size
        return rank // qkv[0].num_kv_head_replicas * width, width


def dual_stream_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the dual-stream subclass of one of vLLM's model classes."""

    class DualStreamModel(cast(Any, base)):
        @processes.report_errors()
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            from snpatch.executors.vllm.worker import runners

            check_supported(vllm_config)
            processes.exit_with_parent()
            runners.hook_v1()
            if DualStreamSettings.from_vllm_config(vllm_config).streams == 2:
                with _double_heads() as attention:
                    super().__init__(vllm_config=vllm_config, prefix=prefix)
            else:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                attention = [m for m in self.modules() if isinstance(m, Attention)]
            if (versions.minor() or max(versions.KNOWN)) < (0, 28):
                zeroing.widen_windows(attention)
            self.snpatch = added = DualStream(self, vllm_config, attention)
            if added.settings.has_secondary:
                secondary = SecondaryWeights(base, vllm_config, prefix, added.planner, added.primary_bytes)
                added.secondary = secondary
                if vllm_config.load_config.load_format == "dummy":  # vLLM fills existing parameters, and loads nothing
                    secondary.attach(self, is_shared=lambda primary, secondary: False)

        @processes.report_errors()
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            # Checked while loading: afterwards they are packed for the device, and some are emptied.
            added = self.snpatch
            added.has_checked_weights = True
            loaded = super().load_weights(iter_finite(weights, added.name, used=added.dtype))
            return loaded if added.secondary is None else loaded | added.secondary.load(self)

        def forward(self, input_ids, positions, *args, **kwargs):
            if self.snpatch.settings.streams == 1:
                return super().forward(input_ids, positions, *args, **kwargs)
            tables = self.snpatch.tables
            rows = super().forward(input_ids, tables.repeat_positions(positions), *args, **kwargs)
            if self.snpatch.secondary is None:
                return rows[::2]
            mask = tables.recipient_mask(positions.shape[0])
            return torch.where(mask[..., None], rows.view(*mask.shape, -1), 0).flatten(1)

        def compute_logits(self, hidden_states, *args, **kwargs):
            secondary = self.snpatch.secondary
            if secondary is not None and not secondary.has_head:
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
    """Build the dual-stream class of a name when vLLM imports it."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX))
    if base is None:
        raise SnpatchError(f"vLLM has no model for the architecture {name.removeprefix(PREFIX)}")
    subclass = dual_stream_class(base)
    globals()[name] = subclass
    return subclass
