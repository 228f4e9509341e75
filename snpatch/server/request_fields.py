"""Checks of a request's field names and types: unknown fields raise, so that no misspelled patch is answered unpatched.

vLLM's request models accept any further field and ignore it. Here a field is known if vLLM's model of the request
declares it, or if the installed client library of OpenAI or Anthropic can send it, even if vLLM ignores it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from snpatch.errors import MAX_NAME_CHARS, SnpatchError, is_unicode, nearest, shown
from snpatch.executors.vllm.engine_settings import KEY
from snpatch.server.patch_request import PatchRequest

XARGS = "vllm_xargs"
FREE_FIELDS = ("messages", "prompt", "input", "system", "instructions", "suffix", "tools")  # with a client's own names
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
MAX_DEPTH = 3  # of nested objects in which misspelled keys are looked for
MAX_EDITS = 2  # of a name that is taken for a misspelled KEY


def check_fields(model: type[BaseModel], body: Mapping, published: Iterable[str]) -> None:
    """Raise for a field that nothing reads, or a value of another type than its field's.

    Args:
        model: vLLM's model of the request.
        body: The parsed body.
        published: Fields of the client library.
    """
    for path in _field_paths(body):
        if path not in ((KEY,), (XARGS, KEY)) and _is_misspelled_key(path[-1]):
            name = ".".join(part[:MAX_NAME_CHARS] for part in path)
            hint = f"Send {KEY!r} as a field of the request, or as JSON in {XARGS}."
            raise SnpatchError(f"request: expected no field {name!r}, which nothing reads. {hint}", field=name)
    known = _declared_names(model) | {KEY, *published}
    for name in body:
        if name not in known:
            short = name[:MAX_NAME_CHARS]
            message = f"request: expected a field of this route, got {short!r}. {_hint(name, known)}"
            raise SnpatchError(message, field=short)
    _check_types(model, body)


def _check_types(model: type[BaseModel], body: Mapping) -> None:
    """Raise for values that vLLM would convert ("5", 3.0, true).

    Also raise for strings that are not valid Unicode.
    """
    for name, (expected, adapter) in _scalar_fields(model).items():
        if body.get(name) is not None:  # vLLM does not convert null
            try:
                adapter.validate_python(body[name], strict=True)
            except ValidationError as error:
                message = f"request: {name}: expected {expected}, got {shown(body[name])}"
                raise SnpatchError(message, field=name) from error
    if not is_unicode(json.dumps(body, ensure_ascii=False)):
        field = next(name for name in body if not is_unicode(json.dumps(body[name], ensure_ascii=False)))
        raise SnpatchError(f"request: {field}: expected Unicode, got half of a surrogate pair", field=field)


def published_fields(params: type) -> frozenset[str]:
    """Return the names that a TypedDict of a client library declares."""
    return params.__required_keys__ | params.__optional_keys__


def _hint(name: str, known: Iterable[str]) -> str:
    if name == "extra_body":
        return "It is an argument of OpenAI's Python client: send its fields as fields of the request."
    if name in {f.name for f in fields(PatchRequest)}:
        return f"It is a field of {KEY!r}."
    similar = nearest(name, known)
    return f"Did you mean {similar[0]!r}?" if similar else "Leave it out."


def _field_paths(body: Mapping) -> Iterator[tuple[str, ...]]:
    """Yield the path of each name in a body, but not inside FREE_FIELDS or a patch."""
    stack = [((), body, 1)]
    while stack:
        path, table, depth = stack.pop()
        for name, value in table.items():
            yield (*path, name)
            if depth < MAX_DEPTH and name not in (KEY, *(FREE_FIELDS if depth == 1 else ())):
                values = value if isinstance(value, list) else [value]
                stack += [((*path, name), inner, depth + 1) for inner in values if isinstance(inner, dict)]


def _is_misspelled_key(name: str) -> bool:
    return abs(len(name) - len(KEY)) <= MAX_EDITS and _edit_distance(name.lower(), KEY) <= MAX_EDITS


def _edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, char_b in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char_a != char_b))
    return row[-1]


@cache
def _scalar_fields(model: type[BaseModel]) -> dict[str, tuple[str, TypeAdapter]]:
    """Return, for each field of numbers, strings, flags or lists of them, its type's name and validator."""
    declared: dict[str, Any] = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    return {name: (_type_name(hint), TypeAdapter(hint)) for name, hint in declared.items() if _is_scalar(hint)}


def _type_name(hint: object) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return _type_name(parts[0])
    if get_origin(hint) is list:
        return f"a list of {_type_name(parts[0])}"
    return " or ".join(map(_type_name, parts)) if parts else JSON_TYPES[hint]


def _is_scalar(hint: object) -> bool:
    if get_origin(hint) is Annotated:
        return _is_scalar(get_args(hint)[0])
    if get_origin(hint) in (list, Union, UnionType):
        return all(map(_is_scalar, get_args(hint)))
    return hint in JSON_TYPES


@cache
def _declared_names(model: type[BaseModel]) -> frozenset[str]:
    names = set()
    for name, field in model.model_fields.items():
        names |= {name, field.alias or name}
    return frozenset(names)
