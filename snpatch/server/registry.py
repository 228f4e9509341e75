"""PatchRegistry: the models, rankings, constants, patches and guards that clients can name.

Everything named in the config is checked at startup, so that a server with a patch that cannot run does not start.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from snpatch import names
from snpatch.engine.async_engine import AsyncEngine
from snpatch.errors import SnpatchError, error_field, nearest, unknown_name
from snpatch.guard.guard import Guard
from snpatch.patching import spec
from snpatch.patching.patch import Constant, Patch, Source
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.reading import Shape
from snpatch.server.config import ServeConfig
from snpatch.server.errors import NotFoundError
from snpatch.server.patch_request import PatchContext, PatchRequest
from snpatch.utils import schema

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RESERVED_NAMES = ("text", "image", "audio", "video")  # vLLM applies adapters of these names to messages with such parts
MAX_LISTED_NAMES = 12  # in an error
CACHE_SIZE = 32  # parsed patches of requests, and donors with computed values
COMPUTED_DONOR = re.compile(r"(add:)?(zero|mean:\w{1,16}|noise:.{1,32})")  # donors whose values are computed


class _CachedNamespace(spec.PatchNamespace):
    """Namespace that computes a donor's values once for all patches and requests; the last CACHE_SIZE are cached."""

    _cached_donor: Callable[[str, Ranking, int | None], str | Source]

    def __init__(self, rankings: Mapping[str, Ranking], constants: Mapping[str, Constant]) -> None:
        super().__init__(rankings, constants)
        object.__setattr__(self, "_cached_donor", lru_cache(CACHE_SIZE)(super().donor))

    def donor(self, text: str, ranking: Ranking, seed: int | None):
        return (self._cached_donor if COMPUTED_DONOR.fullmatch(text) else super().donor)(text, ranking, seed)


class PatchRegistry:
    """Names that clients of one engine can use.

    Args:
        engine: An engine, which need not be started.
        config: The server's config.
        base_names: Names of the engine's own model besides "base".
    """

    def __init__(self, engine: AsyncEngine, config: ServeConfig, base_names: tuple[str, ...] = ()) -> None:
        self.engine, self.base_names = engine, (*base_names, "base")
        self.rankings: dict[str, Ranking] = {}
        self.constants: dict[str, Constant] = {}
        self.guards = {name: self._load_guard(name, file) for name, file in config.guards.items()}
        self._reset_caches()
        for name, file in config.rankings.items():
            self.add("rankings", name, load_ranking(file, lambda: self.engine.geometry.shape))
        for name, file in config.constants.items():
            self.add("constants", name, Constant.load(file))
        self.patches: dict[str, PatchContext] = {}
        for name, table in config.patches.items():
            check_served_name(name, "a patch")
            if name in engine.models or name in self.base_names:
                raise SnpatchError(f"patch {name}: a model has this name. Choose another name.")
            try:
                self.patches[name] = replace(self.parse(table), label=name)
            except SnpatchError as error:
                raise SnpatchError(f"patch {name}: {error}") from error
        for name in engine.models:
            if name in RESERVED_NAMES or (name in base_names and name != "base"):
                raise SnpatchError(
                    f"model {name}: vLLM's server uses this name, or serves its own model by it. Choose another name."
                )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that a request's `model` can have, except the base model's."""
        return (*(name for name in self.engine.models if name != "base"), *self.patches)

    def lookup(self, model: str | None) -> PatchContext | None:
        """Return the context of a request's `model`, or None for an unknown name."""
        if not model or model in self.base_names:
            return PatchContext("base", "base")
        if model in self.patches:
            return self.patches[model].copy()
        return PatchContext(model, model) if model in self.engine.models else None

    def unknown_model_error(self, model: str) -> NotFoundError:
        """Return the error for an unknown `model`, which lists all names, the most similar ones first."""
        models = _list_names(model, [*dict.fromkeys((*self.base_names, *self.engine.models))])
        patches = f" or of the patches {_list_names(model, [*self.patches])}" if self.patches else ""
        message = f"model: expected one of the models {models}{patches}; {model[:80]!r} does not exist"
        return NotFoundError(message, field="model")

    def parse(self, table: object) -> PatchContext:
        """Return the context of a request's object `snpatch`, or raise with the field that is wrong."""
        self._check_num_interventions(table)
        request = schema.from_dict(PatchRequest, "snpatch", table)
        return self._build(request).copy()

    def add(self, kind: str, name: str, value: Ranking | Constant) -> None:
        """Register a ranking or constant, replacing one of the same name."""
        self.check_value(kind, name, value)
        self._values(kind)[name] = value
        self._reset_caches()

    def check_value(self, kind: str, name: str, value: Ranking | Constant) -> None:
        """Raise for a ranking or constant that cannot be registered."""
        check_served_name(name, f"one of the {kind}")
        shape = value.shape if isinstance(value, Ranking) else tuple(value.values.shape)
        expected = (self.engine.geometry.n_layers, self.engine.geometry.n_neurons)
        if shape != expected:
            raise SnpatchError(f"{name}: expected values of shape {list(expected)} for this model, got {list(shape)}")

    def remove(self, kind: str, name: str) -> None:
        """Unregister a ranking or constant. Patches built with it stay valid."""
        del self._values(kind)[name]
        self._reset_caches()

    def to_dict(self) -> dict:
        """Return everything that clients can name, as JSON data."""
        engine, guards = self.engine, self.guards.items()
        return {
            "models": {name: {"fingerprint": engine.fingerprint(name)} for name in engine.models},
            "rankings": {name: describe(ranking) for name, ranking in dict(self.rankings).items()},
            "constants": {name: describe(constant) for name, constant in dict(self.constants).items()},
            "patches": {name: self._patch_to_dict(context) for name, context in self.patches.items()},
            "guards": {
                name: {"model": guard.model, "k": guard.k, "threshold": guard.threshold} for name, guard in guards
            },
        }

    def _patch_to_dict(self, context: PatchContext) -> dict:
        patch = context.patch
        table = spec.to_json(patch) if isinstance(patch, Patch) else {"recipient": patch}
        guards = [name for name, guard in self.guards.items() if guard is context.guard]
        return table | ({"guard": guards[0]} if guards else {})

    def _values(self, kind: str) -> dict:
        return {"rankings": self.rankings, "constants": self.constants}[kind]

    def _reset_caches(self) -> None:
        """Start new caches.

        A thread that still parses a request fills the old ones, which hold replaced values.
        """
        namespace = _CachedNamespace({**self.rankings}, {**self.constants})
        self._build = lru_cache(CACHE_SIZE)(lambda request: self._build_context(request, namespace))

    def _check_num_interventions(self, table: object) -> None:
        """Raise for more interventions than a patch may have, before any is built."""
        interventions = table.get("interventions") if isinstance(table, Mapping) else None
        limit = self.engine.config.capacity.max_interventions
        if isinstance(interventions, list) and (n := len(interventions)) > limit:
            raise SnpatchError(
                f"snpatch: expected at most {limit} interventions, got {n}. Start the server with --engine-arg "
                f"max_interventions={n}.",
                field="interventions",
            )

    def _build_context(self, request: PatchRequest, namespace: spec.PatchNamespace) -> PatchContext:
        """Build the patch of a request, or raise if the engine could never run it."""
        patch = spec.build_patch(request, namespace)
        interventions = getattr(patch, "interventions", ())
        donors = [intervention.donor for intervention in interventions if isinstance(intervention.donor, str)]
        for field, name in (("recipient", request.recipient), *(("donor", name) for name in donors)):
            with error_field(field):
                self.engine.requests.model(name)
        self.engine.executor.slots.check_request(self.engine.requests.patched([0], _at_all_positions(patch)))
        guard = None if request.guard is None else self._get_guard(request.guard, request.recipient)
        return PatchContext(_without_defaults(request), patch, guard)

    def _get_guard(self, name: str, recipient: str) -> Guard:
        if name not in self.guards:
            raise unknown_name("snpatch: guard", name, self.guards, field="guard")
        guard, template = self.guards[name], self.engine.requests.template
        if template(guard.model).fingerprint != template(recipient).fingerprint:
            message = (
                f"snpatch: guard {name}: expected a recipient with {guard.model}'s chat template, got {recipient}, "
                "which has another one"
            )
            raise SnpatchError(message, field="guard")
        return guard

    def _load_guard(self, name: str, file: str) -> Guard:
        check_served_name(name, "a guard")
        guard, engine = Guard.load(file), self.engine
        guard.check_engine(engine)
        capture = engine.requests.capturing([[0]], guard.model, guard.ranking, guard.k, "last_prompt_token")
        engine.executor.slots.check_request(capture[0])
        return guard


