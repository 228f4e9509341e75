"""vLLM's Llama with the head of the Beavertails layout: one row, with a bias if the checkpoint has one.

Why the normalizer is not here: the client process applies it to the scores, for both backends alike.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models.adapters import as_seq_cls_model
from vllm.model_executor.models.llama import LlamaForCausalLM

from snpatch.executors.vllm import processes
from snpatch.executors.vllm.engine_settings import SCORE_BIAS


class SnpatchLlamaForScore(as_seq_cls_model(LlamaForCausalLM)):
    """Pools the last token's final state [T, H] into raw scores [n, 1], in float32 by vLLM's default for heads."""

    def _init_pooler(self, vllm_config: VllmConfig, prefix: str = "") -> DispatchPooler:
        config = vllm_config.model_config
        assert config.pooler_config is not None  # a pooling engine has one
        self.score_head = ReplicatedLinear(
            config.hf_config.hidden_size,
            1,
            bias=getattr(config.hf_config, SCORE_BIAS),
            params_dtype=config.head_dtype,
            return_bias=False,
            prefix="score_head",
        )
        return DispatchPooler.for_seq_cls(config.pooler_config, classifier=self.score_head)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all weights but the normalizer's; the checkpoint's names were checked before vLLM started."""
        return super().load_weights((name, t) for name, t in weights if not name.startswith("normalizer."))


class ScoreWorkerExtension:
    """Commands that vLLM adds to its worker class."""

    def snpatch_exit_with_parent(self) -> None:
        """Make this worker end with the client process."""
        processes.exit_with_parent()
