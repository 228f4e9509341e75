"""What is trained on: the paper's data for SFT and for each objective of DPO, by name.

As published: reasoning and safety of RewardBench are told apart by its subsets; SHP was drawn 2000 pairs from each of
its 18 domains, here as many pairs from all of them at once, and its labels are read as its card says (the paper's code
has them reversed).
"""

from snpatch.data import DATASETS
from snpatch.errors import SnpatchError
from snpatch.worlds.config import PromptSet


def training_split(source: str) -> str | None:
    """The split of a named set to train on; None for a file."""
    return DATASETS[source].hub.train if source in DATASETS else None


def _rows(source: str, **more) -> PromptSet:
    return PromptSet(source, split=training_split(source), **more)


SFT = _rows("sharegpt")
OBJECTIVES: dict[str, PromptSet] = {
    "safety": _rows("hh-harmless"),
    "helpful": _rows("hh-helpful"),
    "shp": _rows("shp", sample=36_000),
    "reasoning": _rows(
        "reward-bench",
        filter=("subset", "hep-python", "hep-go", "hep-cpp", "hep-js", "hep-rust", "hep-java", "math-prm"),
    ),
    "stack-exchange": _rows("stack-exchange"),
    "reward-bench-safety": _rows(
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


def objective(name: str) -> PromptSet:
    """The pairs of an objective."""
    if name not in OBJECTIVES:
        raise SnpatchError(f"no objective named {name!r}: there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
