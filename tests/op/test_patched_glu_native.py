"""C++ and Triton (interpreted here, compiled on a GPU host) against the reference, and the SASS that Triton makes."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from snpatch import SnpatchError
from snpatch.op import ops, plan, reference
from snpatch.op.plan import PlanColumn, ReceiptColumn, Source, plan_column, plan_width

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative RMS error of outputs by dtype: a few units in the last place.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CANCELLATION_ERROR = 2e-7  # absolute: inputs are of order 1, and 1 + tanh(x) cancels down to float32's rounding
MUTATED = ("stats", "count", "capture", "receipt")


def cpp(*arguments, **attributes):
    assert ops.implementations()["patched_glu (cpu)"] == "C++"
    return ops.patched_glu(*arguments, **attributes)


def triton(*arguments, activation, streams, layer, first_neuron):
    if GPU:  # the op, as an engine calls it
        copies = [a.cuda() for a in arguments]
        out = ops.patched_glu(*copies, activation=activation, streams=streams, layer=layer, first_neuron=first_neuron)
    else:
        copies = [a.clone() for a in arguments]
        out = ops._serve_triton(*copies, activation, streams, layer, first_neuron)
    for result, argument in zip(copies[5:], arguments[5:], strict=True):
        argument.copy_(result)
    return out.cpu()


IMPLEMENTATIONS = {"cpp": cpp, "triton": triton}


# (self_weight, source_weight) as bits: the paper's copy, mixtures, an addition, a scaling, an amplified source
WEIGHTS = torch.tensor([[0, 1], [0, 1], [0.75, 0.25], [-1, 2], [1, 1], [1.5, 0], [0, 2]]).view(torch.int32)


def case(T, F, S, dtype, seed=0, groups=3, slots=4, K=5, adapters=3, rankings=2, values=None, interventions=1):
    """Build random arguments by name, in the op's order, with a plan that uses every feature."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return torch.randint(low, high, (T,), generator=g, dtype=torch.int32)

    rows = torch.zeros(T, plan_width(interventions), dtype=torch.int32)
    some_captured = torch.where(torch.arange(T) % 5 == 2, torch.arange(T) // 5, -1)
    for column, value in {
        PlanColumn.ADAPTER_0: pick(0, adapters),
        PlanColumn.ADAPTER_1: pick(0, adapters),
        PlanColumn.RECIPIENT_STREAM: pick(0, S),
        PlanColumn.POSITION: pick(0, 5000),
        PlanColumn.GROUP: pick(-1, groups),
        PlanColumn.CAPTURE: torch.where(some_captured < slots, some_captured, -1),
        PlanColumn.RECEIPT: pick(-1, slots),
    }.items():
        rows[:, column] = value
    for i in range(interventions):
        lo, mixed = pick(0, F + 1), pick(0, len(WEIGHTS)).long()
        for column, value in {
            PlanColumn.RANKING: pick(0, rankings),
            PlanColumn.LO: torch.where(pick(0, 3) == 0, 0, lo),
            PlanColumn.HI: torch.where(pick(0, 4) == 0, lo, lo + pick(0, F + 3)),
            PlanColumn.SOURCE: pick(0 if S == 2 else 1, len(Source)),
            PlanColumn.CONSTANT_ROW: pick(0, 2),
            PlanColumn.SEED: pick(0, 2**31 - 1),
            PlanColumn.SELF_WEIGHT: WEIGHTS[mixed, 0],
            PlanColumn.SOURCE_WEIGHT: WEIGHTS[mixed, 1],
        }.items():
            rows[:, plan_column(column, i)] = value
    rank = torch.stack([torch.randperm(F + 2, generator=g)[:F] for _ in range(rankings)]).int()
    rank[:, ::7] = plan.UNRANKED
    scale = 1 + 0.3 * torch.randn(adapters, F, generator=g)
    scale[0] = 1
    constant = torch.randn(2, F, generator=g)
    constant[0] = 0
    return {
        "gate_up": torch.randn(S * T, 2 * F, generator=g).to(dtype) if values is None else values,
        "scale": scale,
        "rank": rank,
        "constant": constant,
        "plan": rows,
        "stats": torch.randn(groups, 5, F, generator=g, dtype=torch.float64),
        "count": torch.arange(groups),
        "capture": torch.full((slots, K), torch.nan),
        "receipt": torch.arange(slots * len(ReceiptColumn)).view(slots, -1) * 10,
    }


def run(implementation, tensors, **attributes):
    """Return (out, mutated arguments); the inputs are not changed."""
    copies = {name: t.clone() if name in MUTATED else t for name, t in tensors.items()}
    out = implementation(*copies.values(), **attributes)
    return out, {name: copies[name] for name in MUTATED}


def run_reference(tensors, activation, streams, layer, first_neuron):
    return run(
        lambda *a, **k: reference.patched_glu(*a, *k.values()),
        tensors,
        activation=activation,
        streams=streams,
        layer=layer,
        first_neuron=first_neuron,
    )


def assert_same(tensors, dtype, implementation, activation="silu", streams=2, layer=3, first_neuron=11):
    attributes = dict(activation=activation, streams=streams, layer=layer, first_neuron=first_neuron)
    expected, expected_state = run_reference(tensors, **attributes)
    actual, state = run(implementation, tensors, **attributes)
    assert actual.dtype == expected.dtype == dtype
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(actual))
    difference = (actual - expected)[finite].double()
    allowed = TOLERANCE[dtype] * expected[finite].double().square().sum().sqrt()
    assert difference.square().sum().sqrt() <= allowed + CANCELLATION_ERROR * len(difference) ** 0.5
    assert torch.equal(expected_state["count"], state["count"])
    assert torch.equal(expected_state["receipt"], state["receipt"])
    added_sums = (expected_state["stats"] - tensors["stats"]).abs()
    for column in range(reference.SUMS if added_sums.numel() else 0):
        # Sums of squares bound their own rounding; a sum of signed terms is bounded by the largest sum of its kind.
        allowed = (
            2e-6 * (added_sums[:, column] if column in (1, 3, 4) else added_sums[:, column].max())
            + 5 * CANCELLATION_ERROR
        )
        assert ((state["stats"] - expected_state["stats"])[:, column].abs() <= allowed).all(), column
    assert torch.equal(expected_state["capture"].isnan(), state["capture"].isnan())
    torch.testing.assert_close(state["capture"], expected_state["capture"], rtol=1e-5, atol=1e-5, equal_nan=True)
    return actual, state


