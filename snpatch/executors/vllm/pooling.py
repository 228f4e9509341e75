"""Score models in vLLM's pooling runner: token ids to the raw logits of their last token.

Besides vLLM's own classifiers it runs the layout of `plugin.SCORE_ARCHITECTURE`, a Llama with a one-row head. Why it
reserves little memory: it often shares a GPU with the engine whose completions it scores.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import versions
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_engine
from snpatch.executors.vllm.engine_settings import SCORE_BIAS
from snpatch.executors.vllm.launch import engine_arguments
from snpatch.executors.vllm.worker import plugin

CACHE_TOKENS = 16384  # size of the KV cache, or one sequence of the longest length
GPU_HEADROOM_BYTES = 3 << 30  # for activations and vLLM itself


class PoolingEngine:
    """Started pooling engine; heads are computed in float32.

    Args:
        model: Folder or name of the model.
        config: Its transformers config.
        dtype: Dtype of the weights; "auto" is the checkpoint's.
        batch_size: vLLM's max_num_seqs.
        has_bias: For the layout of `plugin.SCORE_ARCHITECTURE`, whether the head has a bias; None for other layouts.
        arguments: vLLM's engine arguments. Without gpu_memory_utilization the engine reserves what the model needs.
    """

    def __init__(
        self, model: str, config, *, dtype: str, batch_size: int | None, has_bias: bool | None, **arguments
    ) -> None:
        versions.check()
        if batch_size is not None:
            if "max_num_seqs" in arguments:
                raise SnpatchError("backend vllm: batch_size: expected no max_num_seqs with it, got both. Pass one.")
            arguments["max_num_seqs"] = batch_size
        fixed: dict[str, Any] = {
            "dtype": str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype,
            "runner": "pooling",
            "worker_extension_cls": "snpatch.executors.vllm.worker.score_head.ScoreWorkerExtension",
        }
        if has_bias is not None:
            layout = {"architectures": [plugin.SCORE_ARCHITECTURE], SCORE_BIAS: has_bias}
            fixed["hf_overrides"] = {**layout, **arguments.pop("hf_overrides", {})}
        checked = engine_arguments(model, fixed, arguments, refused=("convert", "pooler_config"))
        self._request_numbers = count(1)
        self._engine, self._end = _start(model, {**_memory(config, checked), **checked})

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return logits [rows, labels] float32 of the last token of each row."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        logits: dict[int, Tensor] = {}
        running: dict[str, int] = {}
        try:
            for index, row in enumerate(rows):
                name = f"snpatch-{next(self._request_numbers)}"
                running[name] = index
                params = PoolingParams(task="classify", use_activation=False)
                self._engine.add_request(name, tokens_input(list(row)), params)
            while running:
                for result in self._engine.step():
                    logits[running.pop(result.request_id)] = result.outputs.data
        except EngineDeadError as error:
            raise engine_dead_error() from error
        except BaseException:
            with suppress(EngineDeadError):
                self._engine.abort_request(list(running))
            raise
        return torch.stack([logits[index] for index in range(len(rows))]).float()

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self._end.close()


def _start(model: str, arguments: dict) -> tuple[Any, ExitStack]:
    """Start an engine; return it and an ExitStack that ends it.

    Its processes end with the client process.
    """
    from vllm.engine.arg_utils import EngineArgs

    engine, end = start_engine(EngineArgs(**arguments), _check_supported)
    try:
        engine.collective_rpc("snpatch_exit_with_parent")
        if "classify" not in engine.get_supported_tasks():
            raise SnpatchError(f"{model}: vLLM does not support it as a classifier. Use backend='transformers'.")
    except BaseException:
        end.close()
        raise
    return engine, end


def _check_supported(vllm_config) -> None:
    if vllm_config.parallel_config.data_parallel_size > 1:
        size = vllm_config.parallel_config.data_parallel_size
        raise SnpatchError(f"data_parallel_size: expected 1 for a score model, got {size}")


def _memory(config, arguments: dict) -> dict:
    """Return the engine argument with which vLLM reserves memory for weights, KV cache and some headroom."""
    from vllm.platforms import current_platform

    text_config, item_bytes = config.get_text_config(), getattr(torch, arguments["dtype"]).itemsize
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    token_bytes = 2 * text_config.num_hidden_layers * kv_heads * head * item_bytes
    num_tokens = max(CACHE_TOKENS, arguments["max_model_len"])
    cache_bytes = arguments.get("kv_cache_memory_bytes", num_tokens * token_bytes)
    if current_platform.is_cpu():
        return {} if "gpu_memory_utilization" in arguments else {"kv_cache_memory_bytes": cache_bytes}
    with torch.device("meta"):
        num_parameters = AutoModelForSequenceClassification.from_config(config).num_parameters()
    total_bytes = num_parameters * item_bytes + cache_bytes
    gpu_bytes = total_bytes / arguments.get("tensor_parallel_size", 1) + GPU_HEADROOM_BYTES
    return {"gpu_memory_utilization": min(0.9, gpu_bytes / current_platform.get_device_total_memory())}
