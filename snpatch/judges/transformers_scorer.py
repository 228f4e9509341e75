"""Score models in transformers: padded batches of similar length, scored at the last token of each text.

Why the padding token is chosen here: transformers' decoders take the last token that is not the config's padding token
as the end of a text. Without a padding token they refuse a batch, and one that occurs in a text would end it early.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from snpatch.errors import SnpatchError
from snpatch.executors.transformers.executor import pick_device
from snpatch.judges.beavertails import read_score_checkpoint
from snpatch.judges.score_format import EncodedText
from snpatch.models.checkpoint import check_finite
from snpatch.models.hub import resolve_model_folder
from snpatch.models.pretrained import load_network

DEFAULT_BATCH_SIZE = 16


class BeavertailsScorer:
    """Scores [n, 1] of a model in the Beavertails layout, normalized if its config says so.

    The head is computed in float32, because bfloat16 scores would be multiples of 1/16.

    Args:
        model: Folder or hub name.
        config: The model's config.
        dtype: Dtype of the body, or "auto".
        batch_size: Maximum number of texts per batch; None: DEFAULT_BATCH_SIZE.
        device: "auto" or a torch device.
        padding_side: "right" or "left".
    """

    def __init__(
        self,
        model: str | Path,
        config,
        *,
        dtype: str,
        batch_size: int | None,
        device: str = "auto",
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("right", "left"):
            raise SnpatchError(f"padding_side: expected right or left, got {padding_side!r}")
        self._device, self._batch_size, self._side = pick_device(device), batch_size, padding_side
        self._checkpoint = read_score_checkpoint(resolve_model_folder(model), config, dtype, self._device)
        with torch.device("meta"):
            body = LlamaModel(config)
        body.load_state_dict(self._checkpoint.body, assign=True)
        body.rotary_emb = LlamaRotaryEmbedding(config).to(self._device)  # checkpoints lack its buffers
        self._body = body.eval()

    def score(self, rows: Sequence[EncodedText]) -> Tensor:
        """Return the scores or logits, float32, in the rows' order."""
        return _run_by_length(rows, self._batch_size, self._score_batch)

    def _score_batch(self, rows: list[EncodedText]) -> Tensor:
        assert self._body is not None, "this judge is closed"
        assert self._checkpoint is not None
        ids, mask = (tensor.to(self._device) for tensor in _pad(rows, 0, self._side))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = self._body(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        ends = mask.cumsum(1).argmax(1)
        last = hidden[torch.arange(len(rows), device=self._device), ends]  # after the final norm
        scores = torch.nn.functional.linear(last.float(), self._checkpoint.head, self._checkpoint.bias)
        return self._checkpoint.normalize(scores)

    def close(self) -> None:
        """Free the model."""
        self._body = self._checkpoint = None


class ClassifierScorer:
    """Logits [n, labels] of a sequence classification or reward model that transformers can load.

    Batches are padded on the right, because positions may count padding.

    Args:
        model: Folder or hub name.
        config: The model's config.
        dtype: Dtype of the weights, or "auto".
        batch_size: Maximum number of texts per batch; None: DEFAULT_BATCH_SIZE.
        device: "auto" or a torch device.
    """

    def __init__(self, model: str | Path, config, *, dtype: str, batch_size: int | None, device: str = "auto") -> None:
        self._device, self._batch_size = pick_device(device), batch_size
        # SDPA in transformers drops Gemma 2's soft cap on attention logits.
        attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        loaded = load_network(AutoModelForSequenceClassification, model, dtype=dtype, **attention)
        check_finite(loaded.named_parameters(), str(model))
        self._model = loaded.to(self._device).eval()
        self._text_config = loaded.config.get_text_config()
        self._has_padding = get_pad_token_id(loaded.config) is not None
        self._uses_token_types = "token_type_ids" in inspect.signature(loaded.forward).parameters

    def score(self, rows: Sequence[EncodedText]) -> Tensor:
        """Return the scores or logits, float32, in the rows' order."""
        return _run_by_length(rows, self._batch_size, self._score_batch)

    def _score_batch(self, rows: list[EncodedText]) -> Tensor:
        assert self._model is not None, "this judge is closed"
        if not self._has_padding:
            used_ids = {i for row in rows for i in row["input_ids"]}
            self._text_config.pad_token_id = next(i for i in count() if i not in used_ids)
        ids, mask = _pad(rows, self._text_config.pad_token_id, "right")
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._uses_token_types and "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = pad_sequence([torch.tensor(row["token_type_ids"]) for row in rows], True)
        return self._model(**{name: tensor.to(self._device) for name, tensor in inputs.items()}).logits

    def close(self) -> None:
        """Free the model."""
        self._model = None


def get_pad_token_id(config) -> int | None:
    """Return the padding token that the model itself uses; None if it has none."""
    text = config.get_text_config()
    padding = text.pad_token_id
    if padding is not None and padding >= text.vocab_size:
        raise SnpatchError(f"config: pad_token_id: expected 0..{text.vocab_size - 1}, got {padding}")
    return None if padding is None or padding < 0 else padding


@torch.inference_mode()
def _run_by_length(
    rows: Sequence[EncodedText], batch_size: int | None, run: Callable[[list[EncodedText]], Tensor]
) -> Tensor:
    """Return run's results [n, labels], float32 on the host, in the rows' order.

    Rows of a batch have similar lengths.
    """
    size = batch_size or DEFAULT_BATCH_SIZE
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    results = torch.cat([run([rows[i] for i in batch]).float().cpu() for batch in batches])
    return results[torch.tensor(order).argsort()]


def _pad(rows: Sequence[EncodedText], padding: int, side: str) -> tuple[Tensor, Tensor]:
    """Return (ids, attention mask), each [B, T]."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, padding, side), pad_sequence(masks, True, 0, side)
