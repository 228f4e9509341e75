"""Surgery that lets one transformers model run every token twice: as the recipient and as the donor.

A batch of B sequences has B*S rows, S streams each: row S*b is sequence b's recipient, row S*b + 1 its donor. Both
go through one model with their own KV cache; only the MLP's op, the IA3 scales of k_proj and v_proj and the final
projection know that rows come in streams. With secondary weights, so does each module whose weights differ.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from snpatch.errors import SnpatchError
from snpatch.models.compatibility import have_equal_weights
from snpatch.op import ops
from snpatch.op.layer_tables import LayerTables
from snpatch.op.plan import PlanColumn, ReceiptColumn

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


@dataclass(eq=False)
class ForwardState:
    """Inputs of the current forward pass that every layer reads."""

    weights: tuple[int, ...] = (0,)  # weights that each stream runs: 0 = primary, 1 = secondary
    length: int = 1  # positions per row in this pass
    plan: Tensor = field(default_factory=lambda: torch.empty(0, len(PlanColumn), dtype=torch.int32))
    capture: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    receipt: Tensor = field(default_factory=lambda: torch.empty(0, len(ReceiptColumn), dtype=torch.int64))
    layers: list[LayerTables] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)  # modules whose primary and secondary weights differ

    @property
    def streams(self) -> int:
        """Return the number of rows per sequence: 1, or 2 if a donor runs with the recipient."""
        return len(self.weights)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Reshape [B*S, length, X] to [B*length*S, X].

        A token's streams become adjacent, as the op needs them.
        """
        split = rows.view(-1, self.streams, self.length, rows.shape[-1])
        return split.transpose(1, 2).reshape(-1, rows.shape[-1])

    def to_rows(self, tokens: Tensor) -> Tensor:
        """Invert `to_tokens`."""
        split = tokens.view(-1, self.length, self.streams, tokens.shape[-1])
        return split.transpose(1, 2).reshape(-1, self.length, tokens.shape[-1])


class PatchedMLP(nn.Module):
    """A gated MLP whose activation is the op: one projection for gate and up, the op, the model's own down_proj."""

    def __init__(self, mlp: nn.Module, layer: int, state: ForwardState) -> None:
        super().__init__()
        activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        kind = type(activation).__name__
        if kind not in _ACTIVATIONS:
            raise SnpatchError(f"activation {kind} is not supported, only {', '.join(sorted(_ACTIVATIONS))}")
        self.activation, self.layer, self.state = _ACTIVATIONS[kind], layer, state
        fused = getattr(mlp, "gate_up_proj", None)
        if fused is None:
            fused = _fuse(_linear(mlp, "gate_proj"), _linear(mlp, "up_proj"))
        self.gate_up_proj = fused
        self.down_proj = _linear(mlp, "down_proj")

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the MLP on rows [B*S, length, H].

        Its neurons are patched, observed and captured by the state's plan.
        """
        state, tables = self.state, self.state.layers[self.layer]
        neurons = ops.patched_glu(
            state.to_tokens(self.gate_up_proj(hidden)),
            tables.scale,
            tables.rank,
            tables.constant,
            state.plan,
            tables.stats,
            tables.count,
            state.capture,
            state.receipt,
            activation=self.activation,
            streams=state.streams,
            layer=self.layer,
        )
        return self.down_proj(state.to_rows(neurons))


class TwoWeightModule(nn.Module):
    """A primary module and its secondary counterpart: each stream's rows go through its own weights."""

    def __init__(self, primary: nn.Module, secondary: nn.Module, state: ForwardState) -> None:
        super().__init__()
        self.versions, self.state = nn.ModuleList([primary, secondary]), state

    def forward(self, rows: Tensor) -> Tensor:
        """Apply to each row of [B*S, ...] the weights of its stream; the outputs are in the order of the rows."""
        weights = self.state.weights
        if len(set(weights)) == 1:
            return self.versions[weights[0]](rows)
        outputs = [self.versions[index](rows[stream :: len(weights)]) for stream, index in enumerate(weights)]
        return torch.stack(outputs, dim=1).flatten(0, 1)


class TwoWeightHead(TwoWeightModule):
    """The final projection, which receives the recipients' rows only."""

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the weights of the recipients' stream to all rows [B, ...]."""
        return self.versions[self.state.weights[0]](rows)


def install_streams(model: nn.Module, secondary: nn.Module | None = None) -> ForwardState:
    """Modify a causal language model in place to run both streams.

    Args:
        model: Runs both streams from now on.
        secondary: The same architecture with other weights, if there are secondary weights.

    Returns:
        The state that controls the model's next forward pass.
    """
    state = ForwardState()
    for network in (model, secondary) if secondary is not None else (model,):
        for index, layer in enumerate(_layers(network)):
            layer.mlp = PatchedMLP(layer.get_submodule("mlp"), index, state)
    if secondary is not None:
        _install_secondary(model, secondary, state)
    for index, layer in enumerate(_layers(model)):
        for name in ("k_proj", "v_proj"):
            if hasattr(layer.self_attn, name):
                getattr(layer.self_attn, name).register_forward_hook(_make_scale_hook(state, index, name))
    model.get_submodule("lm_head").register_forward_pre_hook(lambda _, inputs: (inputs[0][:: state.streams],))
    return state


def _install_secondary(model: nn.Module, secondary: nn.Module, state: ForwardState) -> None:
    """Replace each module whose weights differ by a TwoWeightModule; equal weights are stored once."""
    counterparts = dict(secondary.named_modules())
    for name, module in list(model.named_modules()):
        has_weights = next(module.parameters(recurse=False), None) is not None
        if not has_weights or have_equal_weights(module, counterparts[name]):
            continue
        parent, _, child = name.rpartition(".")
        kind = TwoWeightHead if module is model.lm_head else TwoWeightModule
        setattr(model.get_submodule(parent), child, kind(module, counterparts[name], state))
        state.duplicated.append(name)


def _layers(model: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule("model.layers"))


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, getattr(mlp, name))


def _fuse(gate: nn.Linear, up: nn.Linear) -> nn.Linear:
    """Merge both into one Linear [2F, H].

    The op's input is then one tensor, and the separate weights are freed.
    """
    fused = nn.Linear(
        gate.in_features,
        2 * gate.out_features,
        bias=gate.bias is not None,
        device="meta",
    )
    fused.weight = nn.Parameter(torch.cat([gate.weight, up.weight]), requires_grad=False)
    if gate.bias is not None:
        fused.bias = nn.Parameter(torch.cat([gate.bias, up.bias]), requires_grad=False)
    return fused


def _make_scale_hook(state: ForwardState, layer: int, name: str):
    """Return a forward hook that multiplies each row's output by its own adapter's IA3 vector."""

    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
        scale = state.layers[layer].attention_scale.get(name)
        if scale is None:
            return None
        adapter = state.plan[:, PlanColumn.ADAPTER_0 : PlanColumn.ADAPTER_0 + state.streams]
        factor = scale[state.to_rows(adapter.reshape(-1, 1)).squeeze(-1).long()]
        return (output * factor).to(output.dtype)

    return hook
