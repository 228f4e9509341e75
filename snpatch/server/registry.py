"""Catalogue: what a server's clients can name (models, rankings, constants, patches, guards), and what they mean.

Everything that is named at the start is checked then: a patch that could not run is no server.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from snpatch import names, schema
from snpatch.async_engine import AsyncEngine
from snpatch.errors import SnpatchError, nearest, within
from snpatch.guard.guard import Guard
from snpatch.patching import spec
from snpatch.patching.patch import Constant, Patch
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.reading import Shape
from snpatch.server.config import ServeConfig
from snpatch.server.errors import NotFoundError
from snpatch.server.patch_request import PatchContext, PatchRequest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAKEN = ("text", "image", "audio", "video")  # vLLM applies an adapter of these names to messages with such parts
LISTED = 12  # names in an error
KEPT = 32  # patches of requests that are kept as they were read, and donors of values that were built for them
BUILT = re.compile(r"(add:)?(zero|mean:\w{1,16}|noise:.{1,32})")  # donors whose values are built


class _Named(spec.Named):
    """Builds a donor's values once for all clauses, windows and requests that name it; the last KEPT are kept."""

    def __init__(self, rankings: Mapping[str, Ranking], constants: Mapping[str, Constant]) -> None:
        super().__init__(rankings, constants)
        object.__setattr__(self, "_built", lru_cache(KEPT)(super().donor))

    def donor(self, text: str, ranking: Ranking, seed: int | None):
        return (self._built if BUILT.fullmatch(text) else super().donor)(text, ranking, seed)


