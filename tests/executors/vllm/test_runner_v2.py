"""ModelState for Model Runner V2, compared with Model Runner V1.

Model Runner V2 needs a GPU, but it uses the model only through a ModelState. Here an engine runs Model Runner V1 and
records every scheduler output. The ModelState then runs the same schedule with vLLM's own request and batch objects, as
V2 would, and must make the same plans and records.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from jobs import IDS, RANKINGS, Job

from snpatch import Engine, Sampling
from snpatch.executors.base import Capture, Observation, Request
from snpatch.op.plan import PlanColumn, RequestColumn
from snpatch.ranking.contrast_statistics import Statistics

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(zoo):
    tiny_model = zoo("llama")
    options = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 40, "max_num_seqs": 32, "block_size": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
        with Engine(tiny_model.folder, adapters, backend="vllm", enforce_eager=True, **options) as engine:
            yield engine


def get_runner(engine):
    return engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def log(engine):
    """Model Runner V1's steps in a run with chunked prefill, preemptions and aborts, and its records at the end.

    Each step has the scheduler's output, the start positions and the plan by (request, position).
    """
    runner, steps = get_runner(engine), []
    dual_stream = runner.model.snpatch
    tracker, planner, tables = dual_stream.tracker, dual_stream.planner, dual_stream.tables
    real_update, real_step, real_fetch = runner._update_states, planner.plan_step, tracker.fetch
    records = {}

    def update(scheduler_output):
        states = {i: list(r.prompt_token_ids) + list(r.output_token_ids) for i, r in runner.requests.items()}
        steps.append(SimpleNamespace(output=copy.deepcopy(scheduler_output), states=states, plan=None))
        return real_update(scheduler_output)

    def step(request_ids, start, count):
        real_step(request_ids, start, count)
        steps[-1].start = dict(zip(request_ids, start.tolist(), strict=True))
        steps[-1].plan = by_position(tables, request_ids, start, count)

    def fetch(tickets):
        records_by_id = [(i, tracker._records[i]) for ticket in tickets for i in tracker._tickets.get(ticket, ())]
        fetched = real_fetch(tickets)
        records.update({i: record_fields(record) for i, record in records_by_id})
        return fetched

    runner._update_states, planner.plan_step, tracker.fetch = update, step, fetch
    jobs = [Job(i % 8, "sft" if i % 3 else "base", "dpo", (i, 29 + i), ("all", "prompt", "completion")[i % 3])
            for i in range(20)]  # fmt: skip
    long_prompt = [*IDS[3], *range(10, 90)]
    make, pair = engine.requests, ("sft", "dpo")
    statistics = [Statistics.zeros(tiny.LAYERS, tiny.NEURONS) for _ in range(2)]
    writing = Sampling(max_tokens=40, ignore_eos=True)
    requests = [make.patched(j.ids, j.patch, sampling=writing) for j in jobs]
    requests += [make.observing(long_prompt, pair, Observation(s, 3, 70)) for s in statistics]
    requests += [make.observing(ids, pair, Observation(statistics[0], 2, 99), sampling=writing) for ids in IDS]
    requests += [Request(long_prompt, make.model("dpo"), capture=Capture(RANKINGS[0], 50, 60, 65))]
    requests += [make.patched(ids, name, sampling=Sampling(max_tokens=9)) for ids in IDS for name in ("base", "sft")]
    engine.execute(requests)
    del runner._update_states
    planner.plan_step, tracker.fetch = real_step, real_fetch
    return SimpleNamespace(steps=steps, records=records)


def by_position(tables, request_ids, start, count) -> dict:
    rows = tables.plan.tolist()
    places = [(i, s + n) for i, s, c in zip(request_ids, start, count, strict=True) for n in range(c)]
    return {(i, int(position)): rows[n] for n, (i, position) in enumerate(places)}


def record_fields(record) -> dict:
    return {name: getattr(record, name) for name in ("computed_stop", "planned", "skipped", "ticket")}


@pytest.fixture
def state(engine):
    """Return a ModelState with its own tables, next to the engine's."""
    from snpatch.executors.vllm.worker import runners
    from snpatch.executors.vllm.worker.op_tables import OpTables
    from snpatch.executors.vllm.worker.request_tracker import RequestTracker
    from snpatch.executors.vllm.worker.step_planner import StepPlanner

    dual_stream = get_runner(engine).model.snpatch
    tables = OpTables(dual_stream.settings, tiny.LAYERS, 0, tiny.NEURONS, None, 512, torch.device("cpu"))
    tracker = RequestTracker(tables)
    tracker.handles = dual_stream.tracker.handles
    model = SimpleNamespace(snpatch=SimpleNamespace(tracker=tracker, planner=StepPlanner(tracker)))
    config = engine.executor.engine.vllm_config
    return runners.dual_stream_model_state()(config, model, None, torch.device("cpu"))


