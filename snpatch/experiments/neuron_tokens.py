"""Neuron tokens (the paper's neuron2word): the tokens that a neuron promotes, `lm_head(norm(W_down[:, n]))`.

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
        tokens: Tokens per neuron.
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
    top = logits.topk(min(settings.tokens, logits.shape[1]))
    neurons = ranking.top(settings.neurons).tolist()
    rows = []
    for rank, (layer, neuron) in enumerate(neurons):
        pairs = zip(top.values[rank].tolist(), top.indices[rank].tolist(), strict=True)
        for place, (logit, token_id) in enumerate(pairs):
            rows.append(
                {
                    "rank": rank,
                    "layer": layer,
                    "neuron": neuron,
                    "place": place,
                    "token_id": token_id,
                    "token": context.engine.tokenizer.convert_ids_to_tokens(token_id),
                    "logit": logit,
                }
            )
    lines = [
        {
            "rank": rank,
            "layer": layer,
            "neuron": neuron,
            "tokens": " ".join(str(row["token"]) for row in rows if row["rank"] == rank),
        }
        for rank, (layer, neuron) in enumerate(neurons)
    ]
    plots = {"neuron_tokens": _plot(rows, lines)}
    first = lines[0]
    sentence = f"layer {first['layer']}, neuron {first['neuron']} ranks first; it promotes: {first['tokens']}."
    display = TableView.from_rows(lines, {name: name for name in first})
    return Report("neuron_tokens", {"neuron_tokens": rows}, plots, (display,), [sentence])


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
    width = len(rows) // len(lines)
    values = np.array([row["logit"] for row in rows]).reshape(len(lines), width)
    figure = Figure(figsize=(1.1 * width + 2, 0.5 * len(lines) + 1.5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axis, label="logit")
    middle = (values.min() + values.max()) / 2
    for i, row in enumerate(rows):
        x, y = i % width, i // width
        color = "black" if values[y, x] > middle else "white"
        axis.text(x, y, to_plot_label(str(row["token"])), ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks([])
    axis.set_yticks(range(len(lines)), [f"layer {line['layer']}, neuron {line['neuron']}" for line in lines])
    axis.set_xlabel("tokens that the neuron promotes, highest logit first")
    return figure
