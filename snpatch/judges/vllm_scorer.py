"""Score models in vLLM: what judges know of a checkpoint, and vLLM's pooling runner."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.judges.beavertails import is_beavertails, read_score_checkpoint
from snpatch.judges.score_format import Row
from snpatch.models.hub import resolve_model_folder


class VllmScorer:
    """Rows -> scores [n, 1] of a Beavertails model, or logits [n, labels] of one that vLLM knows by itself.

    arguments: PoolingEngine's.
    """

    def __init__(self, model: str | Path, config, *, dtype: str, **arguments) -> None:
        from snpatch.executors.vllm.pooling import PoolingEngine

        self._checkpoint, has_bias = None, None
        if is_beavertails(config):
            model = resolve_model_folder(model)
            self._checkpoint = read_score_checkpoint(model, config, dtype, torch.device("meta"))
            has_bias = self._checkpoint.bias is not None
        self._engine = PoolingEngine(str(model), config, dtype=dtype, has_bias=has_bias, **arguments)

    def score(self, rows: Sequence[Row]) -> Tensor:
        """float32, in the rows' order."""
        if any(any(row.get("token_type_ids", ())) for row in rows):
            raise SnpatchError("backend vllm: this judge needs token types, which vLLM is not given: use transformers")
        scores = self._engine.logits([row["input_ids"] for row in rows])
        return scores if self._checkpoint is None else self._checkpoint.normalized(scores)

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self._engine.close()
