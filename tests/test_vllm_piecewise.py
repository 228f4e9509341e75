"""vLLM's piecewise compilation, which its CPU backend leaves out: forced here, since every GPU engine runs it."""

import pytest
import tiny
from jobs import JOBS, assert_as_the_oracle, generate

from snpatch import Engine

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def forced(zoo):
    """An engine of this process whose model vLLM compiles in pieces, and the graphs of the pieces."""
    from vllm.compilation.compiler_interface import InductorStandaloneAdaptor
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check, compiler, compiled = CpuPlatform.check_and_update_config, InductorStandaloneAdaptor.compile, []

    def check_and_force(vllm_config):
        check(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.compile_sizes = []

    def compile_and_count(self, graph, *args, **kwargs):
        compiled.append(graph)
        return compiler(self, graph, *args, **kwargs)

    made = zoo("llama")
    adapters = {name: list(folders) for name, folders in made.adapters.items()}
    options = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "block_size": 32, "enforce_eager": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_force))
        patch.setattr(FixFunctionalizationPass, "__call__", lambda *_: None)  # it looks for ops that a CPU lacks
        patch.setattr(InductorStandaloneAdaptor, "compile", compile_and_count)
        with Engine(made.folder, adapters, backend="vllm", **options) as engine:
            yield made, engine, compiled


def test_pieces_give_what_the_oracle_writes(forced):
    made, engine, _ = forced
    assert_as_the_oracle(made, JOBS, generate(engine, JOBS))


def test_a_layers_name_is_an_input_of_its_piece(forced):
    """A constant would make each layer's piece another graph, to be compiled by itself."""
    _, _, compiled = forced
    assert len(compiled) == tiny.LAYERS + 1
    first, other = ([(n.op, str(n.target)) for n in g.graph.nodes if n.op == "call_function"] for g in compiled[1:3])
    assert first == other
    ours = [node for graph in compiled for node in graph.graph.nodes if "twin_" in str(node.target)]
    assert len(ours) == 1 + 2 * tiny.LAYERS
    assert not [node for node in ours if any(isinstance(argument, str) for argument in node.args)]
