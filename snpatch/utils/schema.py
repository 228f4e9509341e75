"""Frozen dataclasses as schemas of tables (TOML, JSON): reading, limits of values, and JSON Schema.

The dataclass's own constructor is not used directly, because it would accept a number for a text and its errors would
name neither the file nor the key.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from snpatch.errors import SnpatchError, error_field, nearest, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_DEPTH = 100  # nested tables and lists, because their readers may recurse once per level
MAX_CONFIG_BYTES = 2**24
MAX_KEY_PARTS = 100  # of a dotted TOML key; tomllib takes quadratic time for them
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


def option(default, help: str, **metadata) -> Any:
    """Declare a dataclass field that is an option of the command line.

    Args:
        default: Default value.
        help: Help of the option, and description in the JSON Schema.
        metadata: `min`, `max`, `above`, `below` or `choices` of the value; see `validate`.
    """
    return field(default=default, metadata={"help": help, **metadata})


def validate(config: "DataclassInstance", name: str = "") -> None:
    """Raise SnpatchError for the first field of another type, or outside the limits of its metadata.

    The types are those of `check_argument`. The limits are `min` and `max` (inclusive), `above` and `below`
    (exclusive), and `choices` (of each item of a tuple); they do not hold for None.
    name: of the dataclass in errors, for example "sampling: ".
    """
    hints = _get_hints(type(config))
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        with error_field(f.name):
            check_argument(value, hints[f.name], f"{name}{f.name}")
        if value is None:
            continue
        for choice in value if isinstance(value, tuple) else (value,):
            if "choices" in limits and choice not in limits["choices"]:
                choices = ", ".join(map(str, limits["choices"]))
                raise SnpatchError(f"{name}{f.name}: expected one of {choices}, got {choice!r}", field=f.name)
        if "min" in limits and not value >= limits["min"]:
            raise SnpatchError(f"{name}{f.name}: expected at least {limits['min']}, got {value}", field=f.name)
        if "max" in limits and not value <= limits["max"]:
            raise SnpatchError(f"{name}{f.name}: expected at most {limits['max']}, got {value}", field=f.name)
        if "above" in limits and not value > limits["above"]:
            raise SnpatchError(f"{name}{f.name}: expected more than {limits['above']}, got {value}", field=f.name)
        if "below" in limits and not value < limits["below"]:
            raise SnpatchError(f"{name}{f.name}: expected less than {limits['below']}, got {value}", field=f.name)


def check_argument(value: object, hint: Any, name: str) -> Any:
    """Return a Python caller's value as `coerce` does; scalars of numpy and torch become Python's."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return coerce(cast(Any, value).item() if is_scalar else value, hint, name)


def check_ints(values: object, name: str) -> list[int]:
    """Return whole numbers of a list, range or array.

    Raises:
        SnpatchError: It is anything else, one number included.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise SnpatchError(f"{name}: expected a list of whole numbers, got {shown(values)}")
    return [check_argument(value, int, name) for value in values]


def load_table(path: str | Path, what: str) -> object:
    """Return the content of a TOML file, or of a JSON file by its suffix. what: names it in errors."""
    try:
        if Path(path).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        text = Path(path).read_text(encoding="utf-8")
        return parse_json(text) if Path(path).suffix == ".json" else parse_toml(text)
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{what} {path}: cannot be read: {error}") from error


def parse_json(text: str | bytes, decode: Callable[[Any], object] = json.loads) -> object:
    """Parse JSON. Raise ValueError if it is invalid, or nested deeper than MAX_DEPTH.

    decode: `decode` of a JSONDecoder of the caller's.
    """
    try:
        # A byte order mark; json itself removes it from bytes.
        text = text.removeprefix("\ufeff") if isinstance(text, str) else text
        return _check_depth(decode(text))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def parse_toml(text: str) -> dict:
    """Parse TOML. Raise ValueError if it is invalid, or nested deeper than MAX_DEPTH."""
    text = text.removeprefix("\ufeff")
    for line in text.splitlines():
        *keys, value = line.split("=")
        if max(part.count(".") for part in keys or [value]) >= MAX_KEY_PARTS:
            raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts")
    try:
        return _check_depth(tomllib.loads(text))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def _check_depth(value):
    """Return the value. Raise ValueError if it is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = list(chain.from_iterable(nested))
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def from_dict(kind: type, context: str, values: object):
    """Build a dataclass from a table.

    Lists become tuples, and so does a single value of a field that is a tuple of any length.

    Args:
        kind: The dataclass.
        context: Names the table in errors.
        values: The table.

    Raises:
        SnpatchError: An unknown or missing key, or a value of another type. Its `field` is the key's path.
    """
    if not isinstance(values, Mapping):
        raise SnpatchError(f"{context}: expected a table, got {shown(values)}")
    check_keys(values, [f.name for f in fields(kind)], f"{context}: ")
    if missing := [name for name in required(kind) if name not in values]:
        raise SnpatchError(f"{context}: {', '.join(missing)} is missing", field=missing[0])
    hints, coerced = _get_hints(kind), {}
    for name, value in values.items():
        with error_field(name):
            coerced[name] = coerce(value, hints[name], f"{context}: {name}")
    return kind(**coerced)


