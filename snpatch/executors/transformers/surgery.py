"""Surgery that lets one transformers model run every token twice: as the recipient and as the donor.

A batch of B sequences has B*S rows, S streams each: row S*b is sequence b's recipient, row S*b + 1 its donor. Both
go through one model with their own KV cache; only the MLP's op, the IA3 scales of k_proj and v_proj and the final
projection know that rows come in streams. With a second set of weights, so does each module that has weights.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snpatch.errors import SnpatchError
from snpatch.models.compatibility import have_equal_weights
from snpatch.op import ops
from snpatch.op.layer_tables import LayerTables
from snpatch.op.plan import PlanColumn, Receipt

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


@dataclass(eq=False)
class Step:
    """What every layer reads in the forward pass under way."""

    sets: tuple[int, ...] = (0,)  # whose weights each stream runs: the first model's or the second's
    length: int = 1  # positions of each row in this pass
    plan: Tensor = field(default_factory=lambda: torch.empty(0, len(PlanColumn), dtype=torch.int32))
    capture: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    receipt: Tensor = field(default_factory=lambda: torch.empty(0, len(Receipt), dtype=torch.int64))
    banks: list[LayerTables] = field(default_factory=list)
    paired: list[str] = field(default_factory=list)  # modules that differ between the two sets of weights

    @property
    def streams(self) -> int:
        return len(self.sets)

    def tokens_first(self, rows: Tensor) -> Tensor:
        """[B*S, length, X] -> [B*length*S, X]: the streams of a token become neighbours."""
        split = rows.view(-1, self.streams, self.length, rows.shape[-1])
        return split.transpose(1, 2).reshape(-1, rows.shape[-1])

    def rows_first(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens_first`."""
        split = tokens.view(-1, self.length, self.streams, tokens.shape[-1])
        return split.transpose(1, 2).reshape(-1, self.length, tokens.shape[-1])


class PatchedMLP(nn.Module):
    """A gated MLP whose activation is the op: one projection to gate and up, the op, the model's own down_proj."""

    def __init__(self, mlp: nn.Module, layer: int, step: Step) -> None:
        super().__init__()
        activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        kind = type(activation).__name__
        if kind not in _ACTIVATIONS:
            raise SnpatchError(f"activation {kind} is not supported, only {', '.join(sorted(_ACTIVATIONS))}")
        self.activation, self.layer, self.step = _ACTIVATIONS[kind], layer, step
        fused = getattr(mlp, "gate_up_proj", None)
        self.gate_up_proj = fused if fused is not None else _fuse(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        step, bank = self.step, self.step.banks[self.layer]
        neurons = ops.patched_glu(
            step.tokens_first(self.gate_up_proj(hidden)),
            bank.scale,
            bank.rank,
            bank.constant,
            step.plan,
            bank.stats,
            bank.count,
            step.capture,
            step.receipt,
            activation=self.activation,
            streams=step.streams,
            layer=self.layer,
        )
        return self.down_proj(step.rows_first(neurons))


class PairedModule(nn.Module):
    """A module of the first model and its like of the second: each stream's rows go through its own set's."""

    def __init__(self, first: nn.Module, second: nn.Module, step: Step) -> None:
        super().__init__()
        self.of, self.step = nn.ModuleList([first, second]), step

    def forward(self, rows: Tensor) -> Tensor:
        sets = self.step.sets
        if len(set(sets)) == 1:
            return self.of[sets[0]](rows)
        parts = [self.of[place](rows[stream :: len(sets)]) for stream, place in enumerate(sets)]
        return torch.stack(parts, dim=1).flatten(0, 1)


class PairedHead(PairedModule):
    """The final projection, which is given the recipients' rows alone."""

    def forward(self, rows: Tensor) -> Tensor:
        return self.of[self.step.sets[0]](rows)


def make_twin(model: nn.Module, second: nn.Module | None = None) -> Step:
    """Operate on a causal language model in place; returns the Step that steers it. second: another set of weights."""
    step = Step()
    for one in (model, second) if second is not None else (model,):
        for index, layer in enumerate(one.model.layers):
            layer.mlp = PatchedMLP(layer.mlp, index, step)
    if second is not None:
        _pair(model, second, step)
    for index, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            if hasattr(layer.self_attn, name):
                getattr(layer.self_attn, name).register_forward_hook(_scale_rows(step, index, name))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:: step.streams],))
    return step


def _pair(model: nn.Module, second: nn.Module, step: Step) -> None:
    """Put a PairedModule where the two models' weights differ; what is equal is held once."""
    others = dict(second.named_modules())
    for name, own in list(model.named_modules()):
        if next(own.parameters(recurse=False), None) is None or have_equal_weights(own, others[name]):
            continue
        parent, _, child = name.rpartition(".")
        kind = PairedHead if own is model.lm_head else PairedModule
        setattr(model.get_submodule(parent), child, kind(own, others[name], step))
        step.paired.append(name)


def _fuse(gate: nn.Linear, up: nn.Linear) -> nn.Linear:
    """One Linear [2F, H] for both, which frees theirs: one weight read and the op's input in one tensor."""
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


def _scale_rows(step: Step, layer: int, name: str):
    """A forward hook: each row's output times its own adapter's IA3 vector."""

    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
        scale = step.banks[layer].attention_scale.get(name)
        if scale is None:
            return None
        adapter = step.plan[:, PlanColumn.ADAPTER_0 : PlanColumn.ADAPTER_0 + step.streams]
        factor = scale[step.rows_first(adapter.reshape(-1, 1)).squeeze(-1).long()]
        return (output * factor).to(output.dtype)

    return hook
