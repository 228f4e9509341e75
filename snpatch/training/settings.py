"""What SFT and DPO are told. Why apart from the training: a recipe can be read and written without trl.

The defaults are the paper's recipe for IA3; LoRA's and full fine-tuning's are those of its published scripts (LoRA:
rank 64 on q_proj and v_proj) and, for DPO on all weights, Tulu 2's learning rate.
"""

from dataclasses import dataclass, fields

from snpatch.errors import SnpatchError
from snpatch.schema import option

METHODS = ("ia3", "lora", "full")
SFT_RATES = {"ia3": 1e-3, "lora": 2e-5, "full": 2e-5}
DPO_RATES = {"ia3": 1e-3, "lora": 2e-5, "full": 5e-7}


@dataclass(frozen=True)
class TrainSettings:
    """What SFT and DPO have in common: everything that the trained weights hang on, but the model and the data."""

    method: str = option("ia3", "What is trained: ia3 (vectors on down_proj), lora, or full (all weights).")
    learning_rate: float | None = option(None, "Peak. Default: 1e-3 for ia3, 2e-5 for lora and full (DPO: 5e-7).")
    epochs: float = option(3.0, "How often each row is read.")
    batch_size: int = option(120, "Sequences (SFT) or pairs (DPO) an optimiser step, over all processes.", min=1)
    micro_batch_size: int = option(4, "Of them in a process's memory at once.", min=1)
    max_length: int = option(4096, "Tokens of a sequence; what is longer is cut, and counted.", min=2)
    weight_decay: float = option(0.1, "AdamW's.", min=0)
    weight_decay_target: float = option(
        0.0, "What weight decay pulls an IA3 scale towards: 0 (as published), or 1 (no change)."
    )
    lr_scheduler_type: str = option(
        "cosine", "Of the learning rate, a name of transformers': cosine, linear, constant, ..."
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises.", min=0)
    dtype: str = option("auto", "Of the frozen weights: bfloat16, float32; auto: bfloat16 on a GPU, float32 on a CPU.")
    gradient_checkpointing: bool = option(True, "Compute activations again rather than keep them.")
    template: str = option("tulu", "How chats become text: tulu, or tokenizer (its own template).")
    lora_rank: int = option(64, "LoRA's rank; its alpha is the same.", min=1)
    lora_targets: tuple[str, ...] = option(("q_proj", "v_proj"), "Linear layers that a LoRA is put on.")
    max_dropped: float = option(0.1, "Share of the rows that may be left out as useless; more is an error.", min=0)
    seed: int = option(42, "Of the order of the rows and of a LoRA's start.", min=0)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SnpatchError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.template not in ("tulu", "tokenizer"):
            raise SnpatchError(f"template must be tulu or tokenizer, got {self.template!r}")
        if self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise SnpatchError(
                f"micro_batch_size must divide batch_size, got {self.micro_batch_size} and {self.batch_size}"
            )
        if self.weight_decay_target not in (0, 1):
            raise SnpatchError(f"weight_decay_target must be 0 or 1, got {self.weight_decay_target}")
        if self.weight_decay_target and self.method != "ia3":
            raise SnpatchError(
                f"weight_decay_target = 1 is for ia3, whose scales are 1 where nothing changes; method is {self.method}"
            )
        if self.epochs <= 0:
            raise SnpatchError(f"epochs must be more than 0, got {self.epochs}")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise SnpatchError(f"learning_rate must be more than 0, got {self.learning_rate}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise SnpatchError(f"dtype must be auto, bfloat16 or float32, got {self.dtype!r}")
        for f in fields(self):
            least, value = f.metadata.get("min"), getattr(self, f.name)
            if least is not None and value < least:
                raise SnpatchError(f"{f.name} must be at least {least}, got {value}")

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return SFT_RATES[self.method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """DPO's own settings.

    as_published: as the paper's code has it, the SFT vectors are multiplied into the weights, in the weights' type, and
    DPO's start at 1; the reference is that model, which is not the SFT model as it is served.
    """

    beta: float = option(0.1, "How strongly the policy is held to its reference.")
    max_prompt_length: int = option(2048, "Tokens; pairs with a longer prompt are left out, and counted.", min=1)
    as_published: bool = option(False, "IA3 as the paper's code trains it: SFT merged into the weights and rounded.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise SnpatchError(f"beta must be more than 0, got {self.beta}")
        if self.as_published and self.method != "ia3":
            raise SnpatchError(f"as_published is for ia3, method is {self.method}")

    @property
    def rate(self) -> float:
        return DPO_RATES[self.method] if self.learning_rate is None else self.learning_rate
