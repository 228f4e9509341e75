"""Patches as text and as JSON, as a command line, a file or a client writes them.

`PatchSchema` declares the JSON fields. Reader, errors and JSON Schema are made from it, so they cannot differ.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from snpatch.errors import SnpatchError, error_field, unknown_name
from snpatch.names import POSITIONS, SOURCES
from snpatch.patching.patch import Constant, Intervention, Noise, Patch, Scale, Source
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.reading import Shape
from snpatch.ranking.window import Window
from snpatch.utils import schema
from snpatch.utils.schema import option

DEFAULT_NOISE_SEED = 0
REQUIRED = ("donor", "ranking", "window")  # of each intervention
DONORS = (
    "A model's name; `zero`, `mean:recipient`, `mean:donor` or `constant:NAME` (`add:` before one of these three adds "
    "it); `noise:N`, N standard deviations; or `scale:F`, the recipient's own times F."
)
RANKING, WINDOW = "Name of a ranking.", "k for its first k neurons, or [lo, hi]."
STRENGTH = (
    "Patch strength: 1 copies the donor's value, 0.5 averages recipient and donor, 2 doubles the difference, -1 "
    "reverses it."
)


@dataclass(frozen=True, kw_only=True)
class _CommonSchema:
    donor: str | None = option(None, DONORS)
    ranking: str | None = option(None, RANKING)
    window: int | tuple[int, int] | None = option(None, WINDOW)
    positions: str | int = option("all", f"{', '.join(POSITIONS)}, or the index to start from (-1: last prompt token).")
    strength: float = option(1.0, STRENGTH)
    seed: int | None = option(None, "Seed of the noise. Default: 0.")


@dataclass(frozen=True, kw_only=True)
class InterventionSchema(_CommonSchema):
    """JSON fields of an intervention."""

    donor: str = field(metadata={"help": DONORS})
    ranking: str = field(metadata={"help": RANKING})
    window: int | tuple[int, int] = field(metadata={"help": WINDOW})


@dataclass(frozen=True, kw_only=True)
class PatchSchema(_CommonSchema):
    """JSON fields of a patch: those of one intervention, or a list of interventions, or neither (unpatched)."""

    recipient: str = field(metadata={"help": "Name of the model that is patched and generates."})
    interventions: tuple[InterventionSchema, ...] = option((), "All interventions, in place of donor to seed.")


@dataclass(frozen=True)
class PatchNamespace:
    """Rankings and constants that the JSON of a patch can name."""

    rankings: Mapping[str, Ranking]
    constants: Mapping[str, Constant]

    def donor(self, text: str, ranking: Ranking, seed: int | None) -> str | Source:
        """Parse a donor; see parse_donor."""
        return parse_donor(text, ranking, seed, self.constants)


def from_text(
    recipient: str,
    donor: str,
    ranking: str | Path | None,
    window: str | None,
    positions: str,
    seed: int | None = None,
    strength: float = 1.0,
    shape: Shape = None,
) -> Patch:
    """Return the patch that command-line options describe. ranking, shape: see Ranking.load."""
    if ranking is None or window is None:
        raise SnpatchError("donor: expected a ranking and a window (k) with it")
    loaded = Ranking.load(ranking, shape)
    parsed = parse_donor(donor, loaded, seed), loaded, parse_window(window), parse_positions(positions)
    return Patch(recipient, *parsed, strength)


def parse_patch_table(text: str) -> dict:
    """Parse the JSON data of a patch from JSON or `recipient=sft,donor=dpo,ranking=safety,k=20000,...`.

    `k` is the window, as k or LO:HI. Several interventions need JSON. Values are not checked here.
    """
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise SnpatchError(f"patch {text!r}: expected JSON: {error}") from error
    table = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        name = "window" if name == "k" else name
        if not equals or name in table:
            raise SnpatchError(f"patch {text!r}: expected name=value,name=value, each name once, got {part!r}")
        table[name] = _FIELD_PARSERS.get(name, str)(value)
    return table


def from_json(data: object, namespace: PatchNamespace) -> Patch | str:
    """Build a patch, or the name of a model to run unpatched, from JSON data. Every error has a `field`."""
    return build_patch(schema.from_dict(PatchSchema, "patch", data), namespace)


def build_patch(form: PatchSchema, namespace: PatchNamespace) -> Patch | str:
    """Return the patch of a form, or the name of the model that runs unpatched."""
    set_fields = [name for name in REQUIRED if getattr(form, name) is not None]
    set_fields += [n for n in ("positions", "strength", "seed") if getattr(form, n) != getattr(InterventionSchema, n)]
    if form.interventions:
        if set_fields:
            message = f"patch: {set_fields[0]}: expected in each of the interventions, got it next to them."
            raise SnpatchError(message, field=set_fields[0])
        interventions = []
        for index, part in enumerate(form.interventions):
            with error_field(f"interventions.{index}"):
                interventions.append(_intervention(part, namespace))
        return Patch(form.recipient, interventions=interventions)
    missing = [name for name in REQUIRED if name not in set_fields]
    if len(missing) < len(REQUIRED):
        if missing:
            raise SnpatchError(f"patch: {', '.join(missing)} is missing", field=missing[0])
        single = InterventionSchema(**{f.name: getattr(form, f.name) for f in fields(InterventionSchema)})
        return Patch(form.recipient, interventions=[_intervention(single, namespace)])
    if set_fields:
        raise SnpatchError(
            f"patch: {set_fields[0]}: expected a donor, a ranking and a window with it, got none", field=set_fields[0]
        )
    return form.recipient


def _intervention(form: InterventionSchema, namespace: PatchNamespace) -> Intervention:
    if form.ranking not in namespace.rankings:
        raise unknown_name("patch: ranking", form.ranking, namespace.rankings, field="ranking")
    ranking = namespace.rankings[form.ranking]
    with error_field("window"):
        window = Window.of(form.window)
    with error_field("donor"):
        donor = namespace.donor(form.donor, ranking, form.seed)
    return Intervention(donor, ranking, window, form.positions, form.strength)


def to_json(patch: Patch) -> dict:
    """Return a patch as JSON data: models by name; rankings, constants and noise by content hash."""
    return patch.content(name_of=str)


def parse_donor(
    text: str, ranking: Ranking, seed: int | None = None, constants: Mapping[str, Constant] | None = None
) -> str | Source:
    """Parse a donor, see DONORS. Text without a reserved word is the name of a model."""
    kind, _, argument = text.partition(":")
    if kind not in SOURCES:
        return text
    if kind == "add" and argument:
        constant = parse_donor(argument, ranking, constants=constants)
        if not isinstance(constant, Constant):
            raise SnpatchError(f"donor: expected mean:recipient, mean:donor or a constant after add:, got {text!r}")
        return replace(constant, mode="add")
    if kind == "scale" and argument:
        return Scale(parse_number(argument, float, "donor scale:F"))
    if text == "zero":
        return Constant.zero(ranking)
    if kind == "mean" and argument in ("recipient", "donor"):
        return Constant.mean(ranking, argument)
    if kind == "constant" and argument:
        constants = constants or {}
        if argument not in constants:
            raise unknown_name("constant", argument, constants)
        return constants[argument]
    if kind == "noise" and argument:
        deviations = parse_number(argument, float, "donor noise:N")
        return Noise.of_std(ranking, deviations, seed=DEFAULT_NOISE_SEED if seed is None else seed)
    raise SnpatchError(f"donor: expected a valid donor, got {text!r}. Donors: {DONORS}")


def parse_window(text: str) -> Window:
    """Parse `k` for the top k, or `LO:HI`."""
    lo, colon, hi = text.strip().partition(":")
    if not colon:
        return Window(0, parse_number(lo, int, "a window"))
    return Window(parse_number(lo, int, "a window"), parse_number(hi, int, "a window"))


def parse_positions(text: str) -> str | int:
    """Return the word or the index that a text gives; the Patch checks it."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def parse_number(text: str, kind: Callable, what: str):
    """Parse a number. what: names it in errors."""
    try:
        return kind(text)
    except ValueError:
        raise SnpatchError(f"{what}: expected a number, got {text!r}") from None


def _window_table(text: str) -> int | list[int]:
    window = parse_window(text)
    return [window.lo, window.hi] if ":" in text else window.hi


_FIELD_PARSERS = {
    "window": _window_table,
    "positions": parse_positions,
    "strength": lambda text: parse_number(text, float, "strength"),
    "seed": lambda text: parse_number(text, int, "seed"),
}  # of fields that are not text
