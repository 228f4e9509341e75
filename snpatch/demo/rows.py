"""Rows to train the demo model's pairs on, as files that `snpatch train` reads."""

from collections.abc import Iterable
from pathlib import Path

from snpatch.demo.build import Recipe
from snpatch.demo.corpus import OBJECTIVES, preferences, sft_rows
from snpatch.errors import SnpatchError
from snpatch.report.files import write_records

SHIPPED = {"safety": "dpo"}  # an objective's name here -> in the corpus


def write_rows(folder: Path, names: Iterable[str], seed: int = 0) -> list[Path]:
    """Write NAME.jsonl of each name: "sft" or an objective (safety, helpful, careful). As many as the world's own."""
    recipe, paths = Recipe(), []
    for name in names:
        objective = SHIPPED.get(name, name)
        if name != "sft" and objective not in OBJECTIVES:
            raise SnpatchError(f"the demo's language has no objective {name}: it has safety, helpful, careful")
        rows = sft_rows(recipe.sft_rows, seed) if name == "sft" else preferences(objective, recipe.dpo_rows, seed)
        paths.append(folder / f"{name}.jsonl")
        write_records(rows, paths[-1])
    return paths
