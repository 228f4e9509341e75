"""The numbers that the paper reports, from published.toml."""

import tomllib
from functools import cache
from pathlib import Path

from snpatch.config import check_choice

COMMON_DEVIATIONS = "all"  # key of the deviations that concern every figure


@cache
def read_numbers() -> dict:
    """Return all numbers that the paper reports, by group."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def list_models() -> list[str]:
    """Return the names of the paper's models."""
    return list(read_numbers()["share"])


def list_deviations(experiment: str) -> list[str]:
    """Return what the paper's presets do unlike the paper in an experiment, or in all of them ("all")."""
    return read_numbers()["deviations"].get(experiment, [])


def check_paper_model(model: str | None) -> None:
    """Raise if a model is not one of the paper's."""
    if model is not None:
        check_choice("published", model, list_models())
