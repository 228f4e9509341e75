"""Points of a sweep: every patch that it compares, with its controls, and the unpatched models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.names import check_names
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import EQUAL_ENERGY, MAGNITUDE, Window
from snpatch.sweeps.config import SweepConfig

EMPTY_WINDOW = Window(0, 0)


@dataclass(frozen=True)
class Point:
    """A patch of a sweep, or an unpatched model.

    Attributes:
        recipient: The model that generates.
        patch: What runs; None for the unpatched model.
        ranking: Name of the ranking.
        control: Kind of the control; None for the ranking's own neurons.
        control_seed: Seed of a random control.
        window: Window over the named ranking.
        strength: Strength of the curve. That of a control of equal energy has another, in its patch.
        control_overlap: See Row.
        energy: See Row.
    """

    recipient: str
    patch: Patch | None = None
    ranking: str | None = None
    control: str | None = None
    control_seed: int | None = None
    window: Window = EMPTY_WINDOW
    strength: float | None = None
    control_overlap: float | None = None
    energy: float | None = None

    @property
    def target(self) -> Patch | str:
        """The patch, or the name of the model that runs unpatched."""
        return self.patch or self.recipient

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the unpatched models that read a patched text; none for an unpatched model."""
        return () if self.patch is None else (self.recipient, str(self.patch.donor))

    @property
    def curve_key(self) -> tuple:
        """Key that the point has in common with the other windows of its curve and their controls."""
        return self.recipient, self.patch and self.patch.donor, self.strength, self.ranking

    @property
    def window_key(self) -> tuple:
        """Key that the point has in common with its controls."""
        return *self.curve_key, self.window

    @property
    def labels(self) -> dict:
        """Labels of the point's rows and records."""
        return {
            "recipient": self.recipient,
            "donor": None if self.patch is None else self.patch.donor,
            "ranking": self.ranking,
            "control": self.control,
            "control_seed": self.control_seed,
            "rank_lo": self.window.lo,
            "rank_hi": self.window.hi,
            "strength": self.strength,
        }


@dataclass(frozen=True)
class _Selection:
    """Neurons that are patched for a window: its own, or those of a control.

    Attributes:
        neurons: Ranking that has them.
        window: Window over that ranking.
        control: See Point.
        seed: See Point.
        factor: Factor of the strength.
    """

    neurons: Ranking
    window: Window
    control: str | None = None
    seed: int | None = None
    factor: float = 1.0


def build_points(rankings: Mapping[str, Ranking], config: SweepConfig) -> tuple[list[Point], list[str]]:
    """Return the points of a sweep, the unpatched models first, and notes about its windows."""
    if not rankings:
        raise SnpatchError("sweep: rankings: expected at least one, got none")
    check_names(rankings, "a ranking")
    pairs = [(r, d, s) for r, d, s in product(config.recipients, config.donors, config.strengths) if r != d]
    points, notes = [Point(model) for model in config.models], []
    overlaps: dict[str, list[str]] = {}
    for (name, ranking), window in product(rankings.items(), config.windows):
        random, note = _draw_random_controls(ranking, window, config)
        extra, extra_notes = _choose_extra_controls(ranking, window, config, random)
        place = f"{name} [{window.lo}, {window.hi})"
        notes += [f"{place} has no random control: {note}"] if note else []
        notes += [f"{place} has no {kind} control: {reason}" for kind, reason in extra_notes.items()]
        mean_overlap = mean(control.neurons.meta["overlap"] for control in random) if random else None
        if config.disjoint and mean_overlap:
            overlaps.setdefault(name, []).append(f"[{window.lo}, {window.hi}) by {mean_overlap:.1%}")
        for border in {window.lo, window.hi}:
            if tied := ranking.ties(border):
                notes.append(f"{name}: {tied} neurons share the score at the border {border} of a window")
        for pair, selection in product(pairs, [_Selection(ranking, window), *random, *extra]):
            overlap = mean_overlap if selection.control is None else selection.neurons.meta["overlap"]
            points.append(_build_point(config, name, ranking, window, pair, selection, overlap))
    notes += [
        f"{name}: random controls overlap with the window where too few other neurons are left: {', '.join(windows)}; "
        "net_effect and p_vs_random are conservative there"
        for name, windows in overlaps.items()
    ]
    return points, list(dict.fromkeys(notes))


def _build_point(
    config: SweepConfig,
    name: str,
    ranking: Ranking,
    window: Window,
    pair: tuple[str, str, float],  # recipient, donor and strength
    selection: _Selection,
    overlap: float | None,
) -> Point:
    recipient, donor, strength = pair
    own_strength = strength * selection.factor
    source = selection.neurons, selection.window
    patch = Patch(recipient, donor, *source, positions=config.positions, strength=own_strength)
    share = ranking.energy(*source)
    energy = None if share is None else share * own_strength**2
    labels = name, selection.control, selection.seed, window, strength
    return Point(recipient, patch, *labels, control_overlap=overlap, energy=energy)


def _draw_random_controls(ranking: Ranking, window: Window, config: SweepConfig) -> tuple[list[_Selection], str | None]:
    """Return the random controls of a window, or why there are none."""
    options = {"kind": config.control_kind, "disjoint": config.disjoint, "fill_up": True}
    try:
        controls = [ranking.random_control(window, seed=seed, **options) for seed in range(config.controls)]
    except NotEnoughNeuronsError as error:
        return [], str(error)
    if config.disjoint and any(control.meta["overlap"] == 1 for control in controls):
        return [], "no other neurons are left, so a control would be the window itself"
    neurons = Window(0, len(window))
    return [_Selection(c, neurons, config.control_kind, seed) for seed, c in enumerate(controls)], None


def _choose_extra_controls(
    ranking: Ranking, window: Window, config: SweepConfig, random: list[_Selection]
) -> tuple[list[_Selection], dict[str, str]]:
    """Return the other controls of a window, and by kind why there are none.

    A window of no neurons needs none.
    """
    chosen: list[_Selection] = []
    reasons: dict[str, str] = {}
    if not len(window):
        return chosen, reasons
    neurons = Window(0, len(window))
    for kind in config.extra_controls:
        try:
            if kind == EQUAL_ENERGY:
                chosen += [_equalize_energy(ranking, window, control) for control in random]
            else:
                control = ranking.magnitude_control(window) if kind == MAGNITUDE else ranking.matched_control(window)
                if control.meta["overlap"] == 1:
                    raise SnpatchError("it would be the window itself")
                chosen.append(_Selection(control, neurons, kind))
        except SnpatchError as error:
            reasons[kind] = str(error)
    return chosen, reasons


def _equalize_energy(ranking: Ranking, window: Window, control: _Selection) -> _Selection:
    """Return a random control with a strength at which it changes activations as much as the window."""
    own, others = ranking.energy(ranking, window), ranking.energy(control.neurons, control.window)
    if own is None or not others:
        raise SnpatchError("expected a ranking with the statistics of a pair, and neurons that differ between them")
    return replace(control, control=EQUAL_ENERGY, factor=math.sqrt(own / others))
