"""Geometry: sizes of a model as executors, requests and adapters need them, from its config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from snpatch.errors import SnpatchError


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model.

    Attributes:
        n_layers: Number of layers.
        n_neurons: Neurons per layer.
        context: Maximum number of tokens of a text.
        vocab_size: Rows of the embedding.
        widths: Module that IA3 can scale -> width of its vector.
        dtype: Dtype of the activations, such as "bfloat16".
    """

    n_layers: int
    n_neurons: int
    context: int
    vocab_size: int
    widths: dict[str, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """Return (layers, neurons per layer)."""
        return self.n_layers, self.n_neurons

    @property
    def max_activation(self) -> float:
        """Return the largest activation that fits the dtype and whose square fits float32, as a norm needs."""
        return min(torch.finfo(getattr(torch, self.dtype)).max, torch.finfo(torch.float32).max ** 0.5)

    def limit(self, vocab_size: int, context: int | None = None) -> "Geometry":
        """Return the sizes that this model and another one support.

        Args:
            vocab_size: The other model's vocabulary.
            context: The other model's context; None keeps this one's.
        """
        context = self.context if context is None else min(self.context, context)
        return replace(self, vocab_size=min(self.vocab_size, vocab_size), context=context)


def build_geometry(
    config, dtype: str, max_model_len: int | None = None, widths: Mapping[str, int] | None = None
) -> Geometry:
    """Return the sizes of a model.

    Args:
        config: The model's transformers config.
        dtype: Dtype of the activations; "auto": the checkpoint's.
        max_model_len: Maximum number of tokens of a text; None: the model's context.
        widths: Width of each module that IA3 can scale; None: derived from the config.

    Raises:
        SnpatchError: `max_model_len` exceeds the model's context.
    """
    context = config.max_position_embeddings if max_model_len is None else max_model_len
    if not 1 <= context <= config.max_position_embeddings:
        raise SnpatchError(f"max_model_len: expected 1 to {config.max_position_embeddings}, got {context}")
    return Geometry(
        config.num_hidden_layers,
        config.intermediate_size,
        context,
        config.vocab_size,
        dict(_derive_widths(config) if widths is None else widths),
        resolve_dtype(config, dtype),
    )


def resolve_dtype(config, dtype: str) -> str:
    """Return the dtype of a model's activations; for "auto" the checkpoint's."""
    return str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype


def _derive_widths(config) -> dict[str, int]:
    widths = {"down_proj": config.intermediate_size}
    if config.model_type != "phi3":  # its queries, keys and values are one projection
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * head)
    return widths
