"""The numbers that the paper reports, from published.toml."""

import tomllib
from functools import cache
from pathlib import Path

from snpatch.errors import SnpatchError


@cache
def numbers() -> dict:
    """All that the paper reports, as published.toml has it."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def models() -> list[str]:
    """The paper's models."""
    return [name for name in numbers()["transfer"] if name not in ("table", "columns")]


def check_known(model: str | None) -> None:
    """An error for a model that the paper does not have."""
    if model is not None and model not in models():
        raise SnpatchError(f"published: there are {', '.join(models())}, got {model!r}")
