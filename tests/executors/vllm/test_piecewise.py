"""vLLM's piecewise compilation, forced on a CPU because every GPU engine uses it.

The compile cache is on, as on a GPU: graphs compiled ahead of time are saved, and loaded by the next start.
"""

import gc
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from cuda_code import copy_graph, launches
from jobs import JOBS, assert_equals_oracle, generate

from snpatch import Engine

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("compilation")]
OPTIONS = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32, "enforce_eager": False}


@pytest.fixture(scope="module")
def open_piecewise(tmp_path_factory):
    """open_piecewise(make): open an engine that vLLM compiles in pieces; yield it, the pieces and cache counts."""
    from vllm.compilation.compiler_interface import InductorStandaloneAdaptor
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check, compiler, compiled = CpuPlatform.check_and_update_config, InductorStandaloneAdaptor.compile, []

    def check_and_force(vllm_config):
        check(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.compile_sizes = []
        vllm_config.compilation_config.custom_ops = ["none"]  # as on a GPU

    def compile_and_keep(self, graph, *args, **kwargs):
        compiled.append(copy_graph(graph))
        return compiler(self, graph, *args, **kwargs)

    def artifacts():
        return compilation_counter.num_aot_artifacts_saved, compilation_counter.num_aot_artifacts_loaded

    @contextmanager
    def start(make):
        compiled.clear()
        torch.compiler.reset()  # as in another process
        artifact_counts = artifacts()
        with make() as engine:
            saved, loaded = (after - before for after, before in zip(artifacts(), artifact_counts, strict=True))
            yield SimpleNamespace(engine=engine, pieces=list(compiled), saved=saved, loaded=loaded)
        gc.collect()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_force))
        patch.setattr(FixFunctionalizationPass, "__call__", lambda *_: None)  # it uses ops that a CPU lacks
        patch.setattr(InductorStandaloneAdaptor, "compile", compile_and_keep)
        yield start


def engine_factory(tiny_model: tiny.TinyModel):
    return lambda: Engine(tiny_model.folder, **tiny_model.engine_arguments, backend="vllm", **OPTIONS)


@contextmanager
def native(folder):
    from vllm import LLM

    llm = LLM(str(folder), max_model_len=128, disable_log_stats=True, **OPTIONS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_pieces_are_compiled_once_then_loaded_and_match_the_oracle(zoo, open_piecewise):
    tiny_model = zoo("llama")
    with open_piecewise(engine_factory(tiny_model)) as cold:
        assert (cold.saved, cold.loaded) == (1, 0)
        assert_equals_oracle(tiny_model, JOBS, generate(cold.engine, JOBS))
    with open_piecewise(engine_factory(tiny_model)) as warm:
        assert (warm.saved, warm.loaded) == (0, 1)
        assert_equals_oracle(tiny_model, JOBS, generate(warm.engine, JOBS))
    # A layer's name is an input of its piece; as a constant it would make a different graph of each layer.
    assert len(cold.pieces) == tiny.LAYERS + 1
    first_layer, second_layer = (
        [(n.op, str(n.target)) for n in g.graph.nodes if n.op == "call_function"] for g in cold.pieces[1:3]
    )
    assert first_layer == second_layer
    dual_stream_nodes = [
        node for graph in cold.pieces for node in graph.graph.nodes if "dual_stream_" in str(node.target)
    ]
    assert len(dual_stream_nodes) == 2 * tiny.LAYERS
    assert not [node for node in dual_stream_nodes if any(isinstance(argument, str) for argument in node.args)]


@pytest.mark.full
def test_dual_stream_layer_launches_one_gpu_kernel_more_than_vllms(zoo, open_piecewise):
    """The additional kernel copies V; the op replaces silu_and_mul, and queries and keys are views."""
    model = zoo("llama")
    model = replace(model, adapters={"sft": model.adapters["sft"]})  # one that scales no keys
    with open_piecewise(engine_factory(model)) as dual_stream, torch.inference_mode():
        dual_stream_kernels = launches(dual_stream.pieces[1])
    with open_piecewise(lambda: native(model.folder)) as native_engine, torch.inference_mode():
        native_kernels = launches(native_engine.pieces[1])
    assert sum("dual_stream_glu" in name for name in dual_stream_kernels) == 1
    assert not any("dual_stream_glu" in name for name in native_kernels)
    assert len(dual_stream_kernels) == len(native_kernels) + 1, (dual_stream_kernels, native_kernels)


@pytest.mark.full
def test_secondary_weights_are_compiled_once_then_loaded(pairs, open_piecewise):
    tiny_pair = pairs("llama")
    for want in ((1, 0), (0, 1)):
        with open_piecewise(engine_factory(tiny_pair)) as pair:
            assert (pair.saved, pair.loaded) == want
            assert_equals_oracle(tiny_pair, JOBS, generate(pair.engine, JOBS))
