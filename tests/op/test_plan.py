"""fill_plan against plans written out by hand, and the plan's layout in Python, C++ and Triton."""

import re
from pathlib import Path

import numpy as np
import pytest

from snpatch import SnpatchError
from snpatch.op.plan import (
    INT32_MAX,
    NO_END,
    PLAN_COLUMNS_PER_INTERVENTION,
    REQUEST_COLUMNS_PER_INTERVENTION,
    SHARED_COLUMNS,
    PlanColumn,
    ReceiptColumn,
    RequestColumn,
    RequestRow,
    Source,
    fill_plan,
    num_plan_interventions,
    plan_column,
    plan_width,
    request_column,
    request_width,
)

ROOT = Path(__file__).resolve().parents[2]


def request_row(**fields) -> list[int]:
    """Return a row of the request table; ranges are empty by default."""
    row = [0] * len(RequestColumn)
    for name in ("patch", "observe", "capture"):
        start, stop = fields.pop(name, (0, 0))
        row[RequestColumn[f"{name}_start".upper()]], row[RequestColumn[f"{name}_stop".upper()]] = start, stop
    row[RequestColumn.CAPTURE] = fields.pop("capture_row", 0)
    for name, value in fields.items():
        row[RequestColumn[name.upper()]] = value
    return row


def build_plan(rows: list[list[int]], request: list[int], position: list[int]) -> np.ndarray:
    request, position = (np.array(integers, dtype=np.int64) for integers in (request, position))
    return fill_plan(np.array(rows, dtype=np.int32), request, position)


def column(plan: np.ndarray, name: str) -> list[int]:
    return plan[:, PlanColumn[name.upper()]].tolist()


def test_fill_plan_two_requests_and_padding_match_hand_computed_rows():
    rows = [
        request_row(
            adapter_0=1,
            adapter_1=2,
            recipient_stream=1,
            self_weight=8,
            source_weight=9,
            ranking=3,
            lo=5,
            hi=9,
            seed=77,
            patch=(2, 4),
            group=0,
            observe=(1, 3),
            receipt=0,
        ),
        request_row(
            adapter_0=4,
            source=1,
            constant_row=6,
            hi=8,
            patch=(0, NO_END),
            capture=(3, 5),
            capture_row=10,
            receipt=1,
            group=2,
        ),
    ]
    plan = build_plan(rows, [0, 0, 0, 0, 0, 1, 1, 1, 1, -1], [0, 1, 2, 3, 4, 2, 3, 4, 5, 2])
    assert plan.dtype == np.int32
    assert plan.tolist()[3] == [1, 2, 1, 3, 5, 9, 0, 0, 77, 8, 9, 3, -1, -1, 0]
    assert plan.tolist()[6] == [4, 0, 0, 0, 0, 8, 1, 6, 0, 0, 0, 3, -1, 10, 1]
    assert column(plan, "lo") == [5, 5, 5, 5, 5, 0, 0, 0, 0, 0]
    assert column(plan, "hi") == [5, 5, 9, 9, 5, 8, 8, 8, 8, 0]
    assert column(plan, "receipt") == [0, 0, 0, 0, 0, 1, 1, 1, 1, -1]
    assert column(plan, "group") == [-1, 0, 0, -1, -1, -1, -1, -1, -1, -1]
    assert column(plan, "capture") == [-1, -1, -1, -1, -1, -1, 10, 11, -1, -1]
    assert column(plan, "position") == [0, 1, 2, 3, 4, 2, 3, 4, 5, 2]


@pytest.mark.parametrize("ranges", [{"patch": (0, NO_END)}, {"observe": (0, NO_END)}, {"capture": (0, NO_END)}])
def test_fill_plan_padding_requests_nothing(ranges):
    plan = build_plan([request_row(lo=1, hi=9, group=3, receipt=4, capture_row=5, **ranges)], [-1, 0], [0, 0])
    assert plan[0, PlanColumn.LO] == plan[0, PlanColumn.HI]
    assert [column(plan, name)[0] for name in ("group", "capture", "receipt")] == [-1, -1, -1]
    # As a real token, the same row requests exactly what its range says.
    requested = {name: column(plan, name)[1] for name in ("hi", "group", "capture", "receipt")}
    expected = {
        "patch": {"hi": 9, "group": -1, "capture": -1, "receipt": 4},
        "observe": {"hi": 1, "group": 3, "capture": -1, "receipt": 4},
        "capture": {"hi": 1, "group": -1, "capture": 5, "receipt": 4},
    }
    assert requested == expected[next(iter(ranges))]


@pytest.mark.parametrize(
    ("patch", "expected"),
    [((0, 4), [1, 1, 1, 1, 0, 0]), ((4, NO_END), [0, 0, 0, 0, 1, 1]), ((0, NO_END), [1] * 6), ((3, 3), [0] * 6)],
    ids=["prompt", "completion", "all", "nothing"],
)
def test_fill_plan_ranges_are_half_open_and_independent_of_steps(patch, expected):
    rows = [request_row(hi=1, patch=patch)]
    plan = build_plan(rows, [0] * 6, [0, 1, 2, 3, 4, 5])
    assert column(plan, "hi") == expected
    chunks = [build_plan(rows, [0] * len(p), p) for p in ([0, 1, 2], [3], [4, 5])]
    assert np.array_equal(np.concatenate(chunks), plan)


def test_fill_plan_rows_follow_their_request_in_any_order():
    rows = [request_row(adapter_0=i, hi=i, patch=(0, NO_END), receipt=i) for i in range(4)]
    plan = build_plan(rows, [3, 0, 3, 2], [9, 8, 7, 6])
    assert column(plan, "adapter_0") == [3, 0, 3, 2]
    assert column(plan, "hi") == [3, 0, 3, 2]
    assert column(plan, "receipt") == [3, 0, 3, 2]
    assert build_plan(rows, [], []).shape == (0, 15)


