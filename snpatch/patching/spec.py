"""Patches as text and as JSON: what a command line, a file or a client writes, and the Patch that it means.

The only place that knows these forms; what a patch is stands in patch.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.patching.patch import Clause, Constant, Noise, Patch, Scale, Source
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window

FIELDS = ("recipient", "donor", "ranking", "window", "where", "strength", "then")
NOISE_SEED = 0  # where none is given


def from_text(
    recipient: str,
    donor: str,
    ranking: str | Path | None,
    window: str | None,
    where: str,
    seed: int | None = None,
    strength: float = 1.0,
) -> Patch:
    """A patch from a command line's words. ranking: a file; donor, window, where: see the functions below."""
    if ranking is None or window is None:
        raise SnpatchError("a donor needs a ranking and a window (k)")
    loaded = Ranking.load(ranking)
    return Patch(recipient, donor_of(donor, loaded, seed), loaded, window_of(window), where_of(where), strength)


def from_json(data: object, rankings: Mapping[str, Ranking]) -> Patch:
    """A patch from JSON data: recipient, donor, ranking (a name), window (k or [lo, hi]).

    Perhaps also where, strength, seed and then (a list of further clauses: the same without recipient). donor: a
    model's name or one of `donor_of`'s words; seed: of noise. Every error names the field.
    """
    if not isinstance(data, Mapping):
        raise SnpatchError(f"patch: wanted an object, got {data!r}")
    unknown, missing = sorted(data.keys() - {*FIELDS, "seed"}), sorted({*FIELDS[:4]} - data.keys())
    if unknown or missing:
        what = f"there is no {', '.join(unknown)}" if unknown else f"{', '.join(missing)} is missing"
        raise SnpatchError(f"patch: {what}; a patch has {', '.join(FIELDS)}")
    if not isinstance(data["recipient"], str):
        raise SnpatchError(f"patch: recipient: wanted a text, got {data['recipient']!r}")
    then = data.get("then", [])
    if not isinstance(then, list):
        raise SnpatchError(f"patch: then: wanted a list of clauses, got {then!r}")
    own = {name: value for name, value in data.items() if name not in ("recipient", "then")}
    first, *others = (_clause(one, rankings) for one in (own, *then))
    return Patch(data["recipient"], *(getattr(first, f.name) for f in fields(Clause)), tuple(others))


def _clause(data: object, rankings: Mapping[str, Ranking]) -> Clause:
    """One clause from JSON data."""
    known = ("donor", "ranking", "window", "where", "strength", "seed")
    if not isinstance(data, Mapping) or data.keys() - set(known) or set(known[:3]) - data.keys():
        raise SnpatchError(f"patch: then: wanted clauses of {', '.join(known)}, got {data!r}")
    for name in ("donor", "ranking"):
        if not isinstance(data[name], str):
            raise SnpatchError(f"patch: {name}: wanted a text, got {data[name]!r}")
    if data["ranking"] not in rankings:
        raise SnpatchError(f"patch: no ranking named {data['ranking']!r}: there are {', '.join(rankings) or 'none'}")
    window, where, seed = data["window"], data.get("where", "all"), data.get("seed")
    whole = window if isinstance(window, list) else [window]
    if not all(_is_int(number) for number in whole) or len(whole) not in (1, 2):
        raise SnpatchError(f"patch: window: wanted k or [lo, hi], got {window!r}")
    if not (isinstance(where, str) or _is_int(where)):
        raise SnpatchError(f"patch: where: wanted a text or a position, got {where!r}")
    if not (seed is None or _is_int(seed)):
        raise SnpatchError(f"patch: seed: wanted a number, got {seed!r}")
    ranking = rankings[data["ranking"]]
    span = Window.of(tuple(whole) if len(whole) == 2 else whole[0])
    return Clause(donor_of(data["donor"], ranking, seed), ranking, span, where, data.get("strength", 1.0))


def to_json(patch: Patch) -> dict:
    """A patch as JSON data: models by name, rankings, constants and noise by content."""
    return patch.content(name_of=str)


def donor_of(text: str, ranking: Ranking, seed: int | None = None) -> str | Source:
    """`zero`, `mean:recipient`, `mean:donor` (`add:mean:donor` adds it), `noise:N` (N standard deviations, seeded),
    `scale:F`, or else a model's name."""
    kind, _, argument = text.partition(":")
    if kind == "add" and argument:
        constant = donor_of(argument, ranking)
        if not isinstance(constant, Constant):
            raise SnpatchError(f"donor {text!r}: only mean:recipient and mean:donor can be added")
        return replace(constant, mode="add")
    if kind == "scale" and argument:
        return Scale(number_of(argument, float, "donor scale:F"))
    if text == "zero":
        return Constant.zero(ranking)
    if kind == "mean" and argument in ("recipient", "donor"):
        return Constant.mean(ranking, argument)
    if kind == "noise" and argument:
        deviations = number_of(argument, float, "donor noise:N")
        return Noise.of_std(ranking, deviations, seed=NOISE_SEED if seed is None else seed)
    return text


def window_of(text: str) -> Window:
    """`k` for the top k, or `LO:HI`."""
    lo, colon, hi = text.strip().partition(":")
    if not colon:
        return Window(0, number_of(lo, int, "a window"))
    return Window(number_of(lo, int, "a window"), number_of(hi, int, "a window"))


def where_of(text: str) -> str | int:
    """`all`, `prompt`, `generated`, or a position."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def number_of(text: str, kind: Callable, what: str):
    """A number of a command line."""
    try:
        return kind(text)
    except ValueError:
        raise SnpatchError(f"{what}: {text!r} is not a number") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
