"""Names that users choose (models, rankings, constants, patches, judges), and the words of patches that none may be.

Why no name may be a word: a donor, a position or a mode is told from a name by its text alone, so that a model called
`zero` would be an ablation in one place and a model in another.
"""

from collections.abc import Iterable
from pathlib import Path

from snpatch.errors import SnpatchError, shown

BASE = "base"  # the model's weights alone
SOURCES = ("zero", "mean", "constant", "noise", "scale", "add")  # donors that are no model, and what stands before one
ROLES = ("recipient", "donor")
MODES = ("replace", "add")  # of constants
POSITIONS = ("all", "prompt", "last_prompt_token", "completion", "completion_shifted")  # of patches
CONTRAST_POSITIONS = ("completion", "completion_shifted", "prompt", "last_prompt_token")
WORDS = {
    **dict.fromkeys(POSITIONS, "a position"),
    **dict.fromkeys(MODES, "a constant's mode"),
    **dict.fromkeys(ROLES, "a role in a patch"),
    **dict.fromkeys(SOURCES, "a donor that is no model"),
    BASE: "the model's weights alone",
}


def check_name(name: object, what: str) -> None:
    """Raise a SnpatchError for what cannot be a name: a word of patches, also before a colon, or no printable text.

    what: the kind of thing that is named, as "a model".
    """
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        raise SnpatchError(
            f"{what}: expected a name of printable characters without spaces around it, got {shown(name)}"
        )
    if (word := name.partition(":")[0]) in WORDS:
        raise SnpatchError(
            f"{what} cannot be named {name!r}: {word} is {WORDS[word]} in patches. Choose another name (name=value on "
            "the command line)."
        )


def check_names(names: Iterable[object], what: str) -> None:
    """Raise a SnpatchError for the first of the names that cannot be one; see check_name."""
    for name in names:
        check_name(name, what)


def split_name(text: str) -> tuple[str, str]:
    """Return name and value of `name=value`, split at the first "="; the name is "" where the text has none.

    A text has no name where it is a path that exists, or has a slash before its first "=".
    """
    name, equals, value = text.partition("=")
    return (name, value) if equals and "/" not in name and not Path(text).exists() else ("", text)


def split_paths(text: str, between: str) -> list[str]:
    """Return the paths of a text with `between` between them, which existing paths may hold, too: the longest first."""
    parts, paths = text.split(between), []
    while parts:
        lengths = range(len(parts), 1, -1)
        n = next((n for n in lengths if Path(between.join(parts[:n])).exists()), 1)
        paths.append(between.join(parts[:n]))
        del parts[:n]
    return paths