def test_fill_plan_padding_alone_needs_no_table():
    plan = fill_plan(np.zeros((0, len(RequestColumn)), dtype=np.int32), np.full(3, -1), np.arange(3))
    assert plan.tolist() == [[*[0] * 11, position, -1, -1, -1] for position in range(3)]


def test_fill_plan_recomputed_positions_are_patched_again_but_counted_once():
    ranges = dict.fromkeys(("patch", "observe", "capture"), (0, NO_END))
    rows = [request_row(lo=1, hi=9, receipt=4, group=3, capture_row=5, computed_stop=2, **ranges)]
    plan = build_plan(rows, [0, 0, 0, 0], [0, 1, 2, 3])
    assert column(plan, "hi") == [9, 9, 9, 9]
    assert column(plan, "receipt") == [4, 4, 4, 4]
    assert column(plan, "group") == [-1, -1, 3, 3]
    assert column(plan, "capture") == [-1, -1, 7, 8]


def test_plan_layout_is_equal_in_python_cpp_triton_and_the_request_table():
    """plan.py defines the layout; the two kernels, which cannot import it, repeat it."""
    columns = {column.name: column.value for column in PlanColumn}
    source = (ROOT / "csrc" / "patched_glu.cpp").read_text()

    def enumerators(name: str) -> list[str]:
        return re.search(rf"enum {name} {{ (.*?) }};", source, re.DOTALL)[1].replace(",", " ").split()

    cpp_columns = {name: value for value, name in enumerate(enumerators("PlanColumn"))}
    assert cpp_columns == columns | {"COLUMNS": len(PlanColumn)}
    assert enumerators("Source") == [f"FROM_{kind.name}" for kind in sorted(Source)]
    triton_source = (ROOT / "kernels" / "patched_glu.py").read_text()
    triton_constants = {
        name: eval(value) for name, value in re.findall(r"^(\w+) = tl\.constexpr\((.+)\)$", triton_source, re.M)
    }
    sources = {kind.name: kind.value for kind in Source if kind is not Source.DONOR}
    receipt = {column.name: column.value for column in ReceiptColumn if column is not ReceiptColumn.OVERWRITES}
    sizes = {
        "COLUMNS": len(PlanColumn),
        "INT32_MAX": INT32_MAX,
        "COLUMNS_PER_INTERVENTION": PLAN_COLUMNS_PER_INTERVENTION,
        "RECEIPT_COLUMNS": len(ReceiptColumn),
    }
    assert triton_constants == columns | sources | receipt | sizes
    assert enumerators("ReceiptColumn") == [*(column.name for column in ReceiptColumn), "RECEIPT_COLUMNS"]
    shared = [[column.name for column in kind if column < SHARED_COLUMNS] for kind in (RequestColumn, PlanColumn)]
    assert shared[0] == shared[1]
    assert [column.value for column in PlanColumn] == list(range(len(PlanColumn)))
    assert [column.value for column in RequestColumn] == list(range(len(RequestColumn)))


def test_fill_plan_each_intervention_has_its_own_window_and_range():
    row = [
        *request_row(lo=1, hi=4, ranking=1, patch=(0, 2), receipt=7),
        *[0] * (2 * REQUEST_COLUMNS_PER_INTERVENTION),
    ]
    block = [c for c in RequestColumn if RequestColumn.RANKING <= c <= RequestColumn.PATCH_STOP]
    for i, values in ((1, (2, 5, 8, 1, 3, 0, 9, 9, 1, 3)), (2, (0, 6, 7, 2, 0, 5, 1, 1, 4, NO_END))):
        for name, value in zip(block, values, strict=True):
            row[request_column(name, i)] = value
    plan = build_plan([row], [0] * 6 + [-1], [0, 1, 2, 3, 4, 5, 0])
    assert plan.shape == (7, plan_width(3))
    assert num_plan_interventions(plan.shape[1]) == 3
    his = [plan[:, plan_column(PlanColumn.HI, i)].tolist() for i in range(3)]
    assert his == [[4, 4, 1, 1, 1, 1, 0], [5, 8, 8, 5, 5, 5, 0], [6, 6, 6, 6, 7, 7, 0]]
    assert column(plan, "receipt") == [7, 7, 7, 7, 7, 7, -1]
    first, last = plan_column(PlanColumn.RANKING, 1), plan_column(PlanColumn.SOURCE_WEIGHT, 1)
    assert plan[1, first : last + 1].tolist() == [2, 5, 8, 1, 3, 0, 9, 9]
    assert plan[6, : PlanColumn.GROUP].tolist() == [0] * PlanColumn.GROUP
    assert not plan[6, len(PlanColumn) :].any()


@pytest.mark.parametrize("num_interventions", [1, 3])
def test_request_row_pack_and_unpack_round_trip(num_interventions):
    width = request_width(num_interventions)
    row = RequestRow(2**40, [INT32_MAX, -1, Source.NOISE, *range(width - 3)])
    packed = row.pack()
    assert all(type(value) is int for value in packed)
    restored = RequestRow.unpack(packed, width)
    assert restored.ticket == row.ticket
    assert restored.columns.dtype == np.int32
    assert restored.columns.tolist() == row.columns


def test_request_row_of_another_width_is_an_error():
    with pytest.raises(SnpatchError, match="request row: expected 22 integers, got 3"):
        RequestRow.unpack([1, 2, 3], request_width(1))
