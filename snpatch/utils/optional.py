"""Optional values and packages: values that are not None in some places, and how to install an extra's packages."""

import re
from importlib.metadata import PackageNotFoundError, requires
from typing import TypeVar

T = TypeVar("T")


def require(value: T | None) -> T:
    """Return a value that cannot be None here."""
    assert value is not None
    return value


def install_hint(extra: str) -> str:
    """Return the command that installs the packages of an extra of snpatch.

    snpatch itself is on no package index.
    """
    try:
        entries = [entry.split(";") for entry in requires("snpatch") or ()]
    except PackageNotFoundError:  # run from a checkout that is not installed
        entries = []
    is_of_extra = re.compile(rf"""extra == ['"]{extra}['"]""")
    packages = [package.strip() for package, *marker in entries if is_of_extra.search("".join(marker))]
    # An extra that is part of another one has packages that vLLM brings.
    quoted = [f"'{package}'" for package in packages if not package.startswith("snpatch[")]
    if not quoted:
        return f"pip install --no-build-isolation '.[{extra}]' (in snpatch's checkout)"
    return " ".join(["pip install", *quoted])
