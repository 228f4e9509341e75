"""The paper's training data: one dataset for SFT and one per DPO objective.

Two differences from the paper's code: it draws 2000 SHP pairs from each of 18 domains, here the same number is drawn
from all domains together; and it reverses the labels of SHP, here they are read as the data card says. The reasoning
and safety objectives are subsets of RewardBench, as published.
"""

from snpatch.config import check_choice
from snpatch.data import DATASETS
from snpatch.data.prompt_set import PromptSet
from snpatch.utils.optional import require


def training_split(source: str) -> str | None:
    """Return the training split of a named dataset; None for a file."""
    return require(DATASETS[source].hub).train if source in DATASETS else None


def _training_set(source: str, **more) -> PromptSet:
    return PromptSet(source, split=training_split(source), **more)


SFT = _training_set("sharegpt")
OBJECTIVES: dict[str, PromptSet] = {
    "safety": _training_set("hh-harmless"),
    "helpful": _training_set("hh-helpful"),
    "harmless-helpful": _training_set("hh"),
    "shp": _training_set("shp", sample=36_000),
    "reasoning": _training_set(
        "reward-bench",
        filter=("subset", "hep-python", "hep-go", "hep-cpp", "hep-js", "hep-rust", "hep-java", "math-prm"),
    ),
    "stack-exchange": _training_set("stack-exchange"),
    "reward-bench-safety": _training_set(
        "reward-bench",
        filter=(
            "subset",
            "refusals-dangerous",
            "refusals-offensive",
            "xstest-should-refuse",
            "xstest-should-respond",
            "donotanswer",
        ),
    ),
}


def get_objective(name: str) -> PromptSet:
    """Return the preference data of an objective."""
    check_choice("objective", name, tuple(OBJECTIVES))
    return OBJECTIVES[name]
