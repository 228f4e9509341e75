"""patched_glu against hand-computed numbers and a loop over single elements in double precision."""

import math
import re
import struct

import oracle
import pytest
import torch

from snpatch.errors import SnpatchError
from snpatch.op import ops, reference
from snpatch.op.plan import (
    INT32_MAX,
    NO_END,
    UNRANKED,
    PlanColumn,
    ReceiptColumn,
    RequestColumn,
    Source,
    fill_plan,
    float_bits,
    num_plan_interventions,
    plan_column,
    plan_width,
)

SUMS_ERROR = 2e-6  # relative RMS error of float32 arithmetic against double
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # the output dtype adds its rounding


def _reference(*tensors, activation, streams, layer, first_neuron=0):
    return reference.patched_glu(*tensors, activation, streams, layer, first_neuron)


@pytest.fixture(params=[_reference, ops.patched_glu], ids=["reference", "ops"])
def patched_glu(request):
    return request.param


@pytest.fixture(autouse=True)
def _empty_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


# (self_weight, source_weight): the paper's copy, two mixtures, an addition, a scaling, an amplified source
WEIGHTS = [(0, 1), (0.75, 0.25), (-1, 2), (1, 1), (1.5, 0), (0, 2)]


def plan_row(**fields) -> list[int]:
    row = [0] * len(PlanColumn)
    row[PlanColumn.GROUP] = row[PlanColumn.CAPTURE] = row[PlanColumn.RECEIPT] = -1
    row[PlanColumn.SOURCE_WEIGHT] = float_bits(1)
    for name, value in fields.items():
        row[PlanColumn[name.upper()]] = value
    return row


def receipts(*overwrites: int) -> torch.Tensor:
    """Return receipts with these overwrite counts and only finite values."""
    receipt = torch.zeros(len(overwrites), len(ReceiptColumn), dtype=torch.int64)
    receipt[:, ReceiptColumn.OVERWRITES] = torch.tensor(overwrites)
    return receipt


