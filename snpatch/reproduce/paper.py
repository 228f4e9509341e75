"""The numbers that the paper reports, from published.toml."""

import tomllib
from functools import cache
from pathlib import Path

from snpatch.config import check_choice


@cache
def read_numbers() -> dict:
    """Return all numbers that the paper reports."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def list_models() -> list[str]:
    """Return the names of the paper's models."""
    return [name for name in read_numbers()["transfer"] if name not in ("table", "columns")]


def check_paper_model(model: str | None) -> None:
    """Raise if a model is not one of the paper's."""
    if model is not None:
        check_choice("published", model, list_models())
