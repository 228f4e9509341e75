"""Fields of a request: those that nobody would read are errors, so that no misspelled patch is answered unpatched.

Why a list of names: vLLM's request models take any further field and ignore it. A field is known if vLLM's model of the
request declares it, or if the installed client of OpenAI or Anthropic can send it, whatever vLLM makes of it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from snpatch.errors import MAX_NAME, SnpatchError, is_unicode, nearest, shown
from snpatch.executors.vllm.settings import KEY
from snpatch.server.patch_request import PatchRequest

XARGS = "vllm_xargs"
CONTENT = ("messages", "prompt", "input", "system", "instructions", "suffix", "tools")  # what a client writes freely
NAMED = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}  # as in JSON
MAX_DEPTH, MAX_EDITS = 3, 2  # of tables in one another; of a name that was meant to be KEY


def check_fields(kind: type[BaseModel], body: Mapping, published: Iterable[str]) -> None:
    """Raise for a field that nobody reads. kind: vLLM's model of the request; published: by a client's library."""
    for path in _names(body):
        if path not in ((KEY,), (XARGS, KEY)) and _is_meant_as_key(path[-1]):
            place = ".".join(name[:MAX_NAME] for name in path)
            hint = f"Send {KEY!r} as a field of the request, or as JSON in {XARGS}."
            raise SnpatchError(f"request: expected no field {place!r}, which nobody reads. {hint}", field=place)
    known = _declared(kind) | {KEY, *published}
    for name in body:
        if name not in known:
            place = name[:MAX_NAME]
            message = f"request: expected a field of this route, got {place!r}. {_hint(name, known)}"
            raise SnpatchError(message, field=place)
    _check_types(kind, body)


def _check_types(kind: type[BaseModel], body: Mapping) -> None:
    """Raise for a value of another type than its field's, of which vLLM would make one ("5", 3.0, true), and for what
    is no Unicode, which no tokenizer takes."""
    for name, (wanted, adapter) in _plain_fields(kind).items():
        if body.get(name) is not None:  # of null vLLM makes nothing
            try:
                adapter.validate_python(body[name], strict=True)
            except ValidationError as error:
                message = f"request: {name}: expected {wanted}, got {shown(body[name])}"
                raise SnpatchError(message, field=name) from error
    if not is_unicode(json.dumps(body, ensure_ascii=False)):
        field = next(name for name in body if not is_unicode(json.dumps(body[name], ensure_ascii=False)))
        raise SnpatchError(f"request: {field}: expected Unicode, got half of a surrogate pair", field=field)


def published_fields(kind: type) -> frozenset[str]:
    """Return the names that a TypedDict of a client's library declares."""
    return kind.__required_keys__ | kind.__optional_keys__


def _hint(name: str, known: Iterable[str]) -> str:
    if name == "extra_body":
        return "It is an argument of OpenAI's Python client: send its fields as fields of the request."
    if name in {f.name for f in fields(PatchRequest)}:
        return f"It is a field of {KEY!r}."
    found = nearest(name, known)
    return f"Did you mean {found[0]!r}?" if found else "Leave it out."


def _names(body: Mapping) -> Iterator[tuple[str, ...]]:
    """Yield the path of each name in a body, but of what a client writes freely, and of a patch."""
    left = [((), body, 1)]
    while left:
        path, table, depth = left.pop()
        for name, value in table.items():
            yield (*path, name)
            if depth < MAX_DEPTH and name not in (KEY, *(CONTENT if depth == 1 else ())):
                inner = value if isinstance(value, list) else [value]
                left += [((*path, name), one, depth + 1) for one in inner if isinstance(one, dict)]


def _is_meant_as_key(name: str) -> bool:
    return abs(len(name) - len(KEY)) <= MAX_EDITS and _num_edits(name.lower(), KEY) <= MAX_EDITS


def _num_edits(a: str, b: str) -> int:
    """Return the least number of letters to insert, remove or replace that makes one text of the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


@cache
def _plain_fields(kind: type[BaseModel]) -> dict[str, tuple[str, TypeAdapter]]:
    """The type of each field that holds numbers, texts, flags or lists of them: its name, and what checks it."""
    declared = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    return {name: (_named(hint), TypeAdapter(hint)) for name, hint in declared.items() if _is_plain(hint)}


def _named(hint: object) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return _named(parts[0])
    if get_origin(hint) is list:
        return f"a list of {_named(parts[0])}"
    return " or ".join(map(_named, parts)) if parts else NAMED[hint]


def _is_plain(hint: object) -> bool:
    if get_origin(hint) is Annotated:
        return _is_plain(get_args(hint)[0])
    if get_origin(hint) in (list, Union, UnionType):
        return all(map(_is_plain, get_args(hint)))
    return hint in NAMED


@cache
def _declared(kind: type[BaseModel]) -> frozenset[str]:
    found = set()
    for name, field in kind.model_fields.items():
        found |= {name, field.alias or name}
    return frozenset(found)