def load_ranking(file: str | Path, shape: Shape = None) -> Ranking:
    """Load a ranking without the scores and statistics that no patch needs. shape: see Ranking.load."""
    return replace(Ranking.load(file, shape), scores=None, statistics=None)


def describe(value: Ranking | Constant) -> dict:
    """Return a summary of a ranking or constant as JSON data."""
    if isinstance(value, Ranking):
        shape, moments = list(value.shape), [*value.moments]
        return {"neurons": len(value), "shape": shape, "fingerprint": value.fingerprint, "moments": moments}
    return {"shape": list(value.values.shape), "fingerprint": value.fingerprint, "mode": value.mode}


def _list_names(name: str, known: list[str]) -> str:
    """Join names, the most similar to `name` first, and at most MAX_LISTED_NAMES."""
    ordered = [*dict.fromkeys((*nearest(name, known), *known))]
    num_hidden = len(ordered) - MAX_LISTED_NAMES
    return ", ".join(ordered[:MAX_LISTED_NAMES]) + (f" and {num_hidden} more" if num_hidden > 0 else "")


def check_served_name(name: str, what: str) -> None:
    """Raise for a keyword of patches, or a name that does not fit.

    It must fit in a URL path and in vLLM's list of models.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise SnpatchError(
            f"{what}: expected a name of up to 64 letters, digits, dots, dashes and underscores that begins with a "
            f"letter or digit, got {name[:80]!r}"
        )
    names.check_name(name, what)
    if name in RESERVED_NAMES:
        raise SnpatchError(f"{what}: expected another name than {name}, which vLLM's server uses")


def _at_all_positions(patch: Patch | str) -> Patch | str:
    """Return the patch at all positions, which needs the same slots for every prompt."""
    if isinstance(patch, str):
        return patch
    interventions = [replace(intervention, positions="all") for intervention in patch.interventions]
    return Patch(patch.recipient, interventions=interventions)


def _without_defaults(form) -> Mapping:
    """Return a parsed request as its client could have written it."""
    table = {}
    for name, value in form.__dict__.items():
        if name == "interventions":
            value = [_without_defaults(intervention) for intervention in value]
        if name == "recipient" or value not in (getattr(type(form), name, None), []):
            table[name] = list(value) if isinstance(value, tuple) else value
    return table
