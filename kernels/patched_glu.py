"""snpatch::patched_glu for the GPU: kernel, then launcher.

    neuron[t, s, n] = act(gate[t, s, n]) * up[t, s, n] * scale[adapter[t, s], n]
    r = neuron[t, recipient_stream[t], n]
    out[t, recipient_stream[t], n] = self_weight[t] * r + source_weight[t] * source[t, n]
                                     if lo[t] <= rank[t, n] < hi[t] else r

The definition is snpatch/op/reference.py. One launch has two kinds of programs. Each of the first few adds up the
statistics of one block of neurons, over all tokens in order; if no token has a group they end at once. Each of the
others computes one tile of the output. So each sum has one fixed order, and the output has one program per tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a plan row and values of its source: snpatch/op/plan.py (tests compare the two).
ADAPTER_0 = tl.constexpr(0)
ADAPTER_1 = tl.constexpr(1)
RECIPIENT_STREAM = tl.constexpr(2)
RANKING = tl.constexpr(3)
LO = tl.constexpr(4)
HI = tl.constexpr(5)
SOURCE = tl.constexpr(6)
CONSTANT_ROW = tl.constexpr(7)
SEED = tl.constexpr(8)
SELF_WEIGHT = tl.constexpr(9)
SOURCE_WEIGHT = tl.constexpr(10)
POSITION = tl.constexpr(11)
GROUP = tl.constexpr(12)
CAPTURE = tl.constexpr(13)
RECEIPT = tl.constexpr(14)
COLUMNS = tl.constexpr(15)
# Columns of each further intervention: those from RANKING to SOURCE_WEIGHT.
COLUMNS_PER_INTERVENTION = tl.constexpr(8)
CONSTANT = tl.constexpr(1)
NOISE = tl.constexpr(2)
# Columns of a row of `receipt`, after the overwrites.
NONFINITE = tl.constexpr(1)
LAYER = tl.constexpr(2)
RECEIPT_COLUMNS = tl.constexpr(3)
INT32_MAX = tl.constexpr(2**31 - 1)
# Tokens (T) x neurons (F) per program; kernels/README.md has the reasons.
TILE = {"BLOCK_T": 4, "BLOCK_F": 256, "SUM_T": 32, "SUM_F": 32, "SEARCH_T": 512}
# Larger, because a program takes milliseconds in the interpreter.
INTERPRETED_TILE = {"BLOCK_T": 32, "BLOCK_F": 1024, "SUM_T": 64, "SUM_F": 1024, "SEARCH_T": 128}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x
    else:  # x * (1 + tanh(y / 2)) / 2 with y = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-y))


@triton.jit
def _cos_turns(v):
    """Return cos(2 pi v) for 0 <= v < 1, within 2e-7. tl.cos would use a table in local memory."""
    x = 3.141592653589793 * (v - 0.5)
    q = x * x
    sine = 2.7557319e-6 - 2.5052108e-8 * q
    sine = -1.9841270e-4 + sine * q
    sine = 8.3333333e-3 + sine * q
    sine = -1.6666667e-1 + sine * q
    sine = x + x * q * sine
    return 2.0 * sine * sine - 1.0


@triton.jit
def _normal(seed, position, layer, neuron):
    """Compute reference.normal [BLOCK_T, BLOCK_F].

    Seed and position are [BLOCK_T, 1], neuron is [1, BLOCK_F].
    """
    zero = tl.zeros_like(seed + neuron)
    w0, w1, _, _ = tl.philox(
        (zero + seed).to(tl.uint32, bitcast=True), zero + neuron, zero + layer, zero + position, zero
    )
    u = ((w0 >> 8) + 1).to(tl.float32) * (2.0**-24)
    v = (w1 >> 8).to(tl.float32) * (2.0**-24)
    return tl.sqrt(-2.0 * tl.log(u)) * _cos_turns(v)


@triton.jit
def _store(p, value, mask, INTERPRETED: tl.constexpr):
    """Store a tile in the output's dtype; return 1 where a stored value is not finite, else 0."""
    if INTERPRETED and p.dtype.element_ty == tl.bfloat16:
        # The interpreter truncates; the hardware rounds to nearest even.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    stored = value.to(p.dtype.element_ty)
    tl.store(p, stored, mask=mask)
    is_finite = tl.abs(stored.to(tl.float32)) < float("inf")  # False for NaN
    return (is_finite == 0).to(tl.int32)  # masked values are 0


