"""The CUDA code that Inductor generates for a graph, without a GPU: the kernels that it launches, in order.

Why this works without a GPU: Inductor asks the driver only for the card's name and sizes, and compiles nothing before
the code runs.
"""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TOKENS = 64
CARD = {
    "name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30,
    "warp_size": 32, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048,
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "max_threads_per_block": 1024,
    "L2_cache_size": 50 << 20, "gcnArchName": "",
}  # fmt: skip
LAUNCH = re.compile(r"^\s+(?:(triton_\w+)\.run\(|(extern_kernels\.\w+)\(|\w+ = (torch\.ops\.\w+\.\w+))", re.MULTILINE)


def launches(graph: torch.fx.GraphModule) -> list[str]:
    """Return the names of the kernels and ops that a step of a piece of vLLM's graph launches, in order."""
    code = _cuda_code(graph)
    body = "\n".join(line for line in code[code.index("def call") :].splitlines() if not line.strip().startswith("#"))
    return [next(filter(None, match.groups())) for match in LAUNCH.finditer(body)]


def _cuda_code(graph: torch.fx.GraphModule) -> str:
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    arguments, tensors = _inputs(graph)
    with fake:
        fake_inputs = [torch.empty(shape, dtype=dtype) for shape, dtype in tensors.values()]

        def run(*values):
            return graph(
                *({**arguments, **dict(zip(tensors, values, strict=True))}[i] for i in range(len(placeholders)))
            )

        placeholders = [*arguments, *tensors]
        traced = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake")(*fake_inputs)
    traced.graph.eliminate_dead_code()

    def on_card(tensor):
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(fake, meta, torch.device("cuda:0"))

    for node in traced.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = on_card(node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    traced.recompile()
    with V.set_fake_mode(fake), fake:
        post_grad_passes(traced, is_inference=True)
    traced.recompile()
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_threads=1):
        _pretend_there_is_a_card(patch)
        inputs = [on_card(tensor) for tensor in fake_inputs]
        with V.set_fake_mode(fake):
            lowering = GraphLowering(traced, example_inputs=inputs, is_inference=True)
            from torch._inductor.debug import DebugContext

            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                code = lowering.codegen()[0]
    return getattr(code, "value", code)


def _inputs(graph: torch.fx.GraphModule) -> tuple[dict, dict]:
    """Return the graph's placeholders by index: values of numbers and others, and (shape, dtype) of tensors."""
    values, tensors = {}, {}
    for index, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.Tensor):
            tensors[index] = tuple(map(_size, value.shape)), value.dtype
        else:
            values[index] = _size(value) if isinstance(value, int | torch.SymInt) else value
    return values, tensors


def _size(size) -> int:
    """Return a dimension: a number, or T or 2 * T for a symbol."""
    text = str(size)
    return int(text) if text.isdigit() else 2 * TOKENS if text.startswith("2*") else TOKENS


def _pretend_there_is_a_card(patch: pytest.MonkeyPatch) -> None:
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as has
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
                             regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
                             max_threads_per_block=1024, warp_size=32)  # fmt: skip
    patch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: properties))
    for name, value in {
        "get_device_properties": SimpleNamespace(**CARD), "get_device_capability": (9, 0), "is_available": True,
        "device_count": 1, "current_device": 0, "_is_compiled": True,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    card = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    patch.setattr(driver, "_active", card)
    for module in (scheduler, has):
        for name in ("has_triton", "has_triton_package"):
            if hasattr(module, name):
                patch.setattr(module, name, lambda *_, **__: True)


def copy_graph(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a graph that the compiler may change."""
    return copy.deepcopy(graph)
