"""The oracle: two plain transformers models with hooks, independent of the product and slow on purpose.

One prompt at a time, no padding, no KV cache, eager attention, float32; statistics in float64 over stored values. A
neuron is an input of `down_proj` after the IA3 scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

WORD = 2**32


@cache
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Compute Philox-4x32-10. Source: Salmon et al. 2011; test vectors are in tests/op/test_patched_glu.py."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b // WORD) ^ c1 ^ k0, b % WORD, (a // WORD) ^ c3 ^ k1, a % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def normal(seed: int, position: int, layer: int, neuron: int) -> float:
    """Return the noise of one neuron at one position: Box-Muller on the top 24 bits of two Philox words."""
    first, second, _, _ = philox((neuron, layer, position, 0), (seed, 0))
    return math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24)) * math.cos(2 * math.pi * (second >> 8) / 2**24)


def read_ia3(folders: list[Path]) -> dict[tuple[int, str], Tensor]:
    """Return (layer, module's last name) -> product of the folders' vectors."""
    vectors: dict[tuple[int, str], Tensor] = {}
    for folder in folders:
        for key, vector in load_file(Path(folder) / "adapter_model.safetensors").items():
            parts = key.split(".")
            module = int(parts[parts.index("layers") + 1]), parts[-2]
            vectors[module] = vectors.get(module, 1.0) * vector.reshape(-1)
    return vectors


class Model:
    """One model: a folder's weights with adapters applied by hooks."""

    def __init__(self, folder: Path, adapters: tuple[Path, ...] = ()) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        self.model.eval()
        self.layers = self.model.model.layers
        self.n_neurons = self.model.config.intermediate_size
        self.layer_values: list[Tensor] = []  # per layer [T, F], before the overwrite
        self._overwrite: Callable[[int, Tensor], Tensor] | None = None
        vectors = read_ia3(list(adapters))
        for index, layer in enumerate(self.layers):
            vector = vectors.pop((index, "down_proj"), torch.ones(self.n_neurons))
            layer.mlp.down_proj.register_forward_pre_hook(self._neuron_hook(index, vector))
            for name in ("k_proj", "v_proj"):
                if (index, name) in vectors:
                    vector = vectors.pop((index, name))
                    getattr(layer.self_attn, name).register_forward_hook(lambda _m, _i, out, v=vector: out * v)
        assert not vectors, f"vectors without a module: {list(vectors)}"

    def _neuron_hook(self, index: int, vector: Tensor):
        def hook(_module, inputs):
            value = inputs[0] * vector
            self.layer_values.append(value[0].clone())
            return (value if self._overwrite is None else self._overwrite(index, value[0])[None],)

        return hook

    @torch.inference_mode()
    def forward(self, ids: list[int], overwrite: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Return logits [T, V]; `layer_values` then has the activations."""
        self.layer_values, self._overwrite = [], overwrite
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def activations(self, ids: list[int]) -> Tensor:
        """Return the activations [T, L, F] of an unpatched run."""
        self.forward(ids)
        return torch.stack(self.layer_values, dim=1)


@lru_cache(maxsize=12)
def model(folder: Path, adapters: tuple[Path, ...] = ()) -> Model:
    return Model(folder, adapters)


@dataclass
class Patch:
    """One intervention, and the ones in `further`.

    mask: [L, F] bool, neurons to overwrite at positions [start, stop) with keep * own value + take * source. The source
    is the donor model's value, `constant` [L, F], or `deviation` [L, F] times the noise of `seed`.
    """

    mask: Tensor
    donor: Model | None = None
    constant: Tensor | None = None
    deviation: Tensor | None = None
    seed: int = 0
    start: int = 0
    stop: int = 10**9
    keep: float = 0.0
    take: float = 1.0
    further: "tuple[Patch, ...]" = ()

    def forward(self, recipient: Model, ids: list[int]) -> Tensor:
        """Return the patched recipient's logits [T, V]."""
        overwrites = [patch._overwrite(ids) for patch in (self, *self.further)]

        def overwrite(layer: int, value: Tensor) -> Tensor:
            for apply in overwrites:
                value = apply(layer, value)
            return value

        return recipient.forward(ids, overwrite)

    def _overwrite(self, ids: list[int]) -> Callable[[int, Tensor], Tensor]:
        positions = range(self.start, min(self.stop, len(ids)))
        if self.donor is not None:
            self.donor.forward(ids)
            donor_values = self.donor.layer_values

        def overwrite(layer: int, value: Tensor) -> Tensor:
            value = value.clone()
            for position in positions:
                recipient_value, mask = value[position].clone(), self.mask[layer]
                if self.deviation is not None:
                    source_value = torch.zeros_like(recipient_value)
                    for neuron in mask.nonzero().flatten().tolist():
                        source_value[neuron] = self.deviation[layer, neuron].item() * normal(
                            self.seed, position, layer, neuron
                        )
                else:
                    source_value = self.constant[layer] if self.donor is None else donor_values[layer][position]
                value[position, mask] = self.keep * recipient_value[mask] + self.take * source_value[mask]
            return value

        return overwrite


@dataclass
class Generation:
    """A greedy completion. gap: the smallest difference between the largest and the second largest logit."""

    ids: list[int]
    logprobs: list[float]
    gap: float
    logits: Tensor  # [n, V]


def generate(
    recipient: Model,
    prompt: list[int],
    n: int,
    patch: Patch | None = None,
    eos: int | None = None,
    min_tokens: int = 0,
) -> Generation:
    """Generate greedily; every step runs the whole sequence again. A final EOS is kept."""
    ids, rows = list(prompt), []
    for step in range(n):
        logits = (patch.forward(recipient, ids) if patch else recipient.forward(ids))[-1]
        rows.append(logits)
        allowed = logits.clone()
        if eos is not None and step < min_tokens:
            allowed[eos] = -math.inf
        ids.append(int(allowed.argmax()))
        if ids[-1] == eos:
            break
    logits, completion_ids = torch.stack(rows), ids[len(prompt) :]
    top = logits.topk(2).values
    logprobs = logits.log_softmax(-1)[range(len(completion_ids)), completion_ids].tolist()
    return Generation(completion_ids, logprobs, (top[:, 0] - top[:, 1]).min().item(), logits)


def logprobs(recipient: Model, ids: list[int], patch: Patch | None = None) -> Tensor:
    """Return the log-probability of each token but the first, [T-1]."""
    logits = patch.forward(recipient, ids) if patch else recipient.forward(ids)
    return logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def contrast(recipient: Model, donor: Model, texts: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Return change scores, means and unbiased standard deviations [L, F] float64 over (ids, scored positions)."""
    r, d = (
        torch.cat([model.activations(ids)[positions] for ids, positions in texts]).double()
        for model in (recipient, donor)
    )
    return {
        "scores": (r - d).square().mean(0).sqrt(),
        "recipient_mean": r.mean(0),
        "recipient_std": r.std(0),
        "donor_mean": d.mean(0),
        "donor_std": d.std(0),
        "tokens": torch.tensor(len(r)),
    }


def scored_positions(positions: str, num_prompt: int, num_completion: int) -> list[int]:
    """Return the positions that `positions` names of a sequence; the completion has no EOS."""
    return {
        "completion": list(range(num_prompt, num_prompt + num_completion)),
        "completion_shifted": list(range(num_prompt - 1, num_prompt - 1 + num_completion)),
        "prompt": list(range(num_prompt)),
        "last_prompt_token": [num_prompt - 1],
    }[positions]


def build_mask(order: list[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
    """Return a mask [L, F] bool of the neurons (layer, neuron) in `order`."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for layer, neuron in order:
        mask[layer, neuron] = True
    return mask
