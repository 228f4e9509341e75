"""Dataclasses from tables (TOML, JSON): what a table may hold is what the dataclass declares, and nothing else.

Why not the dataclass's own constructor: it would take a number for a text, and name neither the file nor the key.
"""

from collections.abc import Mapping
from dataclasses import field, fields
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from snpatch.errors import SnpatchError


def option(default, help: str, **metadata):
    """A dataclass field that the command line has an option for; metadata: `min`, the least that it may be."""
    return field(default=default, metadata={"help": help, **metadata})


def read(kind: type, where: str, values: object):
    """An instance of a dataclass from a table; keys that it does not have, or lacks, and wrong types are errors.

    Lists become tuples, and so does a single value where a tuple is wanted.
    """
    if not isinstance(values, Mapping):
        raise SnpatchError(f"{where}: wanted a table, got {values!r}")
    known = [f.name for f in fields(kind)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise SnpatchError(f"{where}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: value_of(value, hints[name], f"{where}: {name}") for name, value in values.items()})
    except TypeError as error:
        raise SnpatchError(f"{where}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}") from error


def value_of(value: object, hint: object, where: str):
    """A value as the type hint wants it."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    bases = [get_origin(kind) or kind for kind in kinds]
    if tuple in bases:
        each = tuple(value) if isinstance(value, list | tuple) else (value,)
        (inner,) = (get_args(kind) for kind in kinds if get_origin(kind) is tuple)
        return tuple(value_of(one, inner[0], where) for one in each)
    if not isinstance(value, tuple(bases)) and not (float in bases and type(value) is int):
        names = " or ".join(base.__name__ for base in bases if base is not type(None))
        raise SnpatchError(f"{where}: wanted {names}, got {value!r}")
    return value
