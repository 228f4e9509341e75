"""fill_plan against plans written out by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from snpatch.op.plan import (
    INT32_MAX,
    NO_END,
    PLAN_COLUMNS_PER_INTERVENTION,
    REQUEST_COLUMNS_PER_INTERVENTION,
    SHARED_COLUMNS,
    PlanColumn,
    Receipt,
    RequestColumn,
    Source,
    fill_plan,
    num_plan_interventions,
    plan_column,
    plan_width,
    request_column,
)

ROOT = Path(__file__).resolve().parent.parent


def entry(**fields) -> list[int]:
    """A request table row; ranges default to empty."""
    row = [0] * len(RequestColumn)
    for name in ("patch", "observe", "capture"):
        start, stop = fields.pop(name, (0, 0))
        row[RequestColumn[f"{name}_start".upper()]], row[RequestColumn[f"{name}_stop".upper()]] = start, stop
    row[RequestColumn.CAPTURE] = fields.pop("capture_row", 0)
    for name, value in fields.items():
        row[RequestColumn[name.upper()]] = value
    return row


def plan(rows: list[list[int]], request: list[int], position: list[int]) -> np.ndarray:
    request, position = (np.array(ints, dtype=np.int64) for ints in (request, position))
    return fill_plan(np.array(rows, dtype=np.int32), request, position)


def column(filled: np.ndarray, name: str) -> list[int]:
    return filled[:, PlanColumn[name.upper()]].tolist()


def test_two_requests_and_padding():
    rows = [
        entry(
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
        entry(
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
    filled = plan(rows, [0, 0, 0, 0, 0, 1, 1, 1, 1, -1], [0, 1, 2, 3, 4, 2, 3, 4, 5, 2])
    assert filled.dtype == np.int32
    assert filled.tolist()[3] == [1, 2, 1, 3, 5, 9, 0, 0, 77, 8, 9, 3, -1, -1, 0]
    assert filled.tolist()[6] == [4, 0, 0, 0, 0, 8, 1, 6, 0, 0, 0, 3, -1, 10, 1]
    assert column(filled, "lo") == [5, 5, 5, 5, 5, 0, 0, 0, 0, 0]
    assert column(filled, "hi") == [5, 5, 9, 9, 5, 8, 8, 8, 8, 0]
    assert column(filled, "receipt") == [0, 0, 0, 0, 0, 1, 1, 1, 1, -1]
    assert column(filled, "group") == [-1, 0, 0, -1, -1, -1, -1, -1, -1, -1]
    assert column(filled, "capture") == [-1, -1, -1, -1, -1, -1, 10, 11, -1, -1]
    assert column(filled, "position") == [0, 1, 2, 3, 4, 2, 3, 4, 5, 2]


@pytest.mark.parametrize("ranges", [{"patch": (0, NO_END)}, {"observe": (0, NO_END)}, {"capture": (0, NO_END)}])
def test_padding_asks_for_nothing(ranges):
    filled = plan([entry(lo=1, hi=9, group=3, receipt=4, capture_row=5, **ranges)], [-1, 0], [0, 0])
    assert filled[0, PlanColumn.LO] == filled[0, PlanColumn.HI]
    assert [column(filled, name)[0] for name in ("group", "capture", "receipt")] == [-1, -1, -1]
    # The same token, when it is real, asks for exactly what its range says.
    asked = {name: column(filled, name)[1] for name in ("hi", "group", "capture", "receipt")}
    wanted = {
        "patch": {"hi": 9, "group": -1, "capture": -1, "receipt": 4},
        "observe": {"hi": 1, "group": 3, "capture": -1, "receipt": 4},
        "capture": {"hi": 1, "group": -1, "capture": 5, "receipt": 4},
    }
    assert asked == wanted[next(iter(ranges))]


@pytest.mark.parametrize(
    ("patch", "wanted"),
    [((0, 4), [1, 1, 1, 1, 0, 0]), ((4, NO_END), [0, 0, 0, 0, 1, 1]), ((0, NO_END), [1] * 6), ((3, 3), [0] * 6)],
    ids=["prompt", "generated", "all", "nothing"],
)
def test_ranges_are_half_open_and_do_not_depend_on_how_a_text_is_cut_into_steps(patch, wanted):
    rows = [entry(hi=1, patch=patch)]
    whole = plan(rows, [0] * 6, [0, 1, 2, 3, 4, 5])
    assert column(whole, "hi") == wanted
    cut = [plan(rows, [0] * len(p), p) for p in ([0, 1, 2], [3], [4, 5])]
    assert np.array_equal(np.concatenate(cut), whole)


def test_rows_follow_their_request_in_any_order_and_an_empty_step_is_empty():
    rows = [entry(adapter_0=i, hi=i, patch=(0, NO_END), receipt=i) for i in range(4)]
    filled = plan(rows, [3, 0, 3, 2], [9, 8, 7, 6])
    assert column(filled, "adapter_0") == [3, 0, 3, 2]
    assert column(filled, "hi") == [3, 0, 3, 2]
    assert column(filled, "receipt") == [3, 0, 3, 2]
    assert plan(rows, [], []).shape == (0, 15)


def test_a_step_of_padding_alone_needs_no_table():
    filled = fill_plan(np.zeros((0, len(RequestColumn)), dtype=np.int32), np.full(3, -1), np.arange(3))
    assert filled.tolist() == [[*[0] * 11, position, -1, -1, -1] for position in range(3)]


def test_what_was_seen_is_patched_again_but_counted_once():
    rows = [entry(lo=1, hi=9, receipt=4, group=3, capture_row=5, computed_stop=2, **dict.fromkeys(
        ("patch", "observe", "capture"), (0, NO_END)))]  # fmt: skip
    filled = plan(rows, [0, 0, 0, 0], [0, 1, 2, 3])
    assert column(filled, "hi") == [9, 9, 9, 9]
    assert column(filled, "receipt") == [4, 4, 4, 4]
    assert column(filled, "group") == [-1, -1, 3, 3]
    assert column(filled, "capture") == [-1, -1, 7, 8]


def test_the_layout_is_pythons_in_cpp_and_triton_and_in_the_request_table():
    """plan.py says it; the two kernels, which cannot import it, repeat it."""
    columns = {column.name: column.value for column in PlanColumn}
    source = (ROOT / "csrc" / "patched_glu.cpp").read_text()

    def enumerated(name: str) -> list[str]:
        return re.search(rf"enum {name} {{ (.*?) }};", source, re.DOTALL)[1].replace(",", " ").split()

    assert {name: value for value, name in enumerate(enumerated("PlanColumn"))} == columns | {
        "COLUMNS": len(PlanColumn)
    }
    assert enumerated("Source") == [f"FROM_{kind.name}" for kind in sorted(Source)]
    found = re.findall(r"^(\w+) = tl\.constexpr\((.+)\)$", (ROOT / "kernels" / "patched_glu.py").read_text(), re.M)
    constants = {name: eval(value) for name, value in found}
    kinds = {kind.name: kind.value for kind in Source if kind is not Source.DONOR}
    receipt = {column.name: column.value for column in Receipt if column is not Receipt.OVERWRITES}
    sizes = {
        "COLUMNS": len(PlanColumn),
        "INT32_MAX": INT32_MAX,
        "COLUMNS_PER_INTERVENTION": PLAN_COLUMNS_PER_INTERVENTION,
        "RECEIPT_COLUMNS": len(Receipt),
    }
    assert constants == columns | kinds | receipt | sizes
    assert enumerated("Receipt") == [*(column.name for column in Receipt), "RECEIPT_COLUMNS"]
    assert [entry.name for entry in RequestColumn if entry < SHARED_COLUMNS] == [
        column.name for column in PlanColumn if column < SHARED_COLUMNS
    ]
    assert [column.value for column in PlanColumn] == list(range(len(PlanColumn)))
    assert [entry.value for entry in RequestColumn] == list(range(len(RequestColumn)))


def test_each_clause_has_its_own_window_and_its_own_place():
    row = [*entry(lo=1, hi=4, ranking=1, patch=(0, 2), receipt=7), *[0] * (2 * REQUEST_COLUMNS_PER_INTERVENTION)]
    for clause, values in ((1, (2, 5, 8, 1, 3, 0, 9, 9, 1, 3)), (2, (0, 6, 7, 2, 0, 5, 1, 1, 4, NO_END))):
        for name, value in zip(
            [e for e in RequestColumn if RequestColumn.RANKING <= e <= RequestColumn.PATCH_STOP], values, strict=True
        ):
            row[request_column(name, clause)] = value
    filled = plan([row], [0] * 6 + [-1], [0, 1, 2, 3, 4, 5, 0])
    assert filled.shape == (7, plan_width(3))
    assert num_plan_interventions(filled.shape[1]) == 3
    his = [filled[:, plan_column(PlanColumn.HI, clause)].tolist() for clause in range(3)]
    assert his == [[4, 4, 1, 1, 1, 1, 0], [5, 8, 8, 5, 5, 5, 0], [6, 6, 6, 6, 7, 7, 0]]
    assert column(filled, "receipt") == [7, 7, 7, 7, 7, 7, -1]
    assert filled[1, plan_column(PlanColumn.RANKING, 1) : plan_column(PlanColumn.SOURCE_WEIGHT, 1) + 1].tolist() == [
        2,
        5,
        8,
        1,
        3,
        0,
        9,
        9,
    ]
    assert filled[6, : PlanColumn.GROUP].tolist() == [0] * PlanColumn.GROUP
    assert not filled[6, len(PlanColumn) :].any()
