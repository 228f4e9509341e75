"""neuron2word: the tokens that a neuron's output direction speaks for, `lm_head(norm(W_down[:, n]))`."""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM

from snpatch.errors import SnpatchError
from snpatch.models.pretrained import load_pretrained
from snpatch.ranking.ranking import Ranking
from snpatch.report.report import Report, View
from snpatch.worlds.lab import Lab


@dataclass(frozen=True)
class Settings:
    """neurons: how many of the ranking's first. tokens: how many of each."""

    neurons: int = 10
    tokens: int = 20


def run(lab: Lab, settings: Settings) -> Report:
    """Project the first neurons of the safety ranking to the vocabulary."""
    ranking = lab.ranking()
    if settings.neurons < 1 or settings.tokens < 1:
        raise SnpatchError("words: neurons and tokens must be at least 1")
    model = load_pretrained(AutoModelForCausalLM, lab.world.place(lab.world.model))
    logits = neuron_logits(model, ranking, settings.neurons)
    best = logits.topk(min(settings.tokens, logits.shape[1]))
    rows = []
    for rank, (layer, neuron) in enumerate(ranking.top(settings.neurons).tolist()):
        for place, (value, token) in enumerate(
            zip(best.values[rank].tolist(), best.indices[rank].tolist(), strict=True)
        ):
            spelled = lab.engine.tokenizer.convert_ids_to_tokens(token)
            rows.append(
                {
                    "rank": rank,
                    "layer": layer,
                    "neuron": neuron,
                    "place": place,
                    "token_id": token,
                    "token": spelled,
                    "logit": value,
                }
            )
    lines = [
        {
            "rank": rank,
            "layer": layer,
            "neuron": neuron,
            "tokens": " ".join(str(row["token"]) for row in rows if row["rank"] == rank),
        }
        for rank, (layer, neuron) in enumerate(ranking.top(settings.neurons).tolist())
    ]
    plots = {"words": _plot(rows, lines)}
    first = lines[0]
    sentence = f"layer {first['layer']}, neuron {first['neuron']} ranks first; it speaks for: {first['tokens']}."
    return Report("words", {"words": rows}, plots, View.of(lines, {name: name for name in first}), [sentence])


@torch.inference_mode()
def neuron_logits(model, ranking: Ranking, n: int) -> Tensor:
    """[n, vocabulary] float32: the model's own final norm and output layer on each neuron's column of `down_proj`."""
    layers = model.model.layers
    columns = [layers[layer].mlp.down_proj.weight[:, neuron] for layer, neuron in ranking.top(n).tolist()]
    return model.lm_head(model.model.norm(torch.stack(columns))).float()


def _plot(rows: list[dict], lines: list[dict]) -> Figure:
    width = len(rows) // len(lines)
    values = torch.tensor([row["logit"] for row in rows]).view(len(lines), width)
    figure = Figure(figsize=(1.1 * width + 2, 0.5 * len(lines) + 1.5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axis, label="logit")
    middle = (values.min() + values.max()) / 2
    for i, row in enumerate(rows):
        x, y = i % width, i // width
        colour = "black" if values[y, x] > middle else "white"
        text = str(row["token"]).replace("$", r"\$")
        axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks([])
    axis.set_yticks(range(len(lines)), [f"layer {line['layer']}, neuron {line['neuron']}" for line in lines])
    axis.set_xlabel("tokens that the neuron speaks for, the strongest first")
    return figure
