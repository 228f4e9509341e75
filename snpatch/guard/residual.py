"""Residual stream of a model at the end of its last layer: what a guard on neurons is compared with.

Why the transformers backend: a vLLM engine captures neurons only, so a second copy of the model is loaded for these
prompts and freed afterwards. It runs the same adapters.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from snpatch.config import Capacity
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Request

if TYPE_CHECKING:
    from snpatch.executors.transformers.executor import TransformersExecutor

LAST_TOKEN, MEAN = "residual at the last token", "mean residual of the last layer"


def capture_residuals(engine: Engine, token_ids: Sequence[Sequence[int]], model: str) -> dict[str, np.ndarray]:
    """Read the residual stream before the final norm.

    Args:
        engine: Engine that has the model. Unless it runs transformers, the model is loaded a second time.
        token_ids: Token ids of each prompt.
        model: Name of the model.

    Returns:
        LAST_TOKEN and MEAN (over the prompt's tokens) -> [prompts, hidden] float32.

    Raises:
        SnpatchError: transformers cannot run the model, or there is no memory for it.
    """
    if engine.backend == "transformers":
        return _read(engine, token_ids, model)
    config = replace(engine.config, backend="transformers", capacity=Capacity(), vllm={})
    try:
        with Engine.from_config(config) as reader:
            return _read(reader, token_ids, model)
    except torch.OutOfMemoryError as error:
        raise SnpatchError(
            "guard: residual: expected memory for a second copy of the model, got too little. Leave `residual` out of "
            "the baselines, or lower gpu_memory_utilization."
        ) from error


def _read(engine: Engine, token_ids: Sequence[Sequence[int]], model: str) -> dict[str, np.ndarray]:
    executor, source = cast("TransformersExecutor", engine.executor), engine.requests.model(model)
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index, hidden in executor.read_residuals([Request(ids, source) for ids in token_ids]):
        rows[index] = hidden[-1].numpy(), hidden.mean(0).numpy()
    last, mean = (np.stack(values) for values in zip(*(rows[i] for i in range(len(token_ids))), strict=True))
    return {LAST_TOKEN: last, MEAN: mean}
