"""Compile the Triton kernels for GPUs that are not here and read their SASS: registers, stack, wide accesses.

Prints JSON, one object a variant. Must run without TRITON_INTERPRET. Source of the tools: Triton bundles
cuobjdump and nvdisasm.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snpatch.kernels import patched_glu as module

TOOLS = Path(nvidia.__file__).parent / "bin"
POINTERS = {
    "p_scale": "*fp32",
    "p_rank": "*i32",
    "p_constant": "*fp32",
    "p_plan": "*i32",
    "p_stats": "*fp64",
    "p_count": "*i64",
    "p_capture": "*fp32",
    "p_receipt": "*i64",
}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALIGNED = ("n_neurons", "row_stride")


def compile_variant(capability: int, dtype: str, streams: int) -> dict:
    """One variant as an aligned model would launch it; its registers, stack and counts of 128-bit accesses."""
    kernel = module._patched_glu_kernel
    constants = {
        "ACTIVATION": "silu",
        "STREAMS": streams,
        "CLAUSES": 1,
        "HAS_GROUPS": True,
        "INTERPRETED": False,
        **module.TILE,
    }
    types = {**POINTERS, "p_gate_up": f"*{dtype}", "p_out": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    place = kernel.arg_names.index
    aligned = [name for name in kernel.arg_names if name.startswith("p_") or name in ALIGNED]
    source = ASTSource(
        kernel,
        signature,
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {**module.OPTIONS, "maxnreg": module.MAX_REGISTERS.get(TYPES[dtype])}
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", file.name)
    return {
        "capability": capability,
        "dtype": dtype,
        "streams": streams,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128", sass)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    kinds = (("bf16", 1), ("bf16", 2), ("fp32", 2))
    print(json.dumps([compile_variant(capability, *kind) for capability in (80, 90, 100) for kind in kinds]))
