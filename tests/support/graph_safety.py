"""Calls of torch in a dual-stream model's step that a graph capture would not allow, found without a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

from snpatch import Sampling

# Ops that wait for a GPU: they read a value on the host, or copy Python numbers, which are not in pinned memory.
HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::lift_fresh",
         "aten::is_nonzero", "aten::equal", "aten::unique_dim", "aten::_unique2"}  # fmt: skip


class HostReadWatch(TorchDispatchMode):
    """Record ops that read the device on the host. num_calls: number of all ops."""

    def __init__(self) -> None:
        super().__init__()
        self.host_reads, self.num_calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        name = func.name().split(".")[0]
        if name in HOST_READS or (name.startswith("aten::index") and _has_mask(args)):
            self.host_reads.append(name)
        return func(*args, **(kwargs or {}))

    def wrap(self, method):
        def watched(*args, **kwargs):
            with self:
                return method(*args, **kwargs)

        return watched


def _has_mask(args) -> bool:
    """Return whether an indexing uses a mask, because only the device knows how many values it selects."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(str(getattr(index, "dtype", "")) == "torch.bool" for index in indices)


def assert_reads_nothing_on_the_host(engine, monkeypatch, jobs) -> None:
    """Assert that no step of an eager engine in this process, running `jobs`, reads the device on the host."""
    model = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    watch = HostReadWatch()
    with monkeypatch.context() as patch:
        for name in ("forward", "compute_logits"):
            patch.setattr(model, name, watch.wrap(getattr(model, name)), raising=False)
        engine.generate([job.ids for job in jobs], [job.patch for job in jobs], Sampling(max_tokens=3, ignore_eos=True))
    assert watch.num_calls > 100
    assert not watch.host_reads, f"{watch.host_reads[0]} reads the device on the host in a step"
