"""What is trained on: the paper's data for SFT and for each objective of DPO, by name.

As published: reasoning and safety of RewardBench are told apart by its subsets; SHP was drawn 2000 pairs from each of
its 18 domains, here as many pairs from all of them at once, and its labels are read as its card says (the paper's code
has them reversed).
"""

from snpatch.data import SETS
from snpatch.errors import SnpatchError
from snpatch.worlds.world import PromptSet

SFT = PromptSet("sharegpt", split="train")
OBJECTIVES: dict[str, PromptSet] = {
    "safety": PromptSet("hh-harmless", split="train"),
    "helpful": PromptSet("hh-helpful", split="train"),
    "shp": PromptSet("shp", split="train", sample=36_000),
    "reasoning": PromptSet(
        "reward-bench",
        split="filtered",
        where=("subset", "hep-python", "hep-go", "hep-cpp", "hep-js", "hep-rust", "hep-java", "math-prm"),
    ),
    "stack-exchange": PromptSet("stack-exchange", split="train"),
    "reward-bench-safety": PromptSet(
        "reward-bench",
        split="filtered",
        where=(
            "subset",
            "refusals-dangerous",
            "refusals-offensive",
            "xstest-should-refuse",
            "xstest-should-respond",
            "donotanswer",
        ),
    ),
}


def objective(name: str) -> PromptSet:
    """The pairs of an objective."""
    if name not in OBJECTIVES:
        raise SnpatchError(f"no objective named {name!r}: there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def training_split(source: str) -> str | None:
    """The split of a named set to train on; None for a file."""
    return SETS[source].hub.train if source in SETS else None
