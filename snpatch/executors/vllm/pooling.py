"""Rows of ids in, raw logits of their last token out: vLLM's pooling runner, for models that vLLM knows and one more.

That one is the layout of `plugin.SCORE`, a Llama with a one-row head. Why it asks for little memory: it stands beside
the engine whose texts it reads, often on the same GPU.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import count

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from snpatch.errors import SnpatchError
from snpatch.executors.vllm import versions
from snpatch.executors.vllm.engine_lifecycle import engine_dead_error, start_engine
from snpatch.executors.vllm.launch import engine_arguments
from snpatch.executors.vllm.settings import SCORE_BIAS
from snpatch.executors.vllm.worker import plugin

CACHED_TOKENS = 16384  # keys and values of that many tokens, or of one longest text
HEADROOM = 3 << 30  # bytes of a GPU, for activations and vLLM itself


class PoolingEngine:
    """A started engine. config: the model's; has_bias: of a model in the layout of `plugin.SCORE`, None for any other.

    batch_size: vLLM's max_num_seqs. All further arguments are vLLM's own engine arguments; without
    gpu_memory_utilization it takes what the model needs. Heads are computed in float32.
    """

    def __init__(
        self, model: str, config, *, dtype: str, batch_size: int | None, has_bias: bool | None, **arguments
    ) -> None:
        versions.check()
        if batch_size is not None:
            if "max_num_seqs" in arguments:
                raise SnpatchError("backend vllm: batch_size is max_num_seqs; give one of them")
            arguments["max_num_seqs"] = batch_size
        own = {
            "dtype": str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype,
            "runner": "pooling",
            "worker_extension_cls": "snpatch.executors.vllm.worker.score_head.WorkerExtension",
        }
        if has_bias is not None:
            layout = {"architectures": [plugin.SCORE], SCORE_BIAS: has_bias}
            own["hf_overrides"] = {**layout, **arguments.pop("hf_overrides", {})}
        checked = engine_arguments(model, own, arguments, refused=("convert", "pooler_config"))
        self._numbers = count(1)
        self._engine, self._end = _start(model, {**_memory(config, checked), **checked})

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[rows, labels] float32, in the rows' order."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        logits: list[Tensor | None] = [None] * len(rows)
        running: dict[str, int] = {}
        try:
            for index, row in enumerate(rows):
                name = f"snpatch-{next(self._numbers)}"
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
        return torch.stack(logits).float()

    def close(self) -> None:
        """Stop vLLM and its processes."""
        self._end.close()


def _start(model: str, arguments: dict):
    """The engine, whose processes end with the user's, and what closed ends it."""
    from vllm.engine.arg_utils import EngineArgs

    engine, end = start_engine(EngineArgs(**arguments), _refuse)
    try:
        engine.collective_rpc("snpatch_watch")
        if "classify" not in engine.get_supported_tasks():
            raise SnpatchError(f"{model}: vLLM does not know it as a classifier; use backend='transformers'")
    except BaseException:
        end.close()
        raise
    return engine, end


def _refuse(vllm_config) -> None:
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise SnpatchError("a pooling model is one engine: data_parallel_size must be 1")


def _memory(config, arguments: dict) -> dict:
    """The engine argument that makes vLLM take what the model needs: weights, keys and values, and some headroom."""
    from vllm.platforms import current_platform

    text, size = config.get_text_config(), getattr(torch, arguments["dtype"]).itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    a_token = 2 * text.num_hidden_layers * kv_heads * head * size
    cache = arguments.get("kv_cache_memory_bytes", max(CACHED_TOKENS, arguments["max_model_len"]) * a_token)
    if current_platform.is_cpu():
        return {} if "gpu_memory_utilization" in arguments else {"kv_cache_memory_bytes": cache}
    with torch.device("meta"):
        weights = AutoModelForSequenceClassification.from_config(config).num_parameters() * size
    share = (weights + cache) / arguments.get("tensor_parallel_size", 1) + HEADROOM
    return {"gpu_memory_utilization": min(0.9, share / current_platform.get_device_total_memory())}