@triton.jit
def _add_sum(p, values, m_group, m_neuron):
    total = tl.sum(tl.where(m_group, values, 0.0), axis=0)
    tl.store(p, tl.load(p, mask=m_neuron, other=0.0) + total.to(tl.float64), mask=m_neuron)


@triton.jit
def _rows(p_table, row, n_neurons, o_neuron, m, other):
    """Load each token's row of a table [rows, F]: [BLOCK_T, BLOCK_F]."""
    return tl.load(p_table + (row.to(tl.int64) * n_neurons)[:, None] + o_neuron[None, :], mask=m, other=other)


@triton.jit
def _streams(
    p_gate_up, p_scale, p_row, o_token, o_neuron, m_token, m, n_neurons, row_stride,
    ACTIVATION: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Compute both streams' neurons of a tile in float32. All loads are issued before the first is used."""
    first = tl.load(p_row + ADAPTER_0, mask=m_token, other=0)
    second = tl.load(p_row + ADAPTER_1, mask=m_token, other=0)
    p_gate = p_gate_up + (o_token.to(tl.int64) * STREAMS * row_stride)[:, None] + o_neuron[None, :]
    gate = tl.load(p_gate, mask=m, other=0.0, eviction_policy="evict_first")
    up = tl.load(p_gate + n_neurons, mask=m, other=0.0, eviction_policy="evict_first")
    if STREAMS == 2:
        gate_1 = tl.load(p_gate + row_stride, mask=m, other=0.0, eviction_policy="evict_first")
        up_1 = tl.load(p_gate + row_stride + n_neurons, mask=m, other=0.0, eviction_policy="evict_first")
        scale_1 = _rows(p_scale, second, n_neurons, o_neuron, m, 0.0)
    scale = _rows(p_scale, first, n_neurons, o_neuron, m, 0.0)
    v0 = _activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32) * scale
    v1 = v0
    if STREAMS == 2:
        v1 = _activate(gate_1.to(tl.float32), ACTIVATION) * up_1.to(tl.float32) * scale_1
    return v0, v1


@triton.jit
def _roles(v0, v1, p_row, m_token, STREAMS: tl.constexpr):
    """Return the recipient's and the donor's values, and where stream 0 is the recipient's, [BLOCK_T, 1]."""
    is_first = (tl.load(p_row + RECIPIENT_STREAM, mask=m_token, other=0) == 0)[:, None]
    r = v0
    d = v1
    if STREAMS == 2:
        r = tl.where(is_first, v0, v1)
        d = tl.where(is_first, v1, v0)
    return r, d, is_first


@triton.jit
def _add_statistics(
    i_block, p_gate_up, p_scale, p_plan, p_stats, p_count, n_tokens, n_neurons, row_stride,
    ACTIVATION: tl.constexpr, STREAMS: tl.constexpr, INTERVENTIONS: tl.constexpr, SUM_T: tl.constexpr,
    SUM_F: tl.constexpr, SEARCH_T: tl.constexpr,
):  # fmt: skip
    """Sum one block of neurons over all tokens. SEARCH_T tokens without a group cost one load."""
    width = COLUMNS + COLUMNS_PER_INTERVENTION * (INTERVENTIONS - 1)
    for start in range(0, n_tokens, SEARCH_T):
        o_token = start + tl.arange(0, SEARCH_T)
        group = tl.load(p_plan + o_token.to(tl.int64) * width + GROUP, mask=o_token < n_tokens, other=-1)
        if tl.max(group, axis=0) >= 0:
            _add_tiles(
                i_block, p_gate_up, p_scale, p_plan, p_stats, p_count, start, min(start + SEARCH_T, n_tokens),
                n_neurons, row_stride, ACTIVATION, STREAMS, INTERVENTIONS, SUM_T, SUM_F,
            )  # fmt: skip


