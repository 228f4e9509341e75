"""Points of a sweep: every patch that it compares, with its random controls, and the unpatched models."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from statistics import mean

from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.names import check_names
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.sweeps.config import SweepConfig

EMPTY_WINDOW = Window(0, 0)


@dataclass(frozen=True)
class Point:
    """A patch of a sweep, or an unpatched model.

    Attributes:
        recipient: The model that generates.
        patch: What runs; None for the unpatched model.
        ranking: Name of the ranking.
        control_seed: Seed of a random control; None for the ranking's own neurons.
        window: Window over the named ranking.
        control_overlap: See Row.
    """

    recipient: str
    patch: Patch | None = None
    ranking: str | None = None
    control_seed: int | None = None
    window: Window = EMPTY_WINDOW
    control_overlap: float | None = None

    @property
    def target(self) -> Patch | str:
        """The patch, or the name of the model that runs unpatched."""
        return self.patch or self.recipient

    @property
    def curve_key(self) -> tuple:
        """Key that the point has in common with the other windows of its curve, and with their random controls."""
        return self.recipient, self.patch and (self.patch.donor, self.patch.strength), self.ranking

    @property
    def window_key(self) -> tuple:
        """Key that the point has in common with its random controls."""
        return *self.curve_key, self.window

    @property
    def labels(self) -> dict:
        """Labels of the point's rows and records."""
        return {
            "recipient": self.recipient,
            "donor": None if self.patch is None else self.patch.donor,
            "ranking": self.ranking,
            "control_seed": self.control_seed,
            "rank_lo": self.window.lo,
            "rank_hi": self.window.hi,
            "strength": None if self.patch is None else self.patch.strength,
        }


def build_points(rankings: Mapping[str, Ranking], config: SweepConfig) -> tuple[list[Point], list[str]]:
    """Return the points of a sweep, the unpatched models first, and notes about its windows."""
    if not rankings:
        raise SnpatchError("sweep: rankings: expected at least one, got none")
    check_names(rankings, "a ranking")
    pairs = [(r, d, s) for r, d, s in product(config.recipients, config.donors, config.strengths) if r != d]
    points, notes = [Point(model) for model in config.models], []
    overlaps: dict[str, list[str]] = {}
    for (name, ranking), window in product(rankings.items(), config.windows):
        controls, note = _draw_controls(ranking, window, config)
        if note:
            notes.append(f"{name} [{window.lo}, {window.hi}) has no random control: {note}")
        mean_overlap = mean(control.meta["overlap"] for control in controls) if controls else None
        if config.disjoint and mean_overlap:
            overlaps.setdefault(name, []).append(f"[{window.lo}, {window.hi}) by {mean_overlap:.1%}")
        for border in {window.lo, window.hi}:
            if tied := ranking.ties(border):
                notes.append(f"{name}: {tied} neurons share the score at the border {border} of a window")
        selections = [(None, ranking, window)]
        selections += [(seed, control, len(window)) for seed, control in enumerate(controls)]
        for (recipient, donor, strength), (seed, source, size) in product(pairs, selections):
            patch = Patch(recipient, donor, source, size, positions=config.positions, strength=strength)
            overlap = mean_overlap if seed is None else source.meta["overlap"]
            points.append(Point(recipient, patch, name, seed, window, overlap))
    notes += [
        f"{name}: random controls overlap with the window where too few other neurons are left: {', '.join(windows)}; "
        "net_effect and p_vs_random are conservative there"
        for name, windows in overlaps.items()
    ]
    return points, notes


def _draw_controls(ranking: Ranking, window: Window, config: SweepConfig) -> tuple[list[Ranking], str | None]:
    """Return the random controls of a window, or why there are none."""
    options = {"kind": config.control_kind, "disjoint": config.disjoint, "fill_up": True}
    try:
        controls = [ranking.random_control(window, seed=seed, **options) for seed in range(config.controls)]
    except NotEnoughNeuronsError as error:
        return [], str(error)
    if config.disjoint and any(control.meta["overlap"] == 1 for control in controls):
        return [], "no other neurons are left, so a control would be the window itself"
    return controls, None
