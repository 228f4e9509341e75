"""Values whose type allows None and that are not None where they are read."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that cannot be None here."""
    assert value is not None
    return value