class PatchRegistry:
    """Of one engine, which need not be started. base_names: of the engine's own model, besides "base"."""

    def __init__(self, engine: AsyncEngine, config: ServeConfig, base_names: tuple[str, ...] = ()) -> None:
        self.engine, self.base_names = engine, (*base_names, "base")
        self.rankings: dict[str, Ranking] = {}
        self.constants: dict[str, Constant] = {}
        self.guards = {name: self._guard(name, file) for name, file in config.guards.items()}
        self._forget()
        for name, file in config.rankings.items():
            self.add("rankings", name, named_ranking(file, lambda: self.engine.geometry.shape))
        for name, file in config.constants.items():
            self.add("constants", name, Constant.load(file))
        self.patches: dict[str, PatchContext] = {}
        for name, table in config.patches.items():
            check_name(name, "a patch")
            if name in engine.models or name in self.base_names:
                raise SnpatchError(f"patch {name}: a model has this name")
            try:
                self.patches[name] = replace(self.ask(table), told=name)
            except SnpatchError as error:
                raise SnpatchError(f"patch {name}: {error}") from error
        for name in engine.models:
            if name in TAKEN or (name in base_names and name != "base"):
                raise SnpatchError(
                    f"a model cannot be named {name}: vLLM's server uses that name, or serves its own by it"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """What a request's `model` may say, besides the base's own names."""
        return (*(name for name in self.engine.models if name != "base"), *self.patches)

    def named(self, model: str | None) -> PatchContext | None:
        """What a request's `model` stands for, unless it names nothing that is served."""
        if not model or model in self.base_names:
            return PatchContext("base", "base")
        if model in self.patches:
            return self.patches[model].again()
        return PatchContext(model, model) if model in self.engine.models else None

    def unknown(self, model: str) -> NotFoundError:
        """Return the error for a `model` that names nothing that is served: what there is, the nearest first."""
        models = _listed(model, [*dict.fromkeys((*self.base_names, *self.engine.models))])
        patches = f" or of the patches {_listed(model, [*self.patches])}" if self.patches else ""
        message = f"model: expected one of the models {models}{patches}; {model[:80]!r} does not exist"
        return NotFoundError(message, field="model")

    def ask(self, table: object) -> PatchContext:
        """What an object `snpatch` means, checked; every error has the field."""
        self._check_clauses(table)
        form = schema.read(PatchRequest, "snpatch", table)
        return self._read(form).again()

    def add(self, kind: str, name: str, one: Ranking | Constant) -> None:
        """A ranking or constant of the engine's shape can be named from now on; one of the same name goes."""
        self.check(kind, name, one)
        self._of(kind)[name] = one
        self._forget()

    def check(self, kind: str, name: str, one: Ranking | Constant) -> None:
        """An error for what cannot be added."""
        check_name(name, f"one of the {kind}")
        shape = one.shape if isinstance(one, Ranking) else tuple(one.values.shape)
        wanted = (self.engine.geometry.n_layers, self.engine.geometry.n_neurons)
        if shape != wanted:
            raise SnpatchError(f"{name}: is for a model of {list(shape)}, this one is {list(wanted)}")

    def remove(self, kind: str, name: str) -> None:
        """It can no longer be named; patches that were made of it stay as they are."""
        del self._of(kind)[name]
        self._forget()

    def told(self) -> dict:
        """As JSON data, for clients."""
        engine = self.engine
        return {
            "models": {name: {"digest": engine.fingerprint(name)} for name in engine.models},
            "rankings": {name: told_of(one) for name, one in dict(self.rankings).items()},
            "constants": {name: told_of(one) for name, one in dict(self.constants).items()},
            "patches": {name: self._patch_told(ask) for name, ask in self.patches.items()},
            "guards": {
                name: {"model": one.model, "k": one.k, "threshold": one.threshold} for name, one in self.guards.items()
            },
        }

    def _patch_told(self, ask: PatchContext) -> dict:
        told = spec.to_json(ask.patch) if isinstance(ask.patch, Patch) else {"recipient": ask.patch}
        guards = [name for name, guard in self.guards.items() if guard is ask.guard]
        return told | ({"guard": guards[0]} if guards else {})

    def _of(self, kind: str) -> dict:
        return {"rankings": self.rankings, "constants": self.constants}[kind]

    def _forget(self) -> None:
        """Start new caches: a thread that still reads a request fills the old ones, with what is named no more."""
        named = _Named({**self.rankings}, {**self.constants})
        self._read = lru_cache(KEPT)(lambda form: self._meant(form, named))

    def _check_clauses(self, table: object) -> None:
        """Raise for more clauses than a patch may have, before any is read."""
        clauses, limit = (
            table.get("clauses") if isinstance(table, Mapping) else None,
            self.engine.config.capacity.max_clauses,
        )
        if isinstance(clauses, list) and (n := len(clauses) + ("donor" in table)) > limit:
            raise SnpatchError(
                f"snpatch: expected at most {limit} clauses, got {n}. Start the server with --engine-arg "
                f"max_clauses={n}.",
                field="clauses",
            )

    def _meant(self, form: PatchRequest, named: spec.Named) -> PatchContext:
        """The patch of a form; an error for what the engine could never run."""
        patch = spec.patch_of(form, named)
        donors = [one.donor for one in getattr(patch, "clauses", ()) if isinstance(one.donor, str)]
        for field, name in (("recipient", form.recipient), *(("donor", name) for name in donors)):
            with within(field):
                self.engine.requests.model(name)
        self.engine.executor.slots.check_request(self.engine.requests.patched([0], _anywhere(patch)))
        guard = None if form.guard is None else self._guard_of(form.guard, form.recipient)
        return PatchContext(_without_defaults(form), patch, guard)

    def _guard_of(self, name: str, recipient: str) -> Guard:
        if name not in self.guards:
            there = ", ".join(self.guards) or "none"
            raise SnpatchError(f"snpatch: no guard named {name!r}: there are {there}", field="guard")
        guard, template = self.guards[name], self.engine.requests.template
        if template(guard.model).fingerprint != template(recipient).fingerprint:
            message = f"snpatch: guard {name} reads {guard.model}, whose chat template is not {recipient}'s"
            raise SnpatchError(message, field="guard")
        return guard

    def _guard(self, name: str, file: str) -> Guard:
        check_name(name, "a guard")
        guard, engine = Guard.load(file), self.engine
        guard.check_engine(engine)
        capture = engine.requests.capturing([[0]], guard.model, guard.ranking, guard.k, "prompt_last")
        engine.executor.slots.check_request(capture[0])
        return guard


def named_ranking(file: str | Path, shape: Shape = None) -> Ranking:
    """A ranking of a file, without what no patch needs of it. shape: see Ranking.load."""
    return replace(Ranking.load(file, shape), scores=None, statistics=None)


def told_of(one: Ranking | Constant) -> dict:
    """What a ranking or constant is, as JSON data."""
    if isinstance(one, Ranking):
        return {"neurons": len(one), "shape": list(one.shape), "digest": one.fingerprint, "moments": [*one.moments]}
    return {"shape": list(one.values.shape), "digest": one.fingerprint, "mode": one.mode}


def _listed(name: str, known: list[str]) -> str:
    """Return names as a list that fits in an error, those that are nearest to `name` first."""
    found = [*dict.fromkeys((*nearest(name, known), *known))]
    return ", ".join(found[:LISTED]) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")


def check_name(name: str, what: str) -> None:
    """An error for a word of patches, and what cannot be a name in a path and in vLLM's list of models."""
    if not NAME.fullmatch(name):
        raise SnpatchError(
            f"{what}: a name has up to 64 letters, digits, dots, dashes and underscores, and begins with a letter or a "
            f"digit; got {name[:80]!r}"
        )
    names.check_name(name, what)
    if name in TAKEN:
        raise SnpatchError(f"{what} cannot be named {name}: vLLM's server uses that name")


def _anywhere(patch: Patch | str) -> Patch | str:
    """The same patch at every position: what it needs of the engine, whatever prompt it meets."""
    if isinstance(patch, str):
        return patch
    return replace(patch, where="all", then=tuple(replace(clause, where="all") for clause in patch.then))


def _without_defaults(form) -> Mapping:
    """A form as its client could have written it."""
    told = {}
    for name, value in form.__dict__.items():
        if name == "clauses":
            value = [_without_defaults(one) for one in value]
        if name == "recipient" or value not in (getattr(type(form), name, None), []):
            told[name] = list(value) if isinstance(value, tuple) else value
    return told