SHAPES = [*itertools.product((0, 1, 2, 63, 129), (1, 60, 688)), (1, 11008), (33, 11008), (300, 63)]  # (T, F)
VALUES = [SHAPES, DTYPES, list(reference.ACTIVATIONS), [1, 2]]


def grid(name: str) -> Iterator:
    """Yield every case; those of Triton's interpreter outside a pairwise cover only run in `make test-full`."""
    for indices in itertools.product(*(range(len(values)) for values in VALUES)):
        shape, dtype, activation, streams = indices
        is_covered = (shape + dtype) % len(VALUES[2]) == activation and (shape // 2 + dtype) % 2 == streams
        marks = [] if name == "cpp" or GPU or is_covered else [pytest.mark.full]
        (T, F), dtype, activation, streams = (values[i] for values, i in zip(VALUES, indices, strict=True))
        case_id = f"{T}-{F}-{streams}-{activation}-{dtype}-{name}"  # bench/gpu_steps.py selects by it
        yield pytest.param(name, T, F, dtype, activation, streams, marks=marks, id=case_id)


def test_cover_has_every_pair_of_values():
    cases = [case.values for case in grid("triton") if not case.marks]
    for first, second in itertools.combinations((slice(1, 3), slice(3, 4), slice(4, 5), slice(5, 6)), 2):
        pairs = {(case[first], case[second]) for case in cases}
        assert pairs == {(case.values[first], case.values[second]) for case in grid("triton")}


@pytest.mark.parametrize(
    ("name", "T", "F", "dtype", "activation", "streams"), [case for name in IMPLEMENTATIONS for case in grid(name)]
)
def test_patched_glu_equals_the_reference(name, T, F, dtype, activation, streams):
    tensors = case(T, F, streams, dtype, interventions=1 + (T + F) % 3)
    assert_same(tensors, dtype, IMPLEMENTATIONS[name], activation, streams)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_patched_glu_strided_and_offset_rows_equal_reference(name):
    T, F = 17, 60
    wide = torch.randn(2 * T + 3, 2 * F + 40).bfloat16()
    values = wide[3:, 24 : 24 + 2 * F]
    assert_same(case(T, F, 2, torch.bfloat16, values=values), torch.bfloat16, IMPLEMENTATIONS[name])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patched_glu_copies_the_source_bit_for_bit(name, dtype):
    T, F = 33, 129
    tensors = case(T, F, 2, dtype)
    tensors["plan"][:, PlanColumn.SOURCE] = Source.DONOR
    tensors["plan"][:, [PlanColumn.SELF_WEIGHT, PlanColumn.SOURCE_WEIGHT]] = WEIGHTS[0]
    stream, token = tensors["plan"][:, PlanColumn.RECIPIENT_STREAM].long(), torch.arange(T)
    out, _ = run(IMPLEMENTATIONS[name], tensors, activation="silu", streams=2, layer=0, first_neuron=0)
    recipient, donor = out[2 * token + stream], out[2 * token + 1 - stream]
    rank = tensors["rank"][tensors["plan"][:, PlanColumn.RANKING].long()]
    patched = (tensors["plan"][:, PlanColumn.LO, None] <= rank) & (rank < tensors["plan"][:, PlanColumn.HI, None])
    assert patched.any()
    assert torch.equal(recipient[patched], donor[patched])
    constant = dict(tensors, plan=tensors["plan"].clone())
    constant["plan"][:, PlanColumn.SOURCE] = Source.CONSTANT
    constant["plan"][:, PlanColumn.CONSTANT_ROW] = 1
    out, _ = run(IMPLEMENTATIONS[name], constant, activation="silu", streams=2, layer=0, first_neuron=0)
    expected = tensors["constant"][1].to(dtype).expand(T, F)
    assert torch.equal(out[2 * token + stream][patched], expected[patched])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_patched_glu_nan_in_padded_rows_stays_there(name):
    T, F = 40, 60
    tensors = case(T, F, 2, torch.float32)
    padded = torch.arange(T) % 3 == 1
    padding = torch.zeros(len(PlanColumn), dtype=torch.int32)
    padding[[PlanColumn.GROUP, PlanColumn.CAPTURE, PlanColumn.RECEIPT]] = -1
    tensors["plan"][padded] = padding
    clean, clean_state = assert_same(tensors, torch.float32, IMPLEMENTATIONS[name])
    tensors["gate_up"][padded.repeat_interleave(2)] = torch.nan
    dirty, dirty_state = run(IMPLEMENTATIONS[name], tensors, activation="silu", streams=2, layer=3, first_neuron=11)
    real = ~padded.repeat_interleave(2)
    assert torch.equal(clean[real], dirty[real])
    assert all(torch.equal(clean_state[n].nan_to_num(), dirty_state[n].nan_to_num()) for n in MUTATED)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patched_glu_huge_and_tiny_magnitudes_stay_accurate(name, dtype):
    largest = torch.finfo(dtype).max
    smallest = torch.finfo(dtype).smallest_normal
    edge = torch.tensor(
        [0.0, -0.0, 1, -1, 88, -88, 89, -89, 104, -104, 300, -300, largest, -largest, smallest, -smallest, smallest / 4]
    )
    values = torch.stack([edge, edge.flip(0)]).to(dtype).repeat(3, 2)
    tensors = case(3, len(edge), 2, dtype, values=values)
    tensors["plan"][:, [PlanColumn.GROUP, PlanColumn.CAPTURE]] = -1
    tensors["scale"][:] = 1
    assert_same(tensors, dtype, IMPLEMENTATIONS[name])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_patched_glu_two_runs_give_the_same_bits(name):
    tensors = case(300, 688, 2, torch.bfloat16)
    attributes = dict(activation="silu", streams=2, layer=0, first_neuron=0)
    before = torch.get_num_threads()
    first, first_state = run(IMPLEMENTATIONS[name], tensors, **attributes)
    try:
        torch.set_num_threads(max(1, 3 - before))
        second, second_state = run(IMPLEMENTATIONS[name], tensors, **attributes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)
    assert all(torch.equal(first_state[n].nan_to_num(), second_state[n].nan_to_num()) for n in MUTATED)


def test_cpp_random_cases_equal_reference():
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(
        st.integers(0, 40), st.integers(1, 1100), st.integers(1, 2), st.sampled_from(DTYPES),
        st.sampled_from(list(reference.ACTIVATIONS)), st.integers(0, 10**6), st.integers(1, 3),
    )  # fmt: skip
    def fuzz(T, F, S, dtype, activation, seed, interventions):
        assert_same(case(T, F, S, dtype, seed, interventions=interventions), dtype, cpp, activation, S)

    fuzz()


def test_statistics_drift_over_ten_million_tokens():
    """The root mean square over 10^7 tokens of known values has a relative error below 1e-6."""
    T, F, steps = 2000, 16, 5000
    tensors = case(T, F, 2, torch.float32, groups=1)
    gate = torch.full((2 * T, F), 1e4)  # silu(1e4) is exactly 1e4
    up = torch.empty(2 * T, F)
    up[0::2], up[1::2] = 0.3e-4, 0.1e-4
    tensors["gate_up"] = torch.cat([gate, up], dim=1)
    tensors["scale"][:] = 1
    tensors["plan"][:] = 0
    tensors["plan"][:, [PlanColumn.CAPTURE, PlanColumn.RECEIPT]] = -1
    tensors["stats"].zero_()
    tensors["count"].zero_()
    value = [float(torch.tensor(1e4) * torch.tensor(x)) for x in (0.3e-4, 0.1e-4)]
    difference = float(torch.tensor(value[0]) - torch.tensor(value[1]))
    for _ in range(steps):
        cpp(*tensors.values(), activation="silu", streams=2, layer=0, first_neuron=0)
    assert tensors["count"].tolist() == [T * steps]
    root = (tensors["stats"][0, 4] / (T * steps)).sqrt()
    assert (root / difference - 1).abs().max() < 1e-6
    # Fewer steps for the others, which take seconds per step on a CPU: drift within a step shows in each step, and
    # across steps all three add float64.
    num_steps = {triton: steps if GPU else 2, lambda *a, **k: reference.patched_glu(*a, *k.values()): 100}
    for implementation, n in num_steps.items():
        tensors["stats"].zero_()
        for _ in range(n):
            implementation(*tensors.values(), activation="silu", streams=2, layer=0, first_neuron=0)
        assert ((tensors["stats"][0, 4] / (T * n)).sqrt() / difference - 1).abs().max() < 1e-6


class Layer(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())

    def forward(self, gate_up):
        buffers = [getattr(self, n) for n in ("scale", "rank", "constant", "plan", *MUTATED)]
        return ops.patched_glu(gate_up, *buffers, activation="silu", streams=2, layer=0)


def test_patched_glu_full_graph_compile_with_separate_tensors_per_layer(compilation):
    tensors = case(6, 60, 2, torch.float32)
    eager = torch.nn.Sequential(Layer(tensors), torch.nn.Linear(60, 120), Layer(tensors)).requires_grad_(False)
    compiled = torch.nn.Sequential(Layer(tensors), eager[1], Layer(tensors))
    expected = eager(tensors["gate_up"])
    actual = torch.compile(compiled, fullgraph=True)(tensors["gate_up"])
    torch.testing.assert_close(actual, expected)
    for eager_layer, compiled_layer in ((eager[0], compiled[0]), (eager[2], compiled[2])):
        for name in MUTATED:
            torch.testing.assert_close(getattr(compiled_layer, name), getattr(eager_layer, name), equal_nan=True)


@pytest.mark.parametrize("choice", ["reference", "cpp", "triton"])
def test_ops_environment_variable_forces_an_implementation(choice):
    run = subprocess.run(
        [sys.executable, "-c", "from snpatch.op import ops; import json; print(json.dumps(ops.implementations()))"],
        env={**os.environ, "SNPATCH_OPS": choice},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {"reference": "reference (PyTorch)", "cpp": "C++", "triton": "Triton"}
    assert json.loads(run.stdout)["patched_glu (cpu)"] == names[choice]


def test_ops_missing_build_falls_back_with_one_warning():
    code = (
        "import sys, warnings; sys.modules['snpatch._C'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from snpatch.op import ops\n"
        "print([str(w.message) for w in seen if 'snpatch' in str(w.message)], ops.implementations())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("C++ kernels cannot be loaded") == 1
    assert run.stdout.count("run in snpatch's checkout: pip install --no-build-isolation .") == 1
    assert "'patched_glu (cpu)': 'reference (PyTorch)'" in run.stdout


def test_sass_uses_no_stack_and_128_bit_accesses():
    """Compiled ahead of time for three GPUs, without a GPU: no spills, 128-bit loads and stores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "compile_kernels.py"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    output = json.loads(run.stdout)
    assert output["triton"] == version("triton")
    assert {v["capability"] for v in output["variants"]} == {80, 90, 100}
    for variant in output["variants"]:
        # kernels/README.md assumes five programs per multiprocessor; float32 and interventions > 1 need more.
        has_five = variant["dtype"] != "fp32" and variant["interventions"] == 1
        assert variant["registers"] <= (96 if has_five else 128), variant
        assert variant["stack_bytes"] <= (0 if variant["is_aligned"] else 16), variant
        if variant["is_aligned"]:
            assert variant["instructions"] <= 2000 + 1300 * variant["interventions"], variant
            assert variant["wide_loads"] >= 4, variant
            assert variant["wide_stores"] >= variant["streams"], variant
    print(*output["variants"], sep="\n")


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from snpatch.kernels import patched_glu as module

class Card:  # the driver methods that Triton calls to compile for a GPU that is absent
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Card())
kernel, compiled = module._patched_glu_kernel, []
launch = kernel.run
kernel.run = lambda *args, grid, warmup, **options: launch(*args, grid=grid, warmup=True, **options)
triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["repr"])

def step(tokens, layer, dtype=torch.bfloat16, neurons=688):
    i32, i64, f64 = {"dtype": torch.int32}, {"dtype": torch.int64}, {"dtype": torch.float64}
    module.patched_glu(
        torch.zeros(2 * tokens, 2 * neurons, dtype=dtype), torch.zeros(3, neurons), torch.zeros(2, neurons, **i32),
        torch.zeros(2, neurons), torch.zeros(tokens, 15, **i32), torch.zeros(4, 5, neurons, **f64),
        torch.zeros(4, **i64), torch.zeros(4, 64), torch.zeros(9, **i64), "silu", 2, layer, 16 * layer,
    )

step(1, 0)
warm = len(compiled)
for tokens in (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 256, 512, 8192):
    for layer in (0, 1, 16):
        step(tokens, layer)
print(warm, len(compiled))
step(1, 0, torch.float16)
print(len(compiled))
"""


def test_one_compilation_serves_every_step_of_an_engine():
    """Every captured size and layer launches the kernel compiled at startup; Triton's hook counts compilations."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1", "1", "2"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("T", "F"), [(5, 1025), (129, 257), (257, 60)])
def test_patched_glu_strided_views_and_several_groups_in_a_tile(name, T, F):
    """F just above a tile, T just above a multiple of its tokens, another row stride, adjacent tokens with different
    groups and shared receipts, and NaN in unobserved rows next to observed ones.
    """
    tensors = case(T, F, 2, torch.float32, groups=5, slots=3)
    wide = torch.full((2 * T + 1, 2 * F + 8), torch.nan)
    wide[1:, 5 : 5 + 2 * F] = tensors["gate_up"]
    tensors["gate_up"] = wide[1:, 5 : 5 + 2 * F]
    unobserved = torch.arange(T) % 3 == 1
    tensors["plan"][unobserved, PlanColumn.GROUP] = -1
    tensors["plan"][unobserved, PlanColumn.CAPTURE] = -1
    tensors["gate_up"].view(T, 2, 2 * F)[unobserved] = torch.nan
    tensors["plan"][:, PlanColumn.GROUP] = torch.where(unobserved, -1, torch.arange(T) % 5).int()
    tensors["plan"][:, PlanColumn.RECEIPT] = (torch.arange(T) // 4 % 3).int()
    _, state = assert_same(tensors, torch.float32, IMPLEMENTATIONS[name])
    assert state["stats"].isfinite().all()


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_patched_glu_finds_the_observed_token_anywhere(name):
    """The kernel searches many tokens at once; the observed one is the first, the last, or at a search's edge."""
    T = 300
    for index in (0, 127, 128, 255, 256, 299):
        tensors = case(T, 33, 2, torch.float32)
        tensors["plan"][:, PlanColumn.GROUP] = -1
        tensors["plan"][index, PlanColumn.GROUP] = 1
        _, state = assert_same(tensors, torch.float32, IMPLEMENTATIONS[name])
        assert state["count"].tolist() == [0, 2, 2]


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
def test_patched_glu_donor_patch_without_a_donor_is_not_counted(name):
    tensors = case(20, 60, 1, torch.float32)
    tensors["plan"][:, PlanColumn.SOURCE] = Source.DONOR
    tensors["plan"][:, [PlanColumn.LO, PlanColumn.HI]] = torch.tensor([0, 60], dtype=torch.int32)
    unpatched = {**tensors, "plan": tensors["plan"].clone()}
    unpatched["plan"][:, PlanColumn.HI] = 0
    attributes = dict(activation="silu", streams=1, layer=0, first_neuron=0)
    implementation = IMPLEMENTATIONS.get(name, lambda *a, **k: reference.patched_glu(*a, *k.values()))
    out, mutated = run(implementation, tensors, **attributes)
    assert torch.equal(mutated["receipt"], tensors["receipt"])
    assert torch.equal(out, run(implementation, unpatched, **attributes)[0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("tensor", ["gate_up", "scale", "rank", "constant", "plan"])
def test_patched_glu_tensors_that_are_not_dense_are_an_error(name, tensor):
    tensors = case(9, 60, 2, torch.float32)
    tensors[tensor] = tensors[tensor].t().contiguous().t()
    with pytest.raises((SnpatchError, RuntimeError), match=tensor):
        run(IMPLEMENTATIONS[name], tensors, activation="silu", streams=2, layer=0, first_neuron=0)


@pytest.mark.parametrize(
    ("column", "value", "intervention"),
    [("ADAPTER_0", -1, 0), ("ADAPTER_1", 3, 0), ("RECIPIENT_STREAM", 2, 0), ("RANKING", 2, 0), ("SOURCE", 3, 0),
     ("CONSTANT_ROW", 2, 0), ("RANKING", 2, 1), ("SOURCE", -1, 1), ("CONSTANT_ROW", 2, 2),
     ("GROUP", 3, 0), ("CAPTURE", 2**30, 0), ("RECEIPT", 4, 0)],
)  # fmt: skip
def test_cpp_plan_index_out_of_range_is_an_error(column, value, intervention):
    tensors = case(9, 60, 2, torch.float32, interventions=3)
    tensors["plan"][4, plan_column(PlanColumn[column], intervention)] = value
    with pytest.raises(RuntimeError, match=f"plan row 4: {column.lower()}: expected .* got {value}$"):
        run(cpp, tensors, activation="silu", streams=2, layer=0, first_neuron=0)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("T", [40, 300])
def test_triton_graph_capture_and_replay_equal_eager(T):
    """A captured step replayed with new inputs and a new plan gives the same bits as a plain call."""
    first, second = (case(T, 688, 2, torch.bfloat16, seed) for seed in (1, 2))
    static = {name: t.cuda() for name, t in first.items()}
    attributes = dict(activation="silu", streams=2, layer=0, first_neuron=0)
    ops.patched_glu(*[t.clone() for t in static.values()], **attributes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.patched_glu(*static.values(), **attributes)
    for name, t in second.items():
        static[name].copy_(t)
    graph.replay()
    fresh = {name: t.cuda() for name, t in second.items()}
    expected = ops.patched_glu(*fresh.values(), **attributes)
    assert torch.equal(out, expected)
    for name in MUTATED:
        assert torch.equal(static[name].nan_to_num(), fresh[name].nan_to_num())