@triton.jit
def _add_tiles(
    i_block, p_gate_up, p_scale, p_plan, p_stats, p_count, first_token, n_tokens, n_neurons, row_stride,
    ACTIVATION: tl.constexpr, STREAMS: tl.constexpr, INTERVENTIONS: tl.constexpr, SUM_T: tl.constexpr,
    SUM_F: tl.constexpr,
):  # fmt: skip
    """Sum one block of neurons over tokens [first_token, n_tokens): float32 within a tile, float64 beyond."""
    o_neuron = i_block * SUM_F + tl.arange(0, SUM_F)
    m_neuron = o_neuron < n_neurons
    for start in range(first_token, n_tokens, SUM_T):
        o_token = start + tl.arange(0, SUM_T)
        m_token = o_token < n_tokens
        p_row = p_plan + o_token.to(tl.int64) * (COLUMNS + COLUMNS_PER_INTERVENTION * (INTERVENTIONS - 1))
        group = tl.load(p_row + GROUP, mask=m_token, other=-1)
        highest = tl.max(group, axis=0)
        if highest >= 0:
            lowest = tl.min(tl.where(group >= 0, group, INT32_MAX), axis=0)
            m = (group >= 0)[:, None] & m_neuron[None, :]
            v0, v1 = _streams(
                p_gate_up, p_scale, p_row, o_token, o_neuron, m_token, m, n_neurons, row_stride, ACTIVATION, STREAMS
            )
            r, d, _ = _roles(v0, v1, p_row, m_token, STREAMS)
            for g in range(lowest, highest + 1):
                n_in_group = tl.sum((group == g).to(tl.int32), axis=0)
                if n_in_group > 0:
                    m_group = m & (group == g)[:, None]
                    p_sum = p_stats + (tl.zeros([], tl.int64) + g) * 5 * n_neurons + o_neuron
                    _add_sum(p_sum, r, m_group, m_neuron)
                    _add_sum(p_sum + n_neurons, r * r, m_group, m_neuron)
                    if STREAMS == 2:
                        _add_sum(p_sum + 2 * n_neurons, d, m_group, m_neuron)
                        _add_sum(p_sum + 3 * n_neurons, d * d, m_group, m_neuron)
                        _add_sum(p_sum + 4 * n_neurons, (r - d) * (r - d), m_group, m_neuron)
                    if i_block == 0:
                        tl.atomic_add(p_count + g, n_in_group.to(tl.int64), sem="relaxed")


