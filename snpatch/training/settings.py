"""What SFT and DPO are told. Why apart from the training: a recipe can be read and written without trl."""

from dataclasses import dataclass

from snpatch.errors import SnpatchError


@dataclass(frozen=True)
class TrainSettings:
    """What SFT and DPO have in common; the defaults are the paper's."""

    learning_rate: float = 1e-3
    epochs: float = 3
    batch_size: int = 120  # sequences (SFT) or pairs (DPO) an optimiser step
    micro_batch_size: int = 4  # of them in memory at once; must divide batch_size
    max_length: int = 4096  # tokens
    weight_decay: float = 0.1  # pulls an IA3 vector towards 0, not towards 1
    schedule: str = "cosine"
    warmup_steps: int = 0
    bf16: bool = True
    gradient_checkpointing: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise SnpatchError(
                f"micro_batch_size must divide batch_size, got {self.micro_batch_size} and {self.batch_size}"
            )


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """DPO's own settings; the defaults are the paper's."""

    beta: float = 0.1
    max_prompt_length: int = 2048  # tokens; pairs with a longer prompt are left out
