"""Values whose type allows None, in places where they are not None."""

from typing import TypeVar

T = TypeVar("T")


def require(value: T | None) -> T:
    """Return a value that cannot be None here."""
    assert value is not None
    return value
