"""VllmScorer: score models on vLLM's pooling runner."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from snpatch.errors import SnpatchError
from snpatch.judges.beavertails import is_beavertails, read_score_checkpoint
from snpatch.judges.score_format import EncodedText
from snpatch.models.hub import resolve_model_folder


class VllmScorer:
    """Scores [n, 1] of a Beavertails model, or logits [n, labels] of a classifier that vLLM supports.

    Args:
        model: Folder or hub name.
        config: The model's config.
        dtype: Dtype of the weights, or "auto".
        arguments: Further arguments of PoolingEngine.
    """

    def __init__(self, model: str | Path, config, *, dtype: str, **arguments) -> None:
        from snpatch.executors.vllm.pooling import PoolingEngine

        self._checkpoint, has_bias = None, None
        if is_beavertails(config):
            model = resolve_model_folder(model)
            self._checkpoint = read_score_checkpoint(model, config, dtype, torch.device("meta"))
            has_bias = self._checkpoint.bias is not None
        self._engine = PoolingEngine(str(model), config, dtype=dtype, has_bias=has_bias, **arguments)

    def score(self, rows: Sequence[EncodedText]) -> Tensor:
        """Return scores [n, 1] or logits [n, labels], float32, in the rows' order."""
        if any(any(row.get("token_type_ids", ())) for row in rows):
            raise SnpatchError(
                "backend vllm: this judge needs token types, which vLLM does not get. Use the transformers backend."
            )
        scores = self._engine.logits([row["input_ids"] for row in rows])
        return scores if self._checkpoint is None else self._checkpoint.normalize(scores)

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self._engine.close()
