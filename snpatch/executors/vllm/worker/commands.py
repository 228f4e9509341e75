"""Commands that the client process sends to each worker (vLLM's `worker_extension_cls`, called by name).

They exchange plain data, see rpc.py. Errors are returned as data, because an exception in a worker ends the engine.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import quantization, zeroing
from snpatch.executors.vllm.rpc import Packed, pack, unpack
from snpatch.models.checkpoint import check_finite
from snpatch.models.compatibility import total_bytes

# Attributes of the attention backends' metadata builders that hold head counts.
QUERY_HEAD_ATTRIBUTES = ("num_heads_q", "num_qo_heads", "num_heads")
KV_HEAD_ATTRIBUTES = ("num_heads_kv", "num_kv_heads")


def _command(method: Callable) -> Callable:
    """Make a method answer {"ok": its result} or {"error": a message}."""

    @functools.wraps(method)
    def answer(self, *args):
        try:
            return {"ok": method(self, *args)}
        except SnpatchError as error:
            return {"error": str(error)}

    return answer


class WorkerExtension:
    """Commands that vLLM adds to its worker class."""

    model_runner: Any  # of vLLM's worker

    @_command
    def snpatch_start(self) -> dict:
        """Check that surgery, model runner and attention plans agree; return the worker's shard and memory."""
        dual_stream = self._dual_stream()
        runner = self.model_runner
        if dual_stream.settings.streams == 2:
            layers = {layer.layer_name: layer for layer in dual_stream.attention}
            for group in (group for groups in runner.attn_groups for group in groups):
                _check_planned_heads(group, layers)
        quantization.check_activation_scales(runner.get_model())
        zeroing.check_runner(runner)
        runner.reload_weights = _refuse_reload
        if not dual_stream.has_checked_weights:  # some checkpoint formats bypass load_weights
            check_finite(runner.get_model().named_parameters(), dual_stream.name)
        secondary = dual_stream.secondary
        return {
            "first_neuron": dual_stream.first_neuron,
            "n_neurons": dual_stream.n_neurons,
            "runner": _runner_kind(runner),
            "memory": (
                dual_stream.primary_bytes,
                secondary.bytes if secondary else 0,
                total_bytes(zeroing.cache_tensors(runner.kv_caches)),
            ),
            "duplicated": secondary.attached if secondary else [],
        }

    @_command
    def snpatch_write(self, kind: str, handle: int, row: int, tensors: dict[str, Packed]) -> None:
        """Copy an adapter, ranking or constant into a row of its table, and register it under a new handle."""
        dual_stream = self._dual_stream()
        tables, handles = dual_stream.tables, dual_stream.tracker.handles[kind]
        unpacked = {name: unpack(packed) for name, packed in tensors.items()}
        for stale in [h for h, r in handles.items() if r == row and h]:
            del handles[stale]
        if kind == "adapter":
            tables.write_adapter(row, unpacked)
        elif kind == "ranking":
            tables.write_ranking(row, unpacked["rank"])
        else:
            tables.write_constant(row, unpacked["values"])
        handles[handle] = row

    @_command
    def snpatch_clear_statistics(self, groups: list[int]) -> None:
        """Set the statistics of groups to zero."""
        self._dual_stream().tables.clear_statistics(groups)

    @_command
    def snpatch_statistics(self, groups: list[int]) -> list[Packed]:
        """Return sums [groups, L, 5, shard] float64 and counts [groups, L] int64 of this worker."""
        return [pack(tensor) for tensor in self._dual_stream().tables.read_statistics(groups)]

    @_command
    def snpatch_fetch(self, tickets: list[int]) -> list[list[dict]]:
        """Return RequestTracker.fetch with packed captures."""
        records_by_ticket = self._dual_stream().tracker.fetch(tickets)
        for record in (record for records in records_by_ticket for record in records):
            if record["captured"] is not None:
                record["captured"] = pack(torch.from_numpy(record["captured"]))
        return records_by_ticket

    def _dual_stream(self):
        dual_stream = getattr(self.model_runner.get_model(), "snpatch", None)
        if dual_stream is None:
            raise SnpatchError("this engine's model is not a dual-stream model: is snpatch's vLLM plugin switched off?")
        return dual_stream


def _refuse_reload(*args, **kwargs) -> None:
    raise SnpatchError(
        "a dual-stream model's weights cannot be loaded again, because patches, statistics and stored results depend "
        "on the weights that it started with; start another engine"
    )


def _runner_kind(runner) -> str:
    """Return "v1" or "v2"; raise for a model runner in which nothing would be patched."""
    from snpatch.executors.vllm.worker import runners

    v1 = runners.runner_v1()
    if v1 is not None and isinstance(runner, v1):
        replaced = [name for name in runners.WRAPPERS if not hasattr(getattr(type(runner), name), "snpatch")]
        if not replaced:
            return "v1"
        raise SnpatchError(f"model runner {type(runner).__name__} replaces {', '.join(replaced)}")
    state = getattr(runner, "model_state", None)
    if state is not None and isinstance(state, runners.dual_stream_model_state()):
        return "v2"
    raise SnpatchError(f"model runner {type(runner).__module__}.{type(runner).__name__} is not supported by snpatch")


def _check_planned_heads(group, layers: dict) -> None:
    """Raise if attention is planned for other head counts than its layers have.

    Attention would be wrong without an error.
    """
    for builder, name in product(group.metadata_builders, group.layer_names):
        if name not in layers:
            raise SnpatchError(f"attention layer {name} was not made by the dual-stream surgery")
        for planned, actual in _head_counts(builder, layers[name]):
            if planned != actual:
                raise SnpatchError(f"{type(builder).__name__} plans attention for {planned} heads, {name} has {actual}")


def _head_counts(builder, layer) -> Iterator[tuple[int, int]]:
    """Yield each head count of a builder with the layer's own."""
    for attributes, actual in ((QUERY_HEAD_ATTRIBUTES, layer.num_heads), (KV_HEAD_ATTRIBUTES, layer.num_kv_heads)):
        yield from ((getattr(builder, name), actual) for name in attributes if hasattr(builder, name))
