"""Parsing of `name=value` options, and of several paths in one value.

Paths that exist are recognized first, because their names may contain the separators.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from snpatch.errors import SnpatchError


def parse_pairs(
    entries: Iterable[str] | None,
    option: str,
    *,
    expected: str = "name=value",
    default_name: Callable[[str], str] | None = None,
) -> dict[str, str]:
    """Parse repeated `name=value` options.

    Args:
        entries: Values of the option, split at the first "=" (but not inside a path, see split_name).
        option: Names the option in errors.
        expected: The form, for errors.
        default_name: Gives the name of a value that has none. None: each value needs a name.

    Raises:
        SnpatchError: A name or a value is missing, or a name is given twice.
    """
    values = {}
    for entry in entries or ():
        name, value = split_name(entry, has_name=default_name is None)
        if not name and default_name is not None and value:
            name = default_name(value)
        if not name or not value:
            raise SnpatchError(f"{option}: expected {expected}, got {entry!r}")
        if name in values:
            raise SnpatchError(f"{option}: expected each name once, got {name!r} twice. Give {expected}.")
        values[name] = value
    return values


def split_name(text: str, *, has_name: bool = False) -> tuple[str, str]:
    """Return name and value of `name=value`, split at the first "="; the name is "" if there is none.

    A path that exists has no name. Unless `has_name`, neither has a text with a slash before its first "=".
    """
    name, equals, value = text.partition("=")
    is_path = ("/" in name and not has_name) or Path(text).exists()
    return (name, value) if equals and not is_path else ("", text)


def split_paths(text: str, between: str) -> list[str]:
    """Return the paths of a text, separated by `between`; the longest path that exists is one path."""
    parts, paths = text.split(between), []
    while parts:
        lengths = range(len(parts), 1, -1)
        n = next((n for n in lengths if Path(between.join(parts[:n])).exists()), 1)
        paths.append(between.join(parts[:n]))
        del parts[:n]
    return paths
