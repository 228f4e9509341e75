"""Dataclasses from tables (TOML, JSON): what a table may hold is what the dataclass declares, and nothing else.

Why not the dataclass's own constructor: it would take a number for a text, and name neither the file nor the key.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from snpatch.errors import SnpatchError, error_field, nearest, shown

MAX_DEPTH = 100  # of nested tables and lists: what reads them afterwards may call itself once a level
MAX_CONFIG_BYTES = 2**24
MAX_KEY_PARTS = 100  # of a dotted TOML key, for which tomllib takes quadratic time
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


def option(default, help: str, **metadata):
    """A dataclass field that the command line has an option for; metadata: `min`, the least that it may be."""
    return field(default=default, metadata={"help": help, **metadata})


def load_table(path: str | Path, what: str) -> object:
    """Return what a TOML or, by its suffix, a JSON file holds. what: names it in errors."""
    try:
        if Path(path).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        text = Path(path).read_text(encoding="utf-8")
        return parse_json(text) if Path(path).suffix == ".json" else parse_toml(text)
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{what} {path}: cannot be read: {error}") from error


def parse_json(text: str | bytes) -> object:
    """Return what a JSON text holds; ValueError if it is none, or nested deeper than MAX_DEPTH."""
    try:
        return _flat(json.loads(_unmarked(text)))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def parse_toml(text: str) -> dict:
    """Return what a TOML text holds; ValueError if it is none, or nested deeper than MAX_DEPTH."""
    text = _unmarked(text)
    for line in text.splitlines():
        *keys, value = line.split("=")
        if max(part.count(".") for part in keys or [value]) >= MAX_KEY_PARTS:
            raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts")
    try:
        return _flat(tomllib.loads(text))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def _unmarked(text: str | bytes) -> str | bytes:
    """Return a text without the byte order mark that some editors put before it; json takes it off bytes itself."""
    return text.removeprefix("\ufeff") if isinstance(text, str) else text


def _flat(value):
    """Return the value; ValueError where it is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = list(chain.from_iterable(nested))
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def from_dict(kind: type, where: str, values: object):
    """An instance of a dataclass from a table; keys that it does not have, or lacks, and wrong types are errors.

    Lists become tuples, and so does a single value where a tuple of any length is wanted.
    """
    if not isinstance(values, Mapping):
        raise SnpatchError(f"{where}: wanted a table, got {shown(values)}")
    known = [f.name for f in fields(kind)]
    if unknown := sorted(map(str, values.keys() - set(known))):
        message = f"{where}: there is no {', '.join(unknown)}; there are {', '.join(known)}"
        message += "".join(f". Did you mean {name}?" for name in nearest(unknown[0], known)[:1])
        raise SnpatchError(message, field=unknown[0])
    if missing := [name for name in required(kind) if name not in values]:
        raise SnpatchError(f"{where}: {', '.join(missing)} is missing", field=missing[0])
    hints, coerced = get_type_hints(kind), {}
    for name, value in values.items():
        with error_field(name):
            coerced[name] = coerce(value, hints[name], f"{where}: {name}")
    return kind(**coerced)


def required(kind: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def coerce(value: object, hint: object, where: str):
    """A value as the type hint wants it."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    bases = [get_origin(kind) or kind for kind in kinds]
    plain = tuple(base for base in bases if base is not tuple)
    if isinstance(value, bool):
        is_plain = bool in plain or object in plain
    else:
        is_plain = isinstance(value, plain) or (float in plain and type(value) is int)
    if is_plain:
        return value
    for kind, base in zip(kinds, bases, strict=True):
        if base is tuple:
            *each, last = get_args(kind)
            if last is Ellipsis:
                given = tuple(value) if isinstance(value, list | tuple) else (value,)
                return tuple(coerce(one, each[0], where) for one in given)
            if isinstance(value, list | tuple) and len(value) == len(each) + 1:
                return tuple(coerce(one, wanted, where) for one, wanted in zip(value, (*each, last), strict=True))
        elif is_dataclass(base) and isinstance(value, Mapping):
            return from_dict(base, where, value)
    names = " or ".join(_named(kind) for kind in kinds if kind is not NoneType)
    raise SnpatchError(f"{where}: wanted {names}, got {shown(value)}")


def json_schema(kind: type) -> dict:
    """Return the JSON Schema of the tables that `from_dict` reads. From a field's metadata: `help` and `min`."""
    hints, properties = get_type_hints(kind), {}
    for f in fields(kind):
        properties[f.name] = _schema_of(hints[f.name])
        if "help" in f.metadata:
            properties[f.name]["description"] = f.metadata["help"]
        if "min" in f.metadata:
            properties[f.name]["minimum"] = f.metadata["min"]
        if f.default is not MISSING and not isinstance(f.default, tuple):
            properties[f.name]["default"] = f.default
    return {"type": "object", "properties": properties, "required": required(kind), "additionalProperties": False}


def _schema_of(hint: object) -> dict:
    if isinstance(hint, UnionType):
        return {"anyOf": [_schema_of(kind) for kind in get_args(hint)]}
    if get_origin(hint) is tuple:
        *each, last = get_args(hint)
        if last is Ellipsis:
            return {"type": "array", "items": _schema_of(each[0])}
        items = [_schema_of(one) for one in (*each, last)]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return json_schema(hint) if is_dataclass(hint) else {"type": JSON_TYPES[hint]}


def _named(kind: object) -> str:
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_named, get_args(kind)))}]"
    return getattr(kind, "__name__", str(kind))
