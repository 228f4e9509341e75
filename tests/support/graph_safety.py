"""Calls of torch in a dual-stream model's step that a graph capture would not allow, found without a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

from snpatch import Sampling

# What waits for a GPU: a value for the host, or a tensor of Python numbers, which are not in pinned memory.
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::lift_fresh",
         "aten::is_nonzero", "aten::equal", "aten::unique_dim", "aten::_unique2"}  # fmt: skip


class Watch(TorchDispatchMode):
    """Note ops that read the device on the host. calls: how many ops were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.name().split(".")[0]
        if name in READS or (name.startswith("aten::index") and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def around(self, method):
        def watched(*args, **kwargs):
            with self:
                return method(*args, **kwargs)

        return watched


def _has_mask(args) -> bool:
    """Whether an indexing selects by truth values, whose number only the device knows."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(str(getattr(index, "dtype", "")) == "torch.bool" for index in indices)


def assert_reads_nothing_on_the_host(engine, monkeypatch, jobs) -> None:
    """Of steps of an eager engine of this process; jobs: of the requests that it runs."""
    model = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    watch = Watch()
    with monkeypatch.context() as patch:
        for name in ("forward", "compute_logits"):
            patch.setattr(model, name, watch.around(getattr(model, name)), raising=False)
        engine.generate([job.ids for job in jobs], [job.patch for job in jobs], Sampling(max_tokens=3, ignore_eos=True))
    assert watch.calls > 100
    assert not watch.found, f"{watch.found[0]} reads the device on the host in a step"
