"""Names that users choose (models, rankings, constants, patches, judges), and the reserved words of patches.

Words are reserved because a donor, a position or a mode differs from a name by its text alone: a model called `zero`
would be an ablation in one place and a model in another.
"""

from collections.abc import Iterable

from snpatch.errors import SnpatchError, shown

BASE = "base"  # the model without adapters
SOURCES = ("zero", "mean", "constant", "noise", "scale", "add")  # donors that are no models, and their prefix
ROLES = ("recipient", "donor")
MODES = ("replace", "add")  # of constants
POSITIONS = ("all", "prompt", "last_prompt_token", "completion", "completion_shifted")  # of patches
CONTRAST_POSITIONS = ("completion", "completion_shifted", "prompt", "last_prompt_token")
WORDS = {
    **dict.fromkeys(POSITIONS, "a position"),
    **dict.fromkeys(MODES, "a constant's mode"),
    **dict.fromkeys(ROLES, "a role in a patch"),
    **dict.fromkeys(SOURCES, "a donor that is no model"),
    BASE: "the model without adapters",
}


def check_name(name: object, what: str) -> None:
    """Raise for a reserved word of patches, also before a colon, and for text that is not printable.

    what: the kind of thing that is named, such as "a model".
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
    """Raise for the first name that is not allowed; see check_name."""
    for name in names:
        check_name(name, what)
