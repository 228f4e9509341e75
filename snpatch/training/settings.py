"""Settings of SFT and DPO training, importable without TRL.

The defaults are the paper's recipe for IA3. The values for LoRA (rank 64 on q_proj and v_proj) and full fine-tuning are
those of its published scripts; the learning rate of full DPO is Tulu 2's.
"""

from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.utils import schema
from snpatch.utils.schema import option

METHODS = ("ia3", "lora", "full")
TEMPLATES = ("tulu", "tokenizer")
DTYPES = ("auto", "bfloat16", "float32")
SFT_LEARNING_RATES = {"ia3": 1e-3, "lora": 2e-5, "full": 2e-5}
DPO_LEARNING_RATES = {"ia3": 1e-3, "lora": 2e-5, "full": 5e-7}


@dataclass(frozen=True)
class TrainSettings:
    """Settings that SFT and DPO share: all that determines the trained weights except model and data.

    Raises:
        SnpatchError: A value is out of its range, or two values exclude each other.
    """

    method: str = option(
        "ia3", "Training method: ia3 (scaling vectors on down_proj), lora, or full (all weights).", choices=METHODS
    )
    learning_rate: float | None = option(
        None, "Peak learning rate. Default: 1e-3 for ia3, 2e-5 for lora and full (DPO with full: 5e-7).", above=0
    )
    epochs: float = option(3.0, "Number of epochs.", above=0)
    batch_size: int = option(120, "Sequences (SFT) or pairs (DPO) per optimizer step, over all processes.", min=1)
    micro_batch_size: int = option(4, "Per-device batch size; gradients accumulate up to --batch-size.", min=1)
    max_length: int = option(4096, "Maximum sequence length in tokens; longer rows are truncated and counted.", min=2)
    weight_decay: float = option(0.1, "AdamW weight decay.", min=0)
    weight_decay_target: float = option(
        0.0, "Value that weight decay pulls IA3 scales towards: 0 (as published) or 1 (no change).", choices=(0, 1)
    )
    lr_scheduler_type: str = option(
        "cosine", "Learning-rate schedule: cosine, linear, constant, ... (transformers `SchedulerType`)."
    )
    warmup_steps: int = option(0, "Number of learning-rate warmup steps.", min=0)
    dtype: str = option(
        "auto", "Frozen weights: bfloat16, float32, or auto (bfloat16 on a GPU, float32 on a CPU).", choices=DTYPES
    )
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass to save memory.")
    template: str = option("tulu", "Chat template: tulu, or tokenizer (the tokenizer's own).", choices=TEMPLATES)
    lora_rank: int = option(64, "LoRA rank; alpha equals the rank.", min=1)
    lora_targets: tuple[str, ...] = option(("q_proj", "v_proj"), "Linear modules that get a LoRA.")
    max_dropped: float = option(0.1, "Maximum fraction of rows dropped as uninformative; more is an error.", min=0)
    seed: int = option(42, "Random seed of the row order and of LoRA initialization.", min=0)

    def __post_init__(self) -> None:
        schema.validate(self)
        if self.weight_decay_target and self.method != "ia3":
            raise SnpatchError(
                f"weight_decay_target: expected 0 with method = {self.method}, got 1. Only IA3 scales are 1 where "
                "nothing changes"
            )
        if self.batch_size % self.micro_batch_size:
            raise SnpatchError(
                f"micro_batch_size: expected a divisor of batch_size = {self.batch_size}, got {self.micro_batch_size}"
            )

    @property
    def peak_learning_rate(self) -> float:
        """Return `learning_rate`, or the method's default."""
        return SFT_LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """Settings of DPO.

    With `as_published`, as in the paper's code, the SFT vectors are multiplied into the weights in the weights' dtype
    and DPO's vectors start at 1. The reference is then that rounded model, which differs from the SFT model that
    engines run.
    """

    beta: float = option(0.1, "DPO beta: how strongly the policy is held to the reference model.", above=0)
    max_prompt_length: int = option(
        2048, "Maximum prompt length in tokens; pairs with longer prompts are dropped and counted.", min=1
    )
    as_published: bool = option(False, "Train IA3 as the paper's code does: SFT merged into the weights and rounded.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_published and self.method != "ia3":
            raise SnpatchError(f"as_published: expected method = ia3, got {self.method}")

    @property
    def peak_learning_rate(self) -> float:
        """Return `learning_rate`, or the method's default for DPO, which with `full` is lower than SFT's."""
        return DPO_LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
