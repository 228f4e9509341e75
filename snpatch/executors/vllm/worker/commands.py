"""The commands that the user's process sends to each worker (vLLM's `worker_extension_cls`, called by name).

Plain data both ways, no pickle: tensors travel as (dtype, shape, bytes). Bad news comes back as data too, since an
exception in a worker ends the engine.
"""

import functools
from collections.abc import Callable

import torch

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import quantization, zeroing
from snpatch.executors.vllm.rpc import Packed, pack, unpack
from snpatch.models.checkpoint import check_finite
from snpatch.models.compatibility import total_bytes

# Where the backends' builders of attention metadata keep their head counts.
QUERY_HEADS = ("num_heads_q", "num_qo_heads", "num_heads")
KV_HEADS = ("num_heads_kv", "num_kv_heads")


def _command(method: Callable) -> Callable:
    """Answers {"ok": what the method returns} or {"error": a message}."""

    @functools.wraps(method)
    def answer(self, *args):
        try:
            return {"ok": method(self, *args)}
        except SnpatchError as error:
            return {"error": str(error)}

    return answer


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    @_command
    def snpatch_start(self) -> dict:
        """Check that the surgery, the runner and attention's plans agree; tell the shard."""
        twin = self._dual_stream()
        runner = self.model_runner
        if twin.settings.streams == 2:
            for group in (group for groups in runner.attn_groups for group in groups):
                _check_heads(group, {layer.layer_name: layer for layer in twin.attention})
        quantization.check_activation_scales(runner.get_model())
        zeroing.check_runner(runner)
        runner.reload_weights = _refuse_reload
        if not twin.has_seen_weights:  # some formats of checkpoints go past load_weights
            check_finite(runner.get_model().named_parameters(), twin.name)
        return {
            "first_neuron": twin.first_neuron,
            "n_neurons": twin.n_neurons,
            "runner": _runner_kind(runner),
            "memory": (
                twin.own_bytes,
                twin.second.bytes if twin.second else 0,
                total_bytes(zeroing.cache_tensors(runner.kv_caches)),
            ),
            "twice": twin.second.paired if twin.second else [],
        }

    @_command
    def snpatch_write(self, kind: str, handle: int, row: int, tensors: dict[str, Packed]) -> None:
        """Copy an adapter, ranking or constant into a row of its bank, known from now on by its handle alone."""
        feed = self._dual_stream().feed
        named = {name: unpack(packed) for name, packed in tensors.items()}
        handles = feed.handles[kind]
        for old in [h for h, r in handles.items() if r == row and h]:
            del handles[old]
        if kind == "adapter":
            feed.banks.write_adapter(row, named)
        elif kind == "ranking":
            feed.banks.write_ranking(row, named["rank"])
        else:
            feed.banks.write_constant(row, named["values"])
        handles[handle] = row

    @_command
    def snpatch_clear_statistics(self, groups: list[int]) -> None:
        self._dual_stream().banks.clear_statistics(groups)

    @_command
    def snpatch_statistics(self, groups: list[int]) -> list[Packed]:
        """Sums [groups, L, 5, shard] float64 and counts [groups, L] int64 of this worker."""
        return [pack(tensor) for tensor in self._dual_stream().banks.statistics(groups)]

    @_command
    def snpatch_fetch(self, tickets: list[int]) -> list[list[dict]]:
        """See Feed.fetch; captures travel packed."""
        found = self._dual_stream().feed.fetch(tickets)
        for record in (record for records in found for record in records):
            if record["captured"] is not None:
                record["captured"] = pack(torch.from_numpy(record["captured"]))
        return found

    def _dual_stream(self):
        twin = getattr(self.model_runner.get_model(), "snpatch", None)
        if twin is None:
            raise SnpatchError("this engine's model is not a twin: is snpatch's vLLM plugin switched off?")
        return twin


def _refuse_reload(*args, **kwargs) -> None:
    raise SnpatchError(
        "a twin's weights cannot be loaded again: what is patched, counted and kept goes by the content of those that "
        "it started with; start another engine"
    )


def _runner_kind(runner) -> str:
    """ "v1" or "v2"; an error for a runner that nothing would tell of patches."""
    from snpatch.executors.vllm.worker import runners

    v1 = runners.runner_v1()
    if v1 is not None and isinstance(runner, v1):
        missing = [name for name in runners.WRAPPED if not hasattr(getattr(type(runner), name), "snpatch")]
        if not missing:
            return "v1"
        raise SnpatchError(f"model runner {type(runner).__name__} replaces {', '.join(missing)}")
    state = getattr(runner, "model_state", None)
    if state is not None and isinstance(state, runners.dual_stream_model_state()):
        return "v2"
    raise SnpatchError(f"model runner {type(runner).__module__}.{type(runner).__name__} is not known to snpatch")


def _check_heads(group, layers: dict) -> None:
    """Attention planned for other head counts than the layers have would be wrong without an error."""
    for builder in group.metadata_builders:
        for name in group.layer_names:
            if name not in layers:
                raise SnpatchError(f"attention layer {name} was not made by the twin surgery")
            for names, wanted in ((QUERY_HEADS, layers[name].num_heads), (KV_HEADS, layers[name].num_kv_heads)):
                for planned in (getattr(builder, n) for n in names if hasattr(builder, n)):
                    if planned != wanted:
                        raise SnpatchError(
                            f"{type(builder).__name__} plans attention for {planned} heads, {name} has {wanted}"
                        )