@triton.jit
def _intervene(
    v, d, rank, p_block, p_row, p_constant, o_neuron, m_token, m, m_rank, n_neurons, layer, first_neuron,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """Apply one intervention to the recipient's values v; return them and the mask of the patched ones."""
    lo = tl.load(p_block + (LO - RANKING), mask=m_token, other=0)
    hi = tl.load(p_block + (HI - RANKING), mask=m_token, other=0)
    source = tl.load(p_block + (SOURCE - RANKING), mask=m_token, other=0)
    if STREAMS == 1:  # there is no donor: nothing is copied from it or counted, so that the receipt shows it
        lo = tl.where(source > 0, lo, hi)
    m_patched = m_rank & (lo[:, None] <= rank) & (rank < hi[:, None])
    by = d
    if tl.max(source, axis=0) > 0:
        row = tl.load(p_block + (CONSTANT_ROW - RANKING), mask=m_token, other=0)
        constant = _rows(p_constant, row, n_neurons, o_neuron, m, 0.0)
        by = tl.where((source == CONSTANT)[:, None], constant, by)
        if tl.max(source, axis=0) == NOISE:
            seed = tl.load(p_block + (SEED - RANKING), mask=m_token, other=0)
            position = tl.load(p_row + POSITION, mask=m_token, other=0)
            noise = _normal(seed[:, None], position[:, None], layer, (first_neuron + o_neuron)[None, :])
            by = tl.where((source == NOISE)[:, None], constant * noise, by)
    self_bits = tl.load(p_block + (SELF_WEIGHT - RANKING), mask=m_token, other=0)
    source_bits = tl.load(p_block + (SOURCE_WEIGHT - RANKING), mask=m_token, other=0)
    self_weight = self_bits.to(tl.float32, bitcast=True)[:, None]
    source_weight = source_bits.to(tl.float32, bitcast=True)[:, None]
    mixture = tl.where(source_weight == 0, self_weight * v, self_weight * v + source_weight * by)
    return tl.where(m_patched, tl.where(self_weight == 0, source_weight * by, mixture), v), m_patched


@triton.jit
def _make_output(
    i_tile, p_gate_up, p_scale, p_rank, p_constant, p_plan, p_capture, p_receipt, p_out, n_tokens, n_neurons,
    row_stride, n_captured, layer, first_neuron, ACTIVATION: tl.constexpr, STREAMS: tl.constexpr,
    INTERVENTIONS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the output: both streams, capture, overwrite and receipts."""
    n_blocks = tl.cdiv(n_neurons, BLOCK_F)
    o_neuron = (i_tile % n_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_token = (i_tile // n_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < n_tokens
    m = m_token[:, None] & (o_neuron < n_neurons)[None, :]
    p_row = p_plan + o_token.to(tl.int64) * (COLUMNS + COLUMNS_PER_INTERVENTION * (INTERVENTIONS - 1))
    lo = tl.load(p_row + LO, mask=m_token, other=0)
    hi = tl.load(p_row + HI, mask=m_token, other=0)
    slot = tl.load(p_row + CAPTURE, mask=m_token, other=-1)
    ranking = tl.load(p_row + RANKING, mask=m_token, other=0)
    v0, v1 = _streams(
        p_gate_up, p_scale, p_row, o_token, o_neuron, m_token, m, n_neurons, row_stride, ACTIVATION, STREAMS
    )
    r, d, is_first = _roles(v0, v1, p_row, m_token, STREAMS)
    m_rank = m & ((lo < hi) | (slot >= 0))[:, None]
    rank = _rows(p_rank, ranking, n_neurons, o_neuron, m_rank, INT32_MAX)
    if tl.max(slot, axis=0) >= 0:
        m_capture = m_rank & (slot >= 0)[:, None] & (rank < n_captured)
        tl.store(p_capture + (slot.to(tl.int64) * n_captured)[:, None] + rank, r, mask=m_capture)
    patched, m_patched = _intervene(r, d, rank, p_row + RANKING, p_row, p_constant, o_neuron, m_token, m, m_rank,
                                    n_neurons, layer, first_neuron, STREAMS)  # fmt: skip
    n_overwrites = tl.sum(m_patched.to(tl.int32), axis=1)
    for i in tl.static_range(1, INTERVENTIONS):
        p_block = p_row + COLUMNS + COLUMNS_PER_INTERVENTION * (i - 1)
        ranking = tl.load(p_block, mask=m_token, other=0)
        lo_i = tl.load(p_block + (LO - RANKING), mask=m_token, other=0)
        hi_i = tl.load(p_block + (HI - RANKING), mask=m_token, other=0)
        m_i = m & (lo_i < hi_i)[:, None]
        rank_i = _rows(p_rank, ranking, n_neurons, o_neuron, m_i, INT32_MAX)
        patched, m_patched = _intervene(patched, d, rank_i, p_block, p_row, p_constant, o_neuron, m_token, m, m_i,
                                        n_neurons, layer, first_neuron, STREAMS)  # fmt: skip
        n_overwrites += tl.sum(m_patched.to(tl.int32), axis=1)
        hi = tl.maximum(hi, lo + hi_i - lo_i)
    p_to = p_out + (o_token.to(tl.int64) * STREAMS * n_neurons)[:, None] + o_neuron[None, :]
    if STREAMS == 2:
        is_bad = _store(p_to, tl.where(is_first, patched, d), m, INTERPRETED)
        is_bad += _store(p_to + n_neurons, tl.where(is_first, d, patched), m, INTERPRETED)
    else:
        is_bad = _store(p_to, patched, m, INTERPRETED)
    nonfinite = tl.sum(is_bad, axis=1)
    if tl.max((hi - lo) | nonfinite, axis=0) > 0:
        receipt = tl.load(p_row + RECEIPT, mask=m_token, other=-1)
        p_slot = p_receipt + receipt.to(tl.int64) * RECEIPT_COLUMNS
        tl.atomic_add(p_slot, n_overwrites.to(tl.int64), mask=(receipt >= 0) & (n_overwrites > 0), sem="relaxed")
        m_bad = (receipt >= 0) & (nonfinite > 0)
        tl.atomic_add(p_slot + NONFINITE, nonfinite.to(tl.int64), mask=m_bad, sem="relaxed")
        layer_code = tl.zeros_like(receipt) + (INT32_MAX - layer)
        tl.atomic_max(p_slot + LAYER, layer_code.to(tl.int64), mask=m_bad, sem="relaxed")


# Not specialized: one compiled kernel serves every layer and number of tokens, so none is compiled in a graph capture.
@triton.jit(do_not_specialize=["n_tokens", "n_captured", "layer", "first_neuron"])
def _patched_glu_kernel(
    p_gate_up,  # [S*T, 2F], rows `row_stride` apart
    p_scale,  # [A, F] float32
    p_rank,  # [R, F] int32
    p_constant,  # [C, F] float32
    p_plan,  # [T, COLUMNS + COLUMNS_PER_INTERVENTION * (INTERVENTIONS - 1)] int32
    p_stats,  # [G, 5, F] float64
    p_count,  # [G] int64
    p_capture,  # [slots, K] float32
    p_receipt,  # [slots, RECEIPT_COLUMNS] int64
    p_out,  # [S*T, F]
    n_tokens,
    n_neurons,
    row_stride,
    n_captured,  # K
    layer,
    first_neuron,
    ACTIVATION: tl.constexpr,
    STREAMS: tl.constexpr,
    INTERVENTIONS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SUM_T: tl.constexpr,
    SUM_F: tl.constexpr,
    SEARCH_T: tl.constexpr,
):
    n_summing = tl.cdiv(n_neurons, SUM_F) if HAS_GROUPS else 0
    i_program = tl.program_id(0)
    if i_program < n_summing:
        _add_statistics(
            i_program, p_gate_up, p_scale, p_plan, p_stats, p_count, n_tokens, n_neurons, row_stride,
            ACTIVATION, STREAMS, INTERVENTIONS, SUM_T, SUM_F, SEARCH_T,
        )  # fmt: skip
    else:
        _make_output(
            i_program - n_summing, p_gate_up, p_scale, p_rank, p_constant, p_plan, p_capture, p_receipt, p_out,
            n_tokens, n_neurons, row_stride, n_captured, layer, first_neuron, ACTIVATION, STREAMS,
            INTERVENTIONS, INTERPRETED, BLOCK_T, BLOCK_F,
        )  # fmt: skip


def patched_glu(
    gate_up: Tensor,  # [S*T, 2F] float32, bfloat16 or float16; any row stride
    scale: Tensor,  # [A, F] float32
    rank: Tensor,  # [R, F] int32
    constant: Tensor,  # [C, F] float32
    plan: Tensor,  # [T, 15 + 8 * (interventions - 1)] int32
    stats: Tensor,  # [G, 5, F] float64, added to
    count: Tensor,  # [G] int64, added to
    capture: Tensor,  # [slots, K] float32, written
    receipt: Tensor,  # [slots, 3] int64, added to
    activation: str,  # "silu" or "gelu_tanh"
    streams: int,
    layer: int,
    first_neuron: int,
) -> Tensor:
    """Launch `reference.patched_glu`; return [S*T, F] in gate_up's dtype.

    snpatch/op/ops.py checks the shapes.
    """
    n_tokens, n_neurons = plan.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], n_neurons)
    if n_tokens == 0 or n_neurons == 0:
        return out
    interventions = 1 + (plan.shape[1] - COLUMNS.value) // COLUMNS_PER_INTERVENTION.value
    interpreted = triton.knobs.runtime.interpret
    tile = INTERPRETED_TILE if interpreted else TILE
    has_groups = stats.shape[0] > 0
    _patched_glu_kernel[(num_programs(n_tokens, n_neurons, has_groups, tile),)](
        gate_up,
        scale,
        rank,
        constant,
        plan,
        stats,
        count,
        capture,
        receipt,
        out,
        n_tokens,
        n_neurons,
        gate_up.stride(0),
        capture.shape[1],
        layer,
        first_neuron,
        ACTIVATION=activation,
        STREAMS=streams,
        INTERVENTIONS=interventions,
        HAS_GROUPS=has_groups,
        INTERPRETED=interpreted,
        **tile,
        maxnreg=max_registers(gate_up.dtype, interventions),
        **OPTIONS,
    )
    return out


def num_programs(n_tokens: int, n_neurons: int, has_groups: bool, tile: dict[str, int]) -> int:
    """Return how many programs a launch has: those that add up statistics, and one per tile of the output."""
    summing = triton.cdiv(n_neurons, tile["SUM_F"]) if has_groups else 0
    return summing + triton.cdiv(n_tokens, tile["BLOCK_T"]) * triton.cdiv(n_neurons, tile["BLOCK_F"])


def max_registers(dtype: torch.dtype, interventions: int) -> int:
    """Return the register limit of a thread.

    With 96, five programs fit on a multiprocessor. Without a limit Triton 3.6 uses 121, and in float32 ptxas uses
    96 for compute capability 10.0 and spills.
    """
    return 96 if dtype.itemsize == 2 and interventions == 1 else 128
