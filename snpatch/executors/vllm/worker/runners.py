"""The feed inside vLLM's two model runners.

Model Runner V1 has no place for a model's own step inputs, so three of its methods are wrapped, once a process and
only where a twin is built: other models pass through. `_prepare_inputs` lies inside the section that guards pinned
buffers. Model Runner V2 asks the model for its ModelState. A runner that is neither is refused (commands.py). Each is
imported when it is asked for: V1 is deprecated from vLLM 0.33 on, V2's modules need Triton.
"""

import functools
from functools import cache

import numpy as np
from vllm.platforms import current_platform

from snpatch.executors.vllm import zeroing
from snpatch.executors.vllm.worker.heap import HEAP


def _feed(runner):
    twin = getattr(runner.get_model(), "snpatch", None)
    return None if twin is None else twin.feed


def _update_states(original, runner, scheduler_output, *args, **kwargs):
    """Requests end and start; a preempted one keeps its place until it ends."""
    feed = _feed(runner)
    if feed is not None:
        zeroing.check_step(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            feed.remove(request_id)
        if runner.device.type == "cpu":
            HEAP.add(len(scheduler_output.finished_req_ids))
        for new in scheduler_output.scheduled_new_reqs:
            feed.add(new.req_id, new.sampling_params.extra_args)
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            feed.resume(request_id)
    return original(runner, scheduler_output, *args, **kwargs)


def _prepare_inputs(original, runner, scheduler_output, num_scheduled_tokens, *args, **kwargs):
    feed = _feed(runner)
    if feed is not None:
        batch = runner.input_batch
        start = batch.num_computed_tokens_cpu[: batch.num_reqs]
        feed.step(batch.req_ids, start, num_scheduled_tokens[: batch.num_reqs])
    prepared = original(runner, scheduler_output, num_scheduled_tokens, *args, **kwargs)
    if feed is not None:
        feed.settle(runner.input_ids.gpu)
    return prepared


def _dummy_run(original, runner, *args, **kwargs):
    feed = _feed(runner)
    if feed is not None:
        feed.clear()
    return original(runner, *args, **kwargs)


WRAPPED = {"_update_states": _update_states, "_prepare_inputs": _prepare_inputs, "_dummy_run": _dummy_run}


@cache
def runner_v1() -> type | None:
    """vLLM's Model Runner V1; None where it is gone."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ModuleNotFoundError as error:
        if error.name != "vllm.v1.worker.gpu_model_runner":
            raise
        return None
    return GPUModelRunner


def hook_v1() -> None:
    """Wrap the methods of Model Runner V1, if there is one and they are not wrapped yet; zero all blocks on a CPU."""
    runner_class = runner_v1()
    if runner_class is None:
        return
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        CPUModelRunner._zero_block_ids = zeroing.zero_on_cpu
    for name, wrapper in WRAPPED.items():
        original = getattr(runner_class, name)
        if not hasattr(original, "snpatch"):

            @functools.wraps(original)
            def wrapped(runner, *args, _wrapper=wrapper, _original=original, **kwargs):
                return _wrapper(_original, runner, *args, **kwargs)

            wrapped.snpatch = True
            setattr(runner_class, name, wrapped)


@cache
def dual_stream_model_state() -> type:
    """The ModelState for Model Runner V2."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class DualStreamModelState(DefaultModelState):
        """A request that is preempted is removed and added again: its record knows it."""

        def __init__(self, vllm_config, model, *args, **kwargs) -> None:
            super().__init__(vllm_config, model, *args, **kwargs)
            self.feed = model.snpatch.feed

        def add_request(self, req_index, new_req_data) -> None:
            super().add_request(req_index, new_req_data)
            self.feed.add(new_req_data.req_id, new_req_data.sampling_params.extra_args)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.feed.remove(req_id)

        def prepare_inputs(self, input_batch, req_states) -> dict:
            # A dummy batch has request ids that the feed does not know: its plan asks for nothing.
            count = np.asarray(input_batch.num_scheduled_tokens[: input_batch.num_reqs])
            self.feed.step(input_batch.req_ids, input_batch.num_computed_tokens_np[: input_batch.num_reqs], count)
            self.feed.settle(input_batch.input_ids)
            return super().prepare_inputs(input_batch, req_states)

    return DualStreamModelState
