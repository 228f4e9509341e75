"""Patches that overflow, and KV caches filled with NaN."""

from collections.abc import Sequence

import torch
from jobs import ALL, RANKINGS

from snpatch import Engine, Noise, Patch, Sampling, Scale
from snpatch.executors.base import Request
from snpatch.op.plan import NO_END
from snpatch.patching.patch import Constant, Overwrite
from snpatch.ranking.window import Window

TOO_LARGE = (
    Scale(3e38),
    Constant(torch.full(RANKINGS[0].shape, 3e38)),
    Noise(torch.full(RANKINGS[0].shape, 3e38), seed=1),
)


def build_overflow_request(engine: Engine, ids: Sequence[int], source=TOO_LARGE[0], tokens: int = 25) -> Request:
    """Return a request whose keys and values become NaN. It is built by hand, because parsed patches are bounded."""
    strength = 2.0 if isinstance(source, Constant) else 1.0
    return Request(
        list(ids),
        engine.requests.model("base"),
        overwrites=(Overwrite(source, RANKINGS[0], Window(0, ALL), 0, NO_END, strength),),
        sampling=Sampling(max_tokens=tokens, ignore_eos=True),
    )


def fill_with_nan(engine: Engine) -> None:
    """Fill the KV cache of an engine in this process with NaN, except vLLM's null block, and reset the prefix cache."""
    engine.executor.engine.reset_prefix_cache()
    runner = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    blocks = runner.kv_cache_config.num_blocks
    for kv in runner.kv_caches:
        parts = kv if kv.shape[:2] == (2, blocks) else [kv]  # vLLM 0.24 stores keys and values separately
        for part in parts:
            part[len(part) // blocks :] = torch.nan  # a block may be several of the attention kernel's


def huge_patch(donor: object = None) -> Patch:
    """Return a patch within the bounds of float32 that overflows in the norms."""
    return Patch("base", donor or Scale(1e19), RANKINGS[0], ALL)
