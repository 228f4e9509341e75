"""One layer's tensors for the op, as every executor stores them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class LayerTables:
    """Tensors of one layer that the op reads and adds to; shapes as in `reference.patched_glu`."""

    scale: Tensor
    rank: Tensor
    constant: Tensor
    stats: Tensor
    count: Tensor
    attention_scale: dict[str, Tensor]  # "k_proj", "v_proj" -> [A, width] float32, if an adapter scales it