def is_near(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    actual, expected = actual.double(), expected.double()
    return bool((actual - expected).square().sum().sqrt() <= bound * expected.square().sum().sqrt())


# silu(1) = 0.7310585786, silu(2) = 1.7615941560, silu(-1) = -0.2689414214, silu(0) = 0;
# gelu_tanh(1) = 0.8411919906, gelu_tanh(2) = 1.9545976941, gelu_tanh(-1) = -0.1588080094, gelu_tanh(0) = 0.
# Token 0: adapters 0 <- 1, ranking 0, window [0, 2): neurons 1 and 0. Token 1: adapters 1 <- 0, ranking 1, window
# [1, 2): neuron 1; its donor's gate is 0 everywhere.
HAND = {
    "silu": {
        "out": [
            [3.5231883119, 0.0, -0.5378828427],
            [3.5231883119, 0.0, 0.3655292893],
            [1.4621171573, 0.0, 1.0965878679],
            [0.0, 0.0, 0.0],
        ],
        "stats": [
            [0.731058579, 1.761594156, -0.537882843],
            [0.534446645, 3.10321397, 0.289317953],
            [3.523188312, 0.0, 0.365529289],
            [12.412855881, 0.0, 0.133611661],
            [7.795988447, 3.10321397, 0.81615348],
        ],
        "capture": [1.0965878679, 4.3863514718],
    },
    "gelu_tanh": {
        "out": [
            [3.9091953882, 0.0, -0.3176160188],
            [3.9091953882, 0.0, 0.4205959953],
            [1.6823839812, 0.0, 1.2617879859],
            [0.0, 0.0, 0.0],
        ],
        "stats": [
            [0.841191991, 1.954597694, -0.317616019],
            [0.707603965, 3.820452146, 0.100879935],
            [3.909195388, 0.0, 0.420595995],
            [15.281808583, 0.0, 0.176900991],
            [9.412644847, 3.820452146, 0.544956978],
        ],
        "capture": [1.2617879859, 5.0471519436],
    },
}


@pytest.mark.parametrize("activation", HAND)
def test_patched_glu_two_tokens_match_hand_computed_values(patched_glu, activation):
    hand = HAND[activation]
    gate_up = torch.tensor(
        [
            [1.0, 2.0, -1.0, 1.0, 1.0, 2.0],
            [2.0, 0.0, 1.0, 1.0, 5.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, 2.0, 3.0],
            [0.0, 0.0, 0.0, 7.0, 8.0, 9.0],
        ]
    )
    plan = [
        plan_row(adapter_0=0, adapter_1=1, ranking=0, lo=0, hi=2, group=1, receipt=2),
        plan_row(adapter_0=1, adapter_1=0, ranking=1, lo=1, hi=2, capture=1, receipt=0),
    ]
    stats, count = torch.zeros(2, 5, 3, dtype=torch.float64), torch.tensor([7, 7])
    capture, receipt = torch.full((2, 2), -5.0), receipts(10, 20, 30)
    out = patched_glu(
        gate_up,
        torch.tensor([[1.0, 1.0, 1.0], [2.0, 3.0, 0.5]]),
        torch.tensor([[1, 0, 2], [UNRANKED, 1, 0]], dtype=torch.int32),
        torch.zeros(1, 3),
        torch.tensor(plan, dtype=torch.int32),
        stats,
        count,
        capture,
        receipt,
        activation=activation,
        streams=2,
        layer=0,
    )
    close = {"rtol": 2e-6, "atol": 1e-9}
    torch.testing.assert_close(out, torch.tensor(hand["out"]), **close)
    torch.testing.assert_close(stats[1], torch.tensor(hand["stats"], dtype=torch.float64), **close)
    torch.testing.assert_close(capture[1], torch.tensor(hand["capture"]), **close)
    assert torch.equal(stats[0], torch.zeros(5, 3, dtype=torch.float64))
    assert count.tolist() == [7, 8]
    assert capture[0].tolist() == [-5.0, -5.0]
    assert torch.equal(receipt, receipts(11, 20, 32))


TENSORS = "gate_up scale rank constant plan stats count capture receipt".split()
SETTING = {"activation": "silu", "streams": 2, "layer": 3, "first_neuron": 40}


def make_case(
    tokens: int, width: int, streams: int = 2, dtype=torch.float32, seed: int = 0, interventions: int = 1
) -> dict[str, torch.Tensor]:
    """Build random arguments that use every feature.

    3 adapters, 3 rankings (one covers half the neurons), 3 constants, empty, full and partial windows, all sources,
    repeated groups, captures and receipts. Tensors that are added to do not start at 0.
    """
    draw = torch.Generator().manual_seed(seed)

    def integers(high: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, (tokens,), generator=draw)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    rank = torch.stack([torch.randperm(width, generator=draw) for _ in range(3)])
    rank[1] += torch.randint(0, 50, (), generator=draw)  # ranks of another layer's neurons are missing
    rank[2, torch.rand(width, generator=draw) < 0.5] = UNRANKED
    plan = torch.zeros(tokens, plan_width(interventions), dtype=torch.int64)
    for name, high in (("adapter_0", 3), ("adapter_1", 3), ("recipient_stream", streams), ("position", 9)):
        plan[:, PlanColumn[name.upper()]] = integers(high)
    weights = torch.tensor([[float_bits(weight) for weight in pair] for pair in WEIGHTS])
    for i in range(interventions):
        lo = integers(width)
        values = {
            PlanColumn.RANKING: integers(3),
            PlanColumn.SOURCE: integers(3, low=2 - streams),
            PlanColumn.CONSTANT_ROW: integers(3),
            PlanColumn.SEED: torch.tensor([0, 1, 2**31 - 1])[integers(3)],
            PlanColumn.LO: lo,
            PlanColumn.HI: torch.stack([lo, lo + integers(width), torch.full_like(lo, UNRANKED)])[
                integers(3), range(tokens)
            ],
        }
        for column, value in values.items():
            plan[:, plan_column(column, i)] = value
        columns = [plan_column(column, i) for column in (PlanColumn.SELF_WEIGHT, PlanColumn.SOURCE_WEIGHT)]
        plan[:, columns] = weights[integers(len(WEIGHTS))]
    plan[:, PlanColumn.GROUP] = integers(2, low=-1)
    plan[:, PlanColumn.CAPTURE] = torch.where(integers(2) > 0, torch.arange(tokens), -1)
    plan[:, PlanColumn.RECEIPT] = integers(3, low=-1)
    return {
        "gate_up": real(streams * tokens, 2 * width).to(dtype),
        "scale": torch.cat([torch.ones(1, width), 1 + 0.5 * real(2, width)]),
        "rank": rank.int(),
        "constant": torch.cat([torch.zeros(1, width), real(2, width).abs()]),
        "plan": plan.int(),
        "stats": real(2, 5, width).double(),
        "count": torch.tensor([5, 6]),
        "capture": torch.full((tokens, 4), -9.0),
        "receipt": receipts(100, 200, 300),
    }


def compute_by_loop(tensors: dict[str, torch.Tensor], setting: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute patched_glu element by element in Python floats; the arguments are not changed."""
    act = {
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[setting["activation"]]
    streams, width = setting["streams"], tensors["scale"].shape[1]
    gate_up, scale, rank, constant = (tensors[name].double().tolist() for name in TENSORS[:4])
    after = {name: tensors[name].clone() for name in TENSORS[5:]}
    out = torch.zeros(len(gate_up), width, dtype=torch.float64)
    for token, row in enumerate(tensors["plan"].tolist()):
        for neuron in range(width):
            values = []
            for stream in range(streams):
                line = gate_up[token * streams + stream]
                adapter = row[PlanColumn.ADAPTER_1 if stream else PlanColumn.ADAPTER_0]
                values.append(act(line[neuron]) * line[width + neuron] * scale[adapter][neuron])
            stream = row[PlanColumn.RECIPIENT_STREAM]
            r, d = values[stream], values[streams - 1 - stream]
            if row[PlanColumn.GROUP] >= 0:
                sums = [r, r * r] if streams == 1 else [r, r * r, d, d * d, (r - d) ** 2]
                for index, value in enumerate(sums):
                    after["stats"][row[PlanColumn.GROUP], index, neuron] += value
            neuron_rank = int(rank[row[PlanColumn.RANKING]][neuron])
            if row[PlanColumn.CAPTURE] >= 0 and neuron_rank < after["capture"].shape[1]:
                after["capture"][row[PlanColumn.CAPTURE], neuron_rank] = r
            for i in range(num_plan_interventions(len(row))):
                block = {
                    column: row[plan_column(column, i)]
                    for column in PlanColumn
                    if PlanColumn.RANKING <= column <= PlanColumn.SOURCE_WEIGHT
                }
                if not block[PlanColumn.LO] <= int(rank[block[PlanColumn.RANKING]][neuron]) < block[PlanColumn.HI]:
                    continue
                value = constant[block[PlanColumn.CONSTANT_ROW]][neuron]
                location = setting["layer"], setting["first_neuron"] + neuron
                source = {
                    Source.DONOR: lambda d=d: d,
                    Source.CONSTANT: lambda value=value: value,
                    Source.NOISE: lambda value=value, block=block, row=row, location=location: (
                        value * oracle.normal(block[PlanColumn.SEED], row[PlanColumn.POSITION], *location)
                    ),
                }[block[PlanColumn.SOURCE]]()
                self_weight, source_weight = (
                    struct.unpack("f", struct.pack("i", block[c]))[0]
                    for c in (PlanColumn.SELF_WEIGHT, PlanColumn.SOURCE_WEIGHT)
                )
                values[stream] = self_weight * values[stream] + source_weight * source
                if row[PlanColumn.RECEIPT] >= 0:
                    after["receipt"][row[PlanColumn.RECEIPT], ReceiptColumn.OVERWRITES] += 1
            for stream, value in enumerate(values):
                out[token * streams + stream, neuron] = value
        after["count"][row[PlanColumn.GROUP]] += int(row[PlanColumn.GROUP] >= 0)
    return out, after


def run(patched_glu, tensors: dict[str, torch.Tensor], setting: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run the op on copies; return its output and the mutable arguments afterwards."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    out = patched_glu(*copies.values(), **setting)
    assert all(torch.equal(copies[name], tensors[name]) for name in TENSORS[1:5]), "an input was changed"
    return out, {name: copies[name] for name in TENSORS[5:]}


def assert_equals_loop(patched_glu, tensors, setting, out_error=ROUNDING[torch.float32]):
    out, after = run(patched_glu, tensors, setting)
    expected_out, expected = compute_by_loop(tensors, setting)
    assert out.dtype == tensors["gate_up"].dtype
    assert out.shape == expected_out.shape
    assert is_near(out, expected_out, out_error)
    assert is_near(after["stats"], expected["stats"], SUMS_ERROR)
    assert is_near(after["capture"], expected["capture"], SUMS_ERROR)
    assert torch.equal(after["count"], expected["count"])
    assert torch.equal(after["receipt"], expected["receipt"])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("tokens", "width"), [(0, 63), (1, 1), (1, 129), (63, 1), (5, 63), (63, 129)])
def test_patched_glu_equals_a_loop_in_double(patched_glu, tokens, width, streams):
    activation = "gelu_tanh" if width == 63 else "silu"
    setting = {**SETTING, "streams": streams, "activation": activation}
    for interventions in (1, 3):
        assert_equals_loop(patched_glu, make_case(tokens, width, streams, interventions=interventions), setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", HAND)
def test_patched_glu_half_precision_is_rounded_once_at_the_end(patched_glu, dtype, activation):
    assert_equals_loop(
        patched_glu, make_case(9, 33, dtype=dtype), {**SETTING, "activation": activation}, ROUNDING[dtype]
    )


def test_patched_glu_full_window_copies_the_donor_and_empty_window_changes_nothing(patched_glu):
    tensors = make_case(9, 33)
    tensors["plan"][:, PlanColumn.SOURCE] = Source.DONOR
    tensors["plan"][:, PlanColumn.RANKING] = 0
    tensors["plan"][:, PlanColumn.RECEIPT] = 0
    tensors["plan"][:, PlanColumn.LO], tensors["plan"][:, PlanColumn.HI] = 0, UNRANKED
    tensors["plan"][:, PlanColumn.SELF_WEIGHT], tensors["plan"][:, PlanColumn.SOURCE_WEIGHT] = 0, float_bits(1)
    full_out, after = run(patched_glu, tensors, SETTING)
    assert torch.equal(full_out[0::2], full_out[1::2])
    assert torch.equal(after["receipt"], receipts(100 + 9 * 33, 200, 300))
    tensors["plan"][:, PlanColumn.HI] = 0
    empty_out, after = run(patched_glu, tensors, SETTING)
    single = tensors["plan"].clone()
    stream = single[:, PlanColumn.RECIPIENT_STREAM].long()
    recipient_rows, donor_rows = 2 * torch.arange(9) + stream, 2 * torch.arange(9) + 1 - stream
    single[:, PlanColumn.SOURCE] = Source.CONSTANT
    single[:, PlanColumn.ADAPTER_0] = single[range(9), PlanColumn.ADAPTER_0 + stream]
    single[:, PlanColumn.RECIPIENT_STREAM] = 0
    unpatched, _ = run(
        patched_glu,
        {**tensors, "gate_up": tensors["gate_up"][recipient_rows], "plan": single},
        {**SETTING, "streams": 1},
    )
    assert torch.equal(empty_out[recipient_rows], unpatched)
    assert torch.equal(empty_out[donor_rows], full_out[donor_rows])
    assert torch.equal(after["receipt"], receipts(100, 200, 300))


# float32 constants that overflow in the dtype of the activations.
OVERFLOWS = {torch.float16: 1.2e5, torch.bfloat16: 3.4e38, torch.float32: math.inf}


@pytest.mark.parametrize("dtype", OVERFLOWS, ids=str)
def test_receipt_nonfinite_values_of_both_streams_are_counted_with_their_first_layer(patched_glu, dtype):
    tensors = make_case(5, 21)
    tensors["gate_up"] = tensors["gate_up"].clamp(-2, 2).to(dtype)
    tensors["plan"][:, [PlanColumn.GROUP, PlanColumn.CAPTURE]] = -1
    tensors["plan"][:, [PlanColumn.RANKING, PlanColumn.LO]] = 0
    tensors["plan"][:, PlanColumn.HI] = torch.tensor([0, 4, 4, 4, 4], dtype=torch.int32)
    tensors["plan"][:, PlanColumn.SOURCE], tensors["plan"][:, PlanColumn.CONSTANT_ROW] = Source.CONSTANT, 1
    tensors["plan"][:, PlanColumn.SELF_WEIGHT], tensors["plan"][:, PlanColumn.SOURCE_WEIGHT] = 0, float_bits(1)
    tensors["plan"][:, PlanColumn.RECEIPT] = torch.tensor([0, 1, 1, 2, -1])
    tensors["rank"][0] = torch.arange(21)
    tensors["constant"][1] = OVERFLOWS[dtype]
    stream = int(tensors["plan"][3, PlanColumn.RECIPIENT_STREAM])
    tensors["gate_up"][2 * 3 + 1 - stream, 0] = torch.nan  # one more neuron, of token 3's donor
    tensors["receipt"][2, ReceiptColumn.NONFINITE], tensors["receipt"][2, ReceiptColumn.LAYER] = 7, INT32_MAX - 3
    _, after = run(patched_glu, tensors, {**SETTING, "layer": 5})
    assert after["receipt"].tolist() == [[100, 0, 0], [200 + 8, 8, INT32_MAX - 5], [300 + 4, 7 + 4 + 1, INT32_MAX - 3]]
    tensors["constant"][1] = torch.finfo(dtype).max
    tensors["gate_up"].nan_to_num_(0)
    _, after = run(patched_glu, tensors, {**SETTING, "layer": 1})
    assert after["receipt"].tolist() == [[100, 0, 0], [200 + 8, 0, 0], [300 + 4, 7, INT32_MAX - 3]]


def test_patched_glu_unranked_neurons_are_never_patched(patched_glu):
    tensors = make_case(4, 17)
    tensors["rank"][:] = UNRANKED
    tensors["plan"][:, [PlanColumn.LO, PlanColumn.RECEIPT]] = 0
    tensors["plan"][:, PlanColumn.HI] = UNRANKED
    out, after = run(patched_glu, tensors, SETTING)
    tensors["plan"][:, PlanColumn.HI] = 0
    assert torch.equal(out, run(patched_glu, tensors, SETTING)[0])
    assert torch.equal(after["receipt"], receipts(100, 200, 300))
    assert after["capture"].eq(-9).all()


@pytest.mark.parametrize("streams", [1, 2])
def test_patched_glu_nan_in_padded_rows_changes_nothing(patched_glu, streams):
    """With fill_plan's padding, rows of NaN and infinity between real rows have no effect."""
    tensors = make_case(6, 21, streams)
    table = torch.zeros(1, len(RequestColumn), dtype=torch.int32)
    for name, value in {
        "adapter_1": 1,
        "hi": 9,
        "source": 2 - streams,
        "constant_row": 1,
        "source_weight": float_bits(1),
        "patch_stop": NO_END,
    }.items():
        table[0, RequestColumn[name.upper()]] = value
    table[0, RequestColumn.OBSERVE_STOP] = table[0, RequestColumn.CAPTURE_STOP] = NO_END
    request = torch.tensor([0, -1, 0, 0, -1, -1])
    position = torch.tensor([0, 0, 1, 2, 0, 5])
    is_token = request >= 0
    rows = is_token.repeat_interleave(streams)
    tensors["plan"] = torch.from_numpy(fill_plan(table.numpy(), request.numpy(), position.numpy()))
    tensors["gate_up"][~rows] = torch.tensor([math.nan, math.inf, -math.inf] * 14)
    setting = {**SETTING, "streams": streams}
    out, after = run(patched_glu, tensors, setting)
    unpadded = {**tensors, "plan": tensors["plan"][is_token], "gate_up": tensors["gate_up"][rows]}
    expected_out, expected = run(patched_glu, unpadded, setting)
    assert torch.equal(out[rows], expected_out)
    assert torch.isfinite(expected_out).all()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert torch.equal(after["receipt"], receipts(100 + 3 * 9, 200, 300))
    assert after["count"].tolist() == [5 + 3, 6]


def test_statistics_of_a_split_step_equal_the_whole_steps(patched_glu):
    tensors = make_case(30, 19)
    _, expected = run(patched_glu, tensors, SETTING)
    first = {**tensors, "gate_up": tensors["gate_up"][:22], "plan": tensors["plan"][:11]}
    _, between = run(patched_glu, first, SETTING)
    second = {**tensors, **between, "gate_up": tensors["gate_up"][22:], "plan": tensors["plan"][11:]}
    _, parts = run(patched_glu, second, SETTING)
    assert is_near(parts["stats"], expected["stats"], SUMS_ERROR)
    assert all(torch.equal(parts[name], expected[name]) for name in ("count", "capture", "receipt"))


def test_statistics_do_not_drift_as_float32_would(patched_glu):
    """A token of value 1 is added to a sum of 2^27, where the next float32 is 16 away."""
    tensors = make_case(1, 1)
    tensors["plan"][0] = torch.tensor(plan_row(group=0))
    tensors["stats"][:] = 2.0**27
    tensors["gate_up"][:] = torch.tensor([10.0, 0.1])
    tensors["scale"][:] = 1
    _, after = run(patched_glu, tensors, SETTING)
    assert after["stats"][0, 0, 0] - 2.0**27 == pytest.approx(1 / (1 + math.exp(-10)), rel=1e-6)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_oracle_philox_gives_the_published_vectors(counter, key, words):
    """Source: kat_vectors of Random123, philox4x32 with 10 rounds."""
    assert " ".join(f"{word:08x}" for word in oracle.philox(counter, key)) == words


def generate_noise(patched_glu, width: int, tokens: int, seed: int, layer: int, first_neuron: int = 0) -> torch.Tensor:
    """Return the op's standard normal numbers [tokens, width]: recipient values 0, standard deviation 1."""
    row = plan_row(hi=UNRANKED, source=Source.NOISE, constant_row=1, seed=seed, self_weight=float_bits(1))
    plan = torch.tensor([row] * tokens, dtype=torch.int32).view(tokens, len(PlanColumn))
    plan[:, PlanColumn.POSITION] = torch.arange(tokens)
    return patched_glu(
        torch.zeros(tokens, 2 * width),
        torch.ones(1, width),
        torch.zeros(1, width, dtype=torch.int32),
        torch.stack([torch.zeros(width), torch.ones(width)]),
        plan,
        torch.zeros(0, 5, width, dtype=torch.float64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 0),
        torch.zeros(0, len(ReceiptColumn), dtype=torch.int64),
        activation="silu",
        streams=1,
        layer=layer,
        first_neuron=first_neuron,
    )


@pytest.mark.parametrize(("seed", "layer", "first"), [(0, 0, 0), (2**31 - 1, 31, 5504), (12345, 5, 100)])
def test_noise_is_philox_keyed_by_seed_position_layer_and_neuron(patched_glu, seed, layer, first):
    noise = generate_noise(patched_glu, 20, 3, seed, layer, first)
    expected = [[oracle.normal(seed, position, layer, first + n) for n in range(20)] for position in range(3)]
    torch.testing.assert_close(noise.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6)


def test_noise_is_standard_normal(patched_glu):
    noise = generate_noise(patched_glu, 1000, 200, seed=7, layer=2).double()
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert (noise.std() - 1).abs() < 4 / math.sqrt(2 * noise.numel())
    assert (noise**3).mean().abs() < 4 * math.sqrt(15 / noise.numel())
    assert ((noise**4).mean() - 3).abs() < 4 * math.sqrt(96 / noise.numel())
    assert torch.corrcoef(noise[:2])[0, 1].abs() < 4 / math.sqrt(1000)
    assert torch.corrcoef(noise.T[:2])[0, 1].abs() < 4 / math.sqrt(200)


@pytest.mark.parametrize("streams", [1, 2])
def test_patched_glu_passes_opcheck(streams):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs on uninitialized memory
    tensors = make_case(5, 7, streams)
    arguments = (*tensors.values(), "silu", streams, 0, 0)
    torch.library.opcheck(torch.ops.snpatch.patched_glu.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_glu_on_meta_tensors_gives_shape_and_dtype(dtype):
    tensors = {name: tensor.to("meta") for name, tensor in make_case(6, 10, dtype=dtype).items()}
    out = ops.patched_glu(*tensors.values(), **SETTING)
    assert (out.device.type, tuple(out.shape), out.dtype) == ("meta", (12, 10), dtype)


def test_patched_glu_compiled_equals_eager(compilation):
    """Mutations of four arguments survive functionalization."""
    tensors = make_case(9, 33)
    expected_out, expected = run(ops.patched_glu, tensors, SETTING)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*arguments):
        return ops.patched_glu(*arguments, **SETTING) + 0.0

    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    assert torch.equal(step(*copies.values()), expected_out)
    assert all(torch.equal(copies[name], expected[name]) for name in expected)


ERRORS = (SnpatchError, RuntimeError)  # C++ cannot raise SnpatchError
INVALID = {
    "gate_up": lambda t: t[1:],
    "scale": lambda t: t[:, 1:],
    "rank": lambda t: t.long(),
    "constant": lambda t: t.double(),
    "plan": lambda t: t[:, 1:],
    "stats": lambda t: t.float(),
    "count": lambda t: t[1:],
    "capture": lambda t: t[0],
    "receipt": lambda t: t.int(),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", INVALID)
def test_patched_glu_invalid_tensor_is_named(name, device):
    tensors = {key: tensor.to(device) for key, tensor in make_case(4, 6).items()}
    tensors[name] = INVALID[name](tensors[name])
    shape = re.escape(str([*tensors[name].shape]))
    with pytest.raises(ERRORS, match=rf"patched_glu: {name}: expected .*got {shape}"):
        ops.patched_glu(*tensors.values(), **SETTING)


@pytest.mark.parametrize(("name", "value"), [("activation", "relu"), ("streams", 3), ("streams", 0)])
def test_patched_glu_invalid_setting_is_named(name, value):
    tensors = make_case(4, 6)
    if name == "streams":
        tensors["gate_up"] = torch.zeros(4 * value, 12)
    with pytest.raises(ERRORS, match=f"{name}: expected .*{value}"):
        ops.patched_glu(*tensors.values(), **{**SETTING, name: value})
