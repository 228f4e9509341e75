"""The op against eager PyTorch, inductor, and a plain fused silu*up: `make bench-op`.

On a CPU with one thread; on a GPU under graph replay, and against vLLM's silu_and_mul if vLLM is installed. Every side
is first checked against the reference. Bytes: gate_up read, out written, statistics read and written, rank and scales
read once.
"""

from pathlib import Path

import predict
import pytest
import torch
from torch.utils import cpp_extension

from snpatch.kernels import patched_glu as kernel
from snpatch.op import ops, reference
from snpatch.op.plan import INT32_MAX, PlanColumn, ReceiptColumn, float_bits

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CPU_CASES = [(64, 11008, torch.bfloat16), (64, 11008, torch.float32), (4, 688, torch.bfloat16), (4, 688, torch.float32)]
GPU_CASES = [(t, f, torch.bfloat16) for f in predict.NEURONS for t in predict.TOKENS]
CASES = GPU_CASES if GPU else CPU_CASES
torch.set_num_threads(1)


def all_features(T, F, dtype):
    """Build a decode step of T tokens with all features.

    The features are adapters, windows, statistics, a capture and receipts.
    """
    g = torch.Generator().manual_seed(0)
    plan = torch.zeros(T, len(PlanColumn), dtype=torch.int32)
    plan[:, PlanColumn.ADAPTER_0], plan[:, PlanColumn.ADAPTER_1] = 1, 2
    plan[:, PlanColumn.LO] = torch.randint(0, F // 2, (T,), generator=g)
    plan[:, PlanColumn.HI] = plan[:, PlanColumn.LO] + F // 10
    plan[:, PlanColumn.SOURCE_WEIGHT] = float_bits(1)
    plan[:, PlanColumn.CAPTURE] = -1
    plan[0, PlanColumn.CAPTURE] = 0
    plan[:, PlanColumn.RECEIPT] = torch.arange(T)
    tensors = {
        "gate_up": torch.randn(2 * T, 2 * F, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).to(dtype),
        "scale": torch.cat([torch.ones(1, F), 1 + 0.3 * torch.randn(2, F, generator=g)]),
        "rank": torch.randperm(F, generator=g).int()[None],
        "constant": torch.zeros(1, F),
        "plan": plan,
        "stats": torch.zeros(1, 5, F, dtype=torch.float64),
        "count": torch.zeros(1, dtype=torch.int64),
        "capture": torch.zeros(1, 64),
        "receipt": torch.zeros(T, len(ReceiptColumn), dtype=torch.int64),
    }
    tensors["unobserved"] = plan.clone()
    tensors["unobserved"][:, PlanColumn.GROUP] = -1
    tensors["order"] = torch.argsort(tensors["rank"][0])[:64]  # for the unfused side: the captured neurons
    tensors["plain_out"] = torch.empty(2 * T, F, dtype=dtype)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def fused(t):
    return ops.patched_glu(*list(t.values())[:9], activation="silu", streams=2, layer=0)


def unobserved(t):
    """Run the step as in generation: patched, captured and counted, without statistics."""
    tensors = [t["unobserved"] if name == "plan" else tensor for name, tensor in list(t.items())[:9]]
    return ops.patched_glu(*tensors, activation="silu", streams=2, layer=0)


def with_tile(block_t, block_f):
    """Return `unobserved` with another tile of the Triton kernel, to check the choice of its tile."""

    def run(t):
        tile = dict(kernel.TILE)
        kernel.TILE.update(BLOCK_T=block_t, BLOCK_F=block_f)
        try:
            return unobserved(t)
        finally:
            kernel.TILE.update(tile)

    return run


def unfused(t):
    """Compute the same in plain PyTorch, optimized for this case: one group, one ranking, one capture."""
    width = t["scale"].shape[1]
    gate, up = t["gate_up"].float().split(width, dim=1)
    value = (torch.nn.functional.silu(gate) * up).view(-1, 2, width) * t["scale"][1:]
    r, d = value.unbind(1)
    difference = r - d
    t["stats"][0] += torch.stack([r.sum(0), (r * r).sum(0), d.sum(0), (d * d).sum(0), (difference * difference).sum(0)])
    t["count"] += len(r)
    rank, plan = t["rank"], t["plan"]
    t["capture"][0] = r[0, t["order"]]
    patched = (plan[:, PlanColumn.LO, None] <= rank) & (rank < plan[:, PlanColumn.HI, None])
    out = torch.stack([torch.where(patched, d, r), d], dim=1).view(-1, width).to(t["gate_up"].dtype)
    nonfinite = (~out.isfinite()).view(len(r), -1).sum(1)
    t["receipt"] += torch.stack([patched.sum(1), nonfinite, torch.where(nonfinite > 0, INT32_MAX, 0)], dim=1)
    return out


def silu_mul(t):
    if GPU:
        return torch.nn.functional.silu(t["gate_up"][:, : t["scale"].shape[1]]) * t["gate_up"][:, t["scale"].shape[1] :]
    return torch.ops.snpatch_bench.silu_mul(t["gate_up"])


def copy(t):
    """Copy as many bytes as the op moves; the ceiling."""
    half = bytes_moved(t, "snpatch") // 2
    if "copied" not in t:
        t["copied"] = torch.empty(2, half, dtype=torch.uint8, device=DEVICE)
    t["copied"][1].copy_(t["copied"][0])


def silu_and_mul(t):
    """Run vLLM's activation on the same rows."""
    torch.ops._C.silu_and_mul(t["plain_out"], t["gate_up"])


@pytest.fixture(scope="session", autouse=True)
def plain_op():
    """Compile plain_glu.cpp with the flags that setup.py uses for the product."""
    if GPU:
        return
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-std=c++20"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    source = str(Path(__file__).parent / "plain_glu.cpp")
    cpp_extension.load("plain_glu", [source], extra_cflags=flags, is_python_module=False)


def sides():
    """Return name -> function of the tensors, for the sides that run on this machine."""
    functions = {"snpatch": fused, "snpatch, unobserved": unobserved, "plain silu*up": silu_mul, "eager": unfused}
    if GPU:
        functions["copy"] = copy
        functions |= {f"tile {t}x{f}": with_tile(t, f) for t, f in ((1, 1024), (2, 512), (8, 128), (16, 64))}
        try:
            import vllm._custom_ops  # noqa: F401

            functions["vllm silu_and_mul"] = silu_and_mul
        except ImportError:
            pass
    else:
        functions["inductor"] = torch.compile(unfused, dynamic=False)
    return functions


SIDES = sides()
UNOBSERVED = [side for side in SIDES if side.startswith("tile") or side.endswith("unobserved")]


def bytes_moved(t, side):
    data = t["gate_up"].numel() * t["gate_up"].element_size() * 3 // 2
    if side in ("plain silu*up", "vllm silu_and_mul"):
        return data
    statistics = 0 if side in UNOBSERVED else 2 * t["stats"].nbytes
    return data + sum(t[name].numel() * t[name].element_size() for name in ("rank", "scale")) + statistics


def assert_correct(t, side):
    """Assert that a side gives the reference's output, statistics, count, capture and receipts."""
    mutated = ("stats", "count", "capture", "receipt")
    for name in mutated:
        t[name].zero_()
    if side == "copy":
        return
    if side in ("plain silu*up", "vllm silu_and_mul"):
        gate, up = t["gate_up"].float().chunk(2, dim=1)
        actual = SIDES[side](t) if side != "vllm silu_and_mul" else (SIDES[side](t), t["plain_out"])[1]
        torch.testing.assert_close(actual.float(), torch.nn.functional.silu(gate) * up, rtol=2e-2, atol=2e-2)
        return
    expected = {name: t[name].clone() for name in mutated}
    inputs = [expected.get(name, tensor) for name, tensor in list(t.items())[:9]]
    if side in UNOBSERVED:
        inputs[4] = t["unobserved"]
    out = reference.patched_glu(*inputs, "silu", 2, 0, 0)
    actual = SIDES[side](t)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if out.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(actual, out, **tolerance)
    for name in mutated:
        torch.testing.assert_close(t[name], expected[name], rtol=1e-4, atol=1e-3)


def launcher(side, t):
    """Return the timed function: a call, or on a GPU the replay of its graph and a synchronization."""
    if not GPU:
        return lambda: SIDES[side](t)
    for _ in range(3):
        SIDES[side](t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GPU_REPEATS):
            SIDES[side](t)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


GPU_REPEATS = 50  # calls per graph, because one call is shorter than a synchronization


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("T", "F", "dtype"), CASES, ids=[f"T{t}-F{f}-{str(d)[6:]}" for t, f, d in CASES])
def test_patched_glu(benchmark, side, T, F, dtype):
    t = all_features(T, F, dtype)
    assert_correct(t, side)
    calls = GPU_REPEATS if GPU else 1
    run = launcher(side, t)
    benchmark.extra_info.update(
        side=side, tokens=T, neurons=F, dtype=str(dtype)[6:], device=DEVICE, calls=calls, bytes=bytes_moved(t, side)
    )
    rounds = 200 if T * F < 100_000 else 60
    if GPU:
        rounds = 100 if T <= 256 else 15
    benchmark.pedantic(run, rounds=rounds, iterations=1 if GPU or T > 4 else 20, warmup_rounds=5)