def build_batch(request_ids, start, count):
    """Build vLLM's batch object as V2 prepares it."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    total = int(sum(count))
    dummy = InputBatch.make_dummy(len(request_ids), total, InputBuffers(64, 512, torch.device("cpu")))
    return replace(
        dummy,
        req_ids=list(request_ids),
        num_scheduled_tokens=np.array(count, dtype=np.int32),
        num_computed_tokens_np=np.array(start, dtype=np.int32),
    )


def test_model_state_makes_the_plans_and_records_of_model_runner_v1(state, log):
    from vllm.v1.core.sched.output import NewRequestData

    tracker, tables = state.tracker, state.tracker.tables
    params, chunks, resumed, observed = {}, 0, 0, 0
    for step in log.steps:
        output = step.output
        # V2 removes ended and preempted requests, and receives resumed ones as new requests.
        for request_id in sorted(output.finished_req_ids | (output.preempted_req_ids or set())):
            state.remove_request(request_id)
        new_requests = list(output.scheduled_new_reqs)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                resumed += 1
                observed += bool(tracker._records[request_id].entries[RequestColumn.GROUP] >= 0)
                ids = step.states[request_id]
                fields = {"prompt_token_ids": ids, "prefill_token_ids": ids, "block_ids": ([],), "mm_features": []}
                fields |= {"pooling_params": None, "lora_request": None, "sampling_params": params[request_id]}
                new_requests.append(
                    NewRequestData(req_id=request_id, num_computed_tokens=cached.num_computed_tokens[i], **fields)
                )
        for data in new_requests:
            params[data.req_id] = data.sampling_params
            state.add_request(0, data)
        if step.plan is None:
            continue
        # V2 may order the batch differently: here by the number of tokens.
        request_ids = sorted(output.num_scheduled_tokens, key=output.num_scheduled_tokens.get)
        count = [output.num_scheduled_tokens[i] for i in request_ids]
        start = [step.start[i] for i in request_ids]
        chunks += any(s and c > 1 for s, c in zip(start, count, strict=True))
        state.prepare_inputs(build_batch(request_ids, start, count), None)
        plan = by_position(tables, request_ids, start, count)
        assert plan.keys() == step.plan.keys()
        for place, row in plan.items():
            # Slots on the device may differ where a preemption released some earlier.
            assert row[:10] == step.plan[place][:10], place
            assert [place >= 0 for place in row[10:]] == [place >= 0 for place in step.plan[place][10:]]
    assert chunks
    assert resumed, "nothing was preempted"
    assert observed, "nothing that is observed was preempted"
    assert len(log.records) == 20 + 2 + 8 + 1 + 16  # plain ones, too
    for request_id, record in log.records.items():
        tracker.remove(request_id)
        assert record_fields(tracker._records[request_id]) == record


def test_model_state_dummy_batch_leaves_the_plan_blank(state, log):
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    new_request = next(d for step in log.steps for d in step.output.scheduled_new_reqs if d.sampling_params.extra_args)
    state.add_request(0, new_request)
    state.prepare_inputs(build_batch([new_request.req_id], [0], [4]), None)
    assert state.tracker.tables.plan[:4, : PlanColumn.POSITION].any()
    state.prepare_inputs(InputBatch.make_dummy(2, 8, InputBuffers(64, 512, torch.device("cpu"))), None)
    assert not state.tracker.tables.plan[:, : PlanColumn.POSITION].any()
    assert (state.tracker.tables.plan[:, PlanColumn.GROUP :] == -1).all()
    assert state.prepare_dummy_inputs(2, 8) == {}
