"""Compile the Triton kernels for GPUs that this machine lacks and read registers, stack and accesses off their SASS.

Prints JSON with one object per variant. Must run without TRITON_INTERPRET. Triton bundles the tools, cuobjdump and
nvdisasm.
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
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALIGNED = ("n_neurons", "row_stride")
# (capability, dtype, streams, interventions, is_aligned). H100 and H200 have 9.0, which is compiled for each kind.
VARIANTS = (
    *(
        (90, dtype, 2, interventions, True)
        for dtype, interventions in (("bf16", 1), ("bf16", 3), ("fp16", 1), ("fp32", 1))
    ),
    (90, "bf16", 1, 1, True),
    (90, "bf16", 2, 1, False),
    *((capability, dtype, 2, 1, True) for capability in (80, 100) for dtype in ("bf16", "fp32")),
)


def compile_variant(capability: int, dtype: str, streams: int, interventions: int, is_aligned: bool) -> dict:
    """Compile one variant; return its registers, stack, instructions and counts of 128-bit accesses.

    is_aligned: the number of neurons and the row stride are divisible by 16, as for every model on one GPU.
    """
    kernel = module._patched_glu_kernel
    constants = {
        "ACTIVATION": "silu",
        "STREAMS": streams,
        "INTERVENTIONS": interventions,
        "HAS_GROUPS": True,
        "INTERPRETED": False,
        **module.TILE,
    }
    types = {**POINTERS, "p_gate_up": f"*{dtype}", "p_out": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    place = kernel.arg_names.index
    aligned = [name for name in kernel.arg_names if name.startswith("p_") or (is_aligned and name in ALIGNED)]
    source = ASTSource(
        kernel,
        signature,
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {**module.OPTIONS, "maxnreg": module.max_registers(TYPES[dtype], interventions)}
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _code(_run("nvdisasm", file.name))
    return {
        "capability": capability,
        "dtype": dtype,
        "streams": streams,
        "interventions": interventions,
        "is_aligned": is_aligned,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]+\*/", sass, re.MULTILINE)),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.128", sass)),
    }


def _code(listing: str) -> str:
    """Return the kernel's section of nvdisasm's listing, which also contains debug sections."""
    start = listing.index("\n.text.")
    return listing[start : listing.find("\n\t.section", start)]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__, "variants": [compile_variant(*kind) for kind in VARIANTS]}))
