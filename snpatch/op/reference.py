"""Each op in plain PyTorch and float32: the definition that every other implementation is tested against.

Written to be read, not to be fast. A padded row may contain anything, NaN included, so values are selected and
never multiplied by zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from snpatch.op.plan import INT32_MAX, PlanColumn, ReceiptColumn, Source, num_plan_interventions, plan_column

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
SUMS = 5  # r, r^2, d, d^2, (r - d)^2


def patched_glu(
    gate_up: Tensor,  # [S*T, 2*N], model dtype; row S*t is token t's stream 0, S*t + 1 its stream 1
    scale: Tensor,  # [A, N] float32, IA3 vectors of this layer; row 0 is ones
    rank: Tensor,  # [R, N] int32, global rank in each ranking; 2^31 - 1 = never patched
    constant: Tensor,  # [C, N] float32; row 0 is zeros
    plan: Tensor,  # [T, plan_width(num_interventions)] int32
    stats: Tensor,  # [G, 5, N] float64, added to: sums of r, r^2, d, d^2, (r - d)^2
    count: Tensor,  # [G] int64, added to: tokens summed in stats
    capture: Tensor,  # [slots, K] float32, written: neurons with rank < K, in rank order
    receipt: Tensor,  # [slots, len(ReceiptColumn)] int64, added to: see plan.ReceiptColumn
    activation: str,  # a key of ACTIVATIONS
    streams: int,  # S: 1, or 2 with donor rows
    layer: int,  # index of this layer, for the noise and the receipt
    first_neuron: int,  # global index of neuron 0 here, for the noise
) -> Tensor:
    """Compute one layer's activation: IA3 scale, statistics, capture and overwrite.

    The result is [S*T, N] in the model dtype. A neuron is `act(gate) * up * scale`, computed in float32. The plan says
    which stream is a token's recipient. Statistics and captures see the recipient as it would have been (r) and the
    donor (d), before the overwrite; the donor's own rows are never changed. A patched neuron becomes self_weight * r +
    source_weight * source. A term whose weight is 0 is not read, so weights 0 and 1 copy the source bit for bit.
    Further interventions do the same, in order, to the result of the ones before them. The receipt counts the
    overwrites, and the values of both streams that are not finite after rounding to the model dtype. Source: paper
    section 3.2 and Algorithm 1, arXiv 2406.14144.
    """
    tokens, width = plan.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up.float().split(width, dim=1)
    adapter = plan[:, PlanColumn.ADAPTER_0 : PlanColumn.ADAPTER_0 + streams].long()
    value = (ACTIVATIONS[activation](gate) * up).view(tokens, streams, width) * scale[adapter]
    recipient_stream = plan[:, PlanColumn.RECIPIENT_STREAM].long()
    token = torch.arange(tokens, device=plan.device)
    recipient, donor = value[token, recipient_stream], value[token, streams - 1 - recipient_stream]

    is_observed = plan[:, PlanColumn.GROUP] >= 0
    group = plan[is_observed, PlanColumn.GROUP].long()
    r, d = recipient[is_observed], donor[is_observed]
    sums = [r, r * r] if streams == 1 else [r, r * r, d, d * d, (r - d) ** 2]
    stats[:, : len(sums)].index_add_(0, group, torch.stack(sums, dim=1).double())
    count.index_add_(0, group, torch.ones_like(group))

    token_rank = rank[plan[:, PlanColumn.RANKING].long()]
    is_captured = (plan[:, PlanColumn.CAPTURE, None] >= 0) & (token_rank < capture.shape[1])
    captured_token, neuron = torch.nonzero(is_captured, as_tuple=True)
    slot = plan[captured_token, PlanColumn.CAPTURE].long()
    capture[slot, token_rank[captured_token, neuron].long()] = recipient[captured_token, neuron]

    patched, has_receipt = recipient, plan[:, PlanColumn.RECEIPT] >= 0
    for i in range(num_plan_interventions(plan.shape[1])):

        def column(name: PlanColumn, i: int = i) -> Tensor:
            return plan[:, plan_column(name, i)]

        token_rank = rank[column(PlanColumn.RANKING).long()]
        is_patched = (column(PlanColumn.LO)[:, None] <= token_rank) & (token_rank < column(PlanColumn.HI)[:, None])
        kind = column(PlanColumn.SOURCE)[:, None]
        if streams == 1:
            is_patched &= kind != Source.DONOR  # there is no donor: not counted either, so that the receipt shows it
        constants = constant[column(PlanColumn.CONSTANT_ROW).long()]
        noise = constants * normal(column(PlanColumn.SEED), plan[:, PlanColumn.POSITION], layer, first_neuron, width)
        source = torch.where(kind == Source.CONSTANT, constants, torch.where(kind == Source.NOISE, noise, donor))
        self_weight, source_weight = (
            column(name)[:, None].contiguous().view(torch.float32)
            for name in (PlanColumn.SELF_WEIGHT, PlanColumn.SOURCE_WEIGHT)
        )
        mixture = self_weight * patched
        mixture = torch.where(source_weight == 0, mixture, mixture + source_weight * source)
        replacement = torch.where(self_weight == 0, source_weight * source, mixture)
        patched = torch.where(is_patched, replacement, patched)
        overwrites = is_patched[has_receipt].sum(1)
        receipt[:, ReceiptColumn.OVERWRITES].index_add_(0, plan[has_receipt, PlanColumn.RECEIPT].long(), overwrites)
    out = value.index_put((token, recipient_stream), patched).view(-1, width).to(gate_up.dtype)
    nonfinite = (~out.isfinite()).view(tokens, streams * width).sum(1)
    count_nonfinite(receipt, plan[:, PlanColumn.RECEIPT], nonfinite, layer)
    return out


def count_nonfinite(
    receipt: Tensor,  # [slots, len(ReceiptColumn)] int64, added to
    slot: Tensor,  # [T] int32, row of `receipt`; -1 = do not count
    nonfinite: Tensor,  # [T] int64 or bool, non-finite values of each token
    layer: int,
) -> None:
    """Add non-finite values to the receipts of their requests. Device code: nothing is read on the host."""
    if not len(receipt):
        return
    nonfinite = torch.where(slot >= 0, nonfinite, 0)
    row, code = slot.clamp(min=0).long(), torch.where(nonfinite > 0, INT32_MAX - layer, 0)
    receipt[:, ReceiptColumn.NONFINITE].index_add_(0, row, nonfinite.long())
    receipt[:, ReceiptColumn.LAYER].scatter_reduce_(0, row, code.long(), "amax")


def has_overflowed(logits: Tensor) -> Tensor:
    """Return whether each row of logits [n, V] is the result of an overflow, [n] bool.

    In such a row the largest value is not finite, or all values are equal because a norm squared values that float32
    cannot represent. Some -inf are no overflow: the padding of a second, shorter vocabulary consists of them.
    """
    lowest, highest = logits.amin(-1), logits.amax(-1)  # aminmax of a dimension takes three times as long on a CPU
    return ~highest.isfinite() | (lowest == highest)


def normal(seed: Tensor, position: Tensor, layer: int, first_neuron: int, width: int) -> Tensor:
    """Return standard normal numbers [T, width] float32.

    They are a function of (seed, position, layer, neuron) alone. Philox-4x32-10 with key (seed, 0) and counter (neuron,
    layer, position, 0); Box-Muller turns the first two words into one number. Source: Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3".
    """
    neuron = torch.arange(first_neuron, first_neuron + width, device=seed.device)
    zero = torch.zeros(len(seed), width, dtype=torch.int64, device=seed.device)
    counter = [zero + neuron, zero + layer, zero + position.long()[:, None], zero]
    key = [(seed.long() & 0xFFFFFFFF)[:, None], zero]
    for _ in range(10):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    # 24 bits each, so that the fractions are exact in float32 and the logarithm's argument is never 0.
    radius = torch.sqrt(-2.0 * torch.log(((counter[0] >> 8) + 1).float() * 2.0**-24))
    return radius * torch.cos(2.0 * math.pi * ((counter[1] >> 8).float() * 2.0**-24))


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of 32-bit products.

    The int64 product may wrap; its bits are still right.
    """
    product = a * b
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF
