"""Neuron tokens (the paper's neuron2word): tokens that a neuron's change promotes and suppresses.

A neuron's output direction is `lm_head(norm(W_down[:, n]))`. The donor changes the neuron's activation by
mean d - mean r, so the direction has the sign of this change: a factor below 1 damps what the neuron writes.

Why weights are read from the checkpoint's files: the engine may hold them in other processes or packed, and a second
complete model would not fit in memory.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from snpatch.experiments.context import ExperimentContext
from snpatch.models.checkpoint import load_config
from snpatch.models.weights import CheckpointWeights, open_weights
from snpatch.ranking.ranking import Ranking
from snpatch.report.formatting import to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.utils import schema


@dataclass(frozen=True)
class NeuronTokensSettings:
    """Settings of neuron tokens.

    Args:
        neurons: Number of first neurons of the ranking.
        tokens: Promoted, and as many suppressed, tokens per neuron.
    """

    neurons: int = field(default=10, metadata={"min": 1})
    tokens: int = field(default=20, metadata={"min": 1})


def run(context: ExperimentContext, settings: NeuronTokensSettings) -> Report:
    """Project the first neurons of the safety ranking onto the vocabulary."""
    ranking = context.ranking()
    schema.validate(settings, "neuron_tokens: ")
    context.model("base")
    config = context.engine.config
    logits = neuron_logits(config.model, ranking, settings.neurons, config.allow_untested)
    changes = mean_changes(ranking, settings.neurons)
    if changes is not None:
        logits = torch.where(changes < 0, -1, 1)[:, None] * logits
    n = min(settings.tokens, logits.shape[1])
    rows, lines = [], []
    for rank, (layer, neuron) in enumerate(ranking.top(settings.neurons).tolist()):
        head = {
            "rank": rank,
            "layer": layer,
            "neuron": neuron,
            "mean_change": None if changes is None else changes[rank].item(),
        }
        line = dict(head)
        for effect, largest in (("promoted", True), ("suppressed", False)):
            values, token_ids = (part.tolist() for part in logits[rank].topk(n, largest=largest))
            tokens = context.engine.tokenizer.convert_ids_to_tokens(token_ids)
            line[effect] = " ".join(map(str, tokens))
            for place, (token_id, token, logit) in enumerate(zip(token_ids, tokens, values, strict=True)):
                row = {"effect": effect, "place": place, "token_id": token_id, "token": token, "logit": logit}
                rows.append({**head, **row})
        lines.append(line)
    plots = {"neuron_tokens": _plot(rows, lines)}
    display = TableView.from_rows(lines, {name: name for name in lines[0]})
    return Report("neuron_tokens", {"neuron_tokens": rows}, plots, (display,), _build_headline(lines, changes))


def mean_changes(ranking: Ranking, n: int) -> Tensor | None:
    """Return mean d - mean r of the first n neurons, [n] float32; None for a ranking without both means."""
    if not {"donor_mean", "recipient_mean"} <= ranking.moments.keys():
        return None
    changes = ranking.moments["donor_mean"] - ranking.moments["recipient_mean"]
    return changes[tuple(ranking.top(n).T)]


def _build_headline(lines: list[dict], changes: Tensor | None) -> list[str]:
    first = lines[0]
    name = f"layer {first['layer']}, neuron {first['neuron']} ranks first"
    if changes is None:
        cause = "its own output (the ranking has no mean activations of both models)"
    else:
        cause = f"its mean change of {first['mean_change']:+.3g} from recipient to donor"
    return [
        f"{name}; {cause} promotes: {first['promoted']}.",
        f"{name}; {cause} suppresses: {first['suppressed']}.",
    ]


def neuron_logits(model: str | Path, ranking: Ranking, n: int, allow_untested: bool = False) -> Tensor:
    """Apply the model's final norm and output layer to the `down_proj` columns of the first n neurons.

    Computed in the dtype that the model's config names, as the model would; without one, in the checkpoint's.

    Returns:
        [n, vocabulary] float32.
    """
    config, weights = load_config(model, allow_untested), open_weights(model)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    tensors = _read_columns(weights, ranking.top(n)), weights.read("model.norm.weight"), weights.read(head)
    columns, norm, output = (tensor.to(config.dtype) if config.dtype else tensor for tensor in tensors)
    return functional.linear(_norm(columns, norm, config), output).float()


def _read_columns(weights: CheckpointWeights, neurons: Tensor) -> Tensor:
    """Read the output directions [n, hidden] of neurons [n, 2] (layer, neuron), one layer at a time."""
    directions: dict[int, Tensor] = {}
    for layer in neurons[:, 0].unique().tolist():
        rows = torch.nonzero(neurons[:, 0] == layer).flatten().tolist()
        columns = weights.columns(f"model.layers.{layer}.mlp.down_proj.weight", neurons[rows, 1].tolist())
        directions |= dict(zip(rows, columns.T, strict=True))
    return torch.stack([directions[row] for row in range(len(neurons))])


def _norm(x: Tensor, weight: Tensor, config) -> Tensor:
    """Apply RMSNorm with the architecture's rounding.

    Gemma scales by 1 + weight; Gemma and OLMo scale in float32.
    """
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + config.rms_norm_eps)
    if config.model_type.startswith("gemma"):
        return (normed * (1 + weight.float())).to(x.dtype)
    if config.model_type.startswith("olmo"):
        return (normed * weight.float()).to(x.dtype)
    return weight * normed.to(x.dtype)


def _plot(rows: list[dict], lines: list[dict]) -> Figure:
    width = len(rows) // len(lines) // 2
    figure = Figure(figsize=(2.2 * width + 2, 0.5 * len(lines) + 1.5), layout="constrained")
    for axis, effect in zip(figure.subplots(1, 2), ("promoted", "suppressed"), strict=True):
        tokens = [row for row in rows if row["effect"] == effect]
        values = np.array([row["logit"] for row in tokens]).reshape(len(lines), width)
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis, label="logit")
        middle = (values.min() + values.max()) / 2
        for i, row in enumerate(tokens):
            x, y = i % width, i // width
            color = "black" if values[y, x] > middle else "white"
            axis.text(x, y, to_plot_label(str(row["token"])), ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks([])
        axis.set_yticks(range(len(lines)), [f"layer {line['layer']}, neuron {line['neuron']}" for line in lines])
        axis.set_xlabel(f"{effect} tokens, strongest first")
    return figure