def check_keys(values: Mapping, known: Sequence[str], name: str = "") -> None:
    """Raise SnpatchError for keys of a table that are not known.

    name: of the table in errors, as in `validate`.
    """
    if unknown := sorted(map(str, values.keys() - set(known))):
        message = f"{name}unknown key {', '.join(unknown)}; expected one of {', '.join(known)}"
        message += "".join(f". Did you mean {key}?" for key in nearest(unknown[0], known)[:1])
        raise SnpatchError(message, field=unknown[0])


@cache
def _get_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def required(kind: type) -> list[str]:
    """Return the names of the fields without a default."""
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def coerce(value: object, hint: Any, context: str) -> Any:
    """Return a value as its type hint declares it: lists as tuples, tables as dataclasses."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    bases: list[Any] = [get_origin(kind) or kind for kind in kinds]
    plain = tuple(base for base in bases if base is not tuple)
    if isinstance(value, bool):
        is_plain = bool in plain or object in plain
    elif type(value) is int and float in plain and int not in plain:
        try:
            return float(value)
        except OverflowError:
            raise SnpatchError(f"{context}: expected a number that float64 can hold, got {shown(value)}") from None
    else:
        is_plain = isinstance(value, plain)
    if is_plain:
        return value
    for kind, base in zip(kinds, bases, strict=True):
        if base is tuple:
            *item_kinds, last = get_args(kind)
            if last is Ellipsis:
                items = tuple(value) if isinstance(value, list | tuple) else (value,)
                return tuple(coerce(item, item_kinds[0], context) for item in items)
            item_kinds.append(last)
            if isinstance(value, list | tuple) and len(value) == len(item_kinds):
                return tuple(
                    coerce(item, item_kind, context) for item, item_kind in zip(value, item_kinds, strict=True)
                )
        elif isinstance(base, type) and is_dataclass(base) and isinstance(value, Mapping):
            return from_dict(base, context, value)
    names = " or ".join(_type_name(kind) for kind in kinds if kind is not NoneType)
    raise SnpatchError(f"{context}: expected {names}, got {shown(value)}")


def json_schema(kind: type) -> dict:
    """Return the JSON Schema of the tables that `from_dict` reads. Metadata of fields: help and limits."""
    hints, properties = _get_hints(kind), {}
    for f in fields(kind):
        properties[f.name] = _hint_schema(hints[f.name])
        if "help" in f.metadata:
            properties[f.name]["description"] = f.metadata["help"]
        if "min" in f.metadata:
            properties[f.name]["minimum"] = f.metadata["min"]
        if "max" in f.metadata:
            properties[f.name]["maximum"] = f.metadata["max"]
        if "above" in f.metadata:
            properties[f.name]["exclusiveMinimum"] = f.metadata["above"]
        if "below" in f.metadata:
            properties[f.name]["exclusiveMaximum"] = f.metadata["below"]
        if "choices" in f.metadata:
            properties[f.name]["enum"] = [*f.metadata["choices"]]
        if f.default is not MISSING and not isinstance(f.default, tuple):
            properties[f.name]["default"] = f.default
    return {"type": "object", "properties": properties, "required": required(kind), "additionalProperties": False}


def _hint_schema(hint: Any) -> dict:
    if isinstance(hint, UnionType):
        return {"anyOf": [_hint_schema(kind) for kind in get_args(hint)]}
    if get_origin(hint) is tuple:
        *item_hints, last = get_args(hint)
        if last is Ellipsis:
            return {"type": "array", "items": _hint_schema(item_hints[0])}
        items = [_hint_schema(item_hint) for item_hint in (*item_hints, last)]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return json_schema(hint) if isinstance(hint, type) and is_dataclass(hint) else {"type": JSON_TYPES[hint]}


def _type_name(kind: object) -> str:
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_type_name, get_args(kind)))}]"
    return getattr(kind, "__name__", str(kind))
