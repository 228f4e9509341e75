"""Filling the plan of a decode step and of a step of chunked prefill; part of `make bench-generate`."""

import numpy as np
import pytest
import torch

from snpatch.executors.vllm.engine_settings import DualStreamSettings
from snpatch.executors.vllm.worker.op_tables import OpTables
from snpatch.executors.vllm.worker.request_tracker import RequestTracker
from snpatch.executors.vllm.worker.step_planner import StepPlanner
from snpatch.op.plan import NO_END, PlanColumn, RequestColumn


@pytest.mark.parametrize(("requests", "tokens"), [(32, 1), (256, 1), (256, 16)])
def test_fill(benchmark, requests, tokens):
    tracker = RequestTracker(OpTables(DualStreamSettings(), 1, 0, 8, None, 8192, torch.device("cpu")))
    planner = StepPlanner(tracker)
    ids = [f"snpatch-{i}-0123abcd" for i in range(requests)]
    for number, request_id in enumerate(ids):
        row = [0] * len(RequestColumn)
        row[RequestColumn.GROUP] = -1
        row[RequestColumn.LO], row[RequestColumn.HI], row[RequestColumn.PATCH_STOP] = number, number + 1000, NO_END
        tracker.add(request_id, {"snpatch": [number, *row]})
    start, count = np.full(requests, 7), np.full(requests, tokens)
    planner.plan_step(ids, start, count)
    assert tracker.tables.plan[requests * tokens - 1, PlanColumn.HI].item() == requests - 1 + 1000
    benchmark.pedantic(planner.plan_step, args=(ids, start, count), rounds=500, iterations=5, warmup_rounds=20)
    benchmark.extra_info.update(side="plan", requests=requests, tokens=requests * tokens)
