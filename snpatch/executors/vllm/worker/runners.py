"""Hooks that connect request tracker and step planner to vLLM's two model runners.

Model Runner V1 has no interface for a model's own step inputs, so three of its methods are wrapped, once per process
and only when a dual-stream model is built; other models are not affected. `_prepare_inputs` runs inside the section
that guards pinned buffers. Model Runner V2 asks the model for its ModelState. commands.py rejects other runners. Each
is imported on demand: V1 is deprecated since vLLM 0.33, V2's modules need Triton.
"""

import functools
from functools import cache
from typing import Any, cast

import numpy as np
from vllm.platforms import current_platform

from snpatch.executors.vllm import zeroing
from snpatch.executors.vllm.worker.heap import HEAP


def _dual_stream(runner):
    return getattr(runner.get_model(), "snpatch", None)


def _update_states(original, runner, scheduler_output, *args, **kwargs):
    """End and start requests before the runner does; a preempted request keeps its slots until it ends."""
    dual_stream = _dual_stream(runner)
    if dual_stream is not None:
        zeroing.check_step(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            dual_stream.tracker.remove(request_id)
        if runner.device.type == "cpu":
            HEAP.step(len(scheduler_output.finished_req_ids))
        for new in scheduler_output.scheduled_new_reqs:
            dual_stream.tracker.add(new.req_id, new.sampling_params.extra_args)
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            dual_stream.tracker.resume(request_id)
    return original(runner, scheduler_output, *args, **kwargs)


def _prepare_inputs(original, runner, scheduler_output, num_scheduled_tokens, *args, **kwargs):
    """Plan the step before the runner prepares it, and finish the plan when its tokens are on the device."""
    dual_stream = _dual_stream(runner)
    if dual_stream is not None:
        batch = runner.input_batch
        start = batch.num_computed_tokens_cpu[: batch.num_reqs]
        dual_stream.planner.plan_step(batch.req_ids, start, num_scheduled_tokens[: batch.num_reqs])
    prepared = original(runner, scheduler_output, num_scheduled_tokens, *args, **kwargs)
    if dual_stream is not None:
        dual_stream.planner.settle(runner.input_ids.gpu)
    return prepared


def _dummy_run(original, runner, *args, **kwargs):
    dual_stream = _dual_stream(runner)
    if dual_stream is not None:
        dual_stream.planner.clear()
    return original(runner, *args, **kwargs)


WRAPPERS = {"_update_states": _update_states, "_prepare_inputs": _prepare_inputs, "_dummy_run": _dummy_run}


@cache
def runner_v1() -> type | None:
    """Return vLLM's Model Runner V1; None if vLLM has removed it."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ModuleNotFoundError as error:
        if error.name != "vllm.v1.worker.gpu_model_runner":
            raise
        return None
    return GPUModelRunner


def hook_v1() -> None:
    """Wrap the methods of Model Runner V1 once, if vLLM has it, and make it zero all blocks on a CPU."""
    runner_class = runner_v1()
    if runner_class is None:
        return
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        cast(Any, CPUModelRunner)._zero_block_ids = zeroing.zero_on_cpu
    for name, wrapper in WRAPPERS.items():
        original = getattr(runner_class, name)
        if not hasattr(original, "snpatch"):

            @functools.wraps(original)
            def wrapped(runner, *args, _wrapper=wrapper, _original=original, **kwargs):
                return _wrapper(_original, runner, *args, **kwargs)

            cast(Any, wrapped).snpatch = True
            setattr(runner_class, name, wrapped)


@cache
def dual_stream_model_state() -> type:
    """Return the ModelState class for Model Runner V2."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class DualStreamModelState(DefaultModelState):
        """ModelState that tracks requests and plans steps; a preempted request is removed and added again."""

        def __init__(self, vllm_config, model, *args, **kwargs) -> None:
            super().__init__(vllm_config, model, *args, **kwargs)
            self.tracker, self.planner = model.snpatch.tracker, model.snpatch.planner

        def add_request(self, req_index, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.tracker.add(new_req_data.req_id, new_req_data.sampling_params.extra_args)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.tracker.remove(req_id)

        def prepare_inputs(self, input_batch, req_states) -> dict:
            # The tracker knows no request of a dummy batch, so its plan patches nothing.
            count = np.asarray(input_batch.num_scheduled_tokens[: input_batch.num_reqs])
            start = input_batch.num_computed_tokens_np[: input_batch.num_reqs]
            self.planner.plan_step(input_batch.req_ids, start, count)
            self.planner.settle(input_batch.input_ids)
            return super().prepare_inputs(input_batch, req_states)

    return DualStreamModelState
