"""Tensors that the op reads and updates, allocated once per worker.

Why their addresses never change: captured CUDA graphs contain them, so new adapters, rankings and constants are copied
into rows. A worker of a tensor-parallel group holds the neurons of its own shard.
"""

import torch
from torch import Tensor

from snpatch.executors.vllm.engine_settings import DualStreamSettings
from snpatch.op.layer_tables import LayerTables
from snpatch.op.plan import SKIP_EOS_OFFSET, UNRANKED, PlanColumn, ReceiptColumn, plan_width
from snpatch.op.reference import SUMS


class OpTables:
    """Tensors of one worker.

    first_neuron, n_neurons: the worker's shard of each layer. kv: (first, width) of its shard of keys and values; None
    if adapters do not scale them. max_tokens: maximum tokens of a step, including padding.
    """

    def __init__(
        self,
        settings: DualStreamSettings,
        n_layers: int,
        first_neuron: int,
        n_neurons: int,
        kv: tuple[int, int] | None,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self._neurons = slice(first_neuron, first_neuron + n_neurons)
        self._kv = None if kv is None else slice(kv[0], kv[0] + kv[1])
        i32, f32, f64, i64 = (
            {"dtype": dtype, "device": device} for dtype in (torch.int32, torch.float32, torch.float64, torch.int64)
        )
        self.layers = [
            LayerTables(
                scale=torch.ones(settings.max_adapters, n_neurons, **f32),
                rank=torch.full((settings.max_rankings, n_neurons), UNRANKED, **i32),
                constant=torch.zeros(settings.max_constants + 1, n_neurons, **f32),
                stats=torch.zeros(settings.max_groups, SUMS, n_neurons, **f64),
                count=torch.zeros(settings.max_groups, **i64),
                attention_scale={} if kv is None else {"kv": torch.ones(settings.max_adapters, 2 * kv[1], **f32)},
            )
            for _ in range(n_layers)
        ]
        self.capture = torch.full((settings.max_captures, settings.max_captured), torch.nan, **f32)
        self.receipt = torch.zeros(settings.max_receipts, len(ReceiptColumn), **i64)
        self.sampled = torch.full((max_tokens,), -1, **i32)  # row of `receipt` for each row of a step's logits
        self.plan = torch.zeros(max_tokens, plan_width(settings.max_interventions), **i32)
        self.plan[:, PlanColumn.GROUP : len(PlanColumn)] = -1
        self._step_plan = self.plan[:0]
        self._streams = torch.arange(2, **i32)
        self._positions = torch.zeros(max_tokens, 2, **i64)
        width = max(map(len, settings.eos_ids))
        padded = [[*ids, *[-1] * (width - len(ids))] for ids in settings.eos_ids]
        self._eos_ids = torch.tensor(padded, dtype=torch.int64, device=device)  # [sets of weights, width]

    def step_plan(self, n_tokens: int) -> Tensor:
        """Return the first n_tokens rows of the plan, as one view that all layers of a step share."""
        if self._step_plan.shape[0] != n_tokens:
            self._step_plan = self.plan[:n_tokens]
        return self._step_plan

    def repeat_positions(self, positions: Tensor) -> Tensor:
        """Return each of the positions [T] twice, [2T], always at the same address for captured graphs."""
        pairs = self._positions[: positions.shape[0]]
        pairs.copy_(positions[:, None])
        return pairs.view(-1)

    def recipient_mask(self, n_tokens: int) -> Tensor:
        """Return which stream of each token is the recipient's, [T, 2] bool."""
        return self.plan[:n_tokens, PlanColumn.RECIPIENT_STREAM, None] == self._streams

    def exclude_eos(self, ids: Tensor) -> None:
        """Remove the step's tokens [T] that end a text from their groups, if the request excludes such tokens.

        Why on the device: with asynchronous scheduling a step is planned before its tokens are known. Why before the
        captured graph: few steps need it.
        """
        group, recipient_stream = (
            self.plan[: len(ids), PlanColumn.GROUP],
            self.plan[: len(ids), PlanColumn.RECIPIENT_STREAM],
        )
        eos_ids = self._eos_ids[recipient_stream.long()] if len(self._eos_ids) > 1 else self._eos_ids
        settled = torch.where((ids[:, None] == eos_ids).any(1), -1, group - SKIP_EOS_OFFSET)
        group.copy_(torch.where(group >= SKIP_EOS_OFFSET, settled, group))

    def write_adapter(self, row: int, scales: dict[str, Tensor]) -> None:
        """Write the IA3 vectors of all neurons; scales: module -> [L, width] float32."""
        for index, layer in enumerate(self.layers):
            layer.scale[row] = scales["down_proj"][index, self._neurons].to(self.device)
            if self._kv is not None:
                parts = [scales[name][index, self._kv] for name in ("k_proj", "v_proj")]
                layer.attention_scale["kv"][row] = torch.cat(parts).to(self.device)

    def write_ranking(self, row: int, rank: Tensor) -> None:
        """Write the ranks of all neurons, [L, F] int32."""
        for index, layer in enumerate(self.layers):
            layer.rank[row] = rank[index, self._neurons].to(self.device)

    def write_constant(self, row: int, values: Tensor) -> None:
        """Write the values of all neurons, [L, F] float32."""
        for index, layer in enumerate(self.layers):
            layer.constant[row] = values[index, self._neurons].to(self.device)

    def clear_statistics(self, groups: list[int]) -> None:
        """Set the sums and counts of these groups to zero in every layer of this worker."""
        for layer in self.layers:
            layer.stats[groups], layer.count[groups] = 0.0, 0

    def read_statistics(self, groups: list[int]) -> tuple[Tensor, Tensor]:
        """Return sums [groups, L, 5, shard] float64 and counts [groups, L] int64 on the host."""
        sums = torch.stack([layer.stats[groups] for layer in self.layers], dim=1).cpu()
        return sums, torch.stack([layer.count[groups] for layer in self.layers], dim=1).cpu()
