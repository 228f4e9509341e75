"""Sweeps: many patches over the same prompts, judged and compared with the unpatched models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.runs import texts
from snpatch.runs.config import SweepConfig
from snpatch.statistics import causal_effect, interval, paired_p

NOTHING = Window(0, 0)


@dataclass(frozen=True)
class Row:
    """One point as one judge sees it: a patch (or an unpatched model: ranking None) over all prompts.

    mean: mean score of the completions; effect: Eq. 4, the share of the way from the recipient's mean to the
    donor's; low and high: bootstrap over prompts. share: patched part of all the model's neurons. p_unpatched: paired
    t-test against the recipient's own scores; p_control: against the mean of the window's random controls. None
    where there is nothing to compare with, or no prompt's score differs.
    """

    judge: str
    recipient: str
    donor: str | None
    ranking: str | None
    control_seed: int | None
    lo: int
    hi: int
    share: float
    prompts: int
    tokens: int
    overwrites: int
    mean: float
    mean_low: float
    mean_high: float
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    p_unpatched: float | None
    p_control: float | None


@dataclass(frozen=True)
class SweepResult:
    """rows: one a judge and point, the unpatched models first. records: every completion with its scores."""

    config: SweepConfig
    rows: list[Row]
    records: list[dict]
    notes: list[str]

    @property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(row.judge for row in self.rows))

    @property
    def rankings(self) -> list[str]:
        return list(dict.fromkeys(row.ranking for row in self.rows if row.ranking is not None))

    def baseline(self, model: str, judge: str) -> Row:
        """The row of an unpatched model."""
        return next(r for r in self.rows if r.ranking is None and (r.recipient, r.judge) == (model, judge))

    def line(self, judge: str, recipient: str, ranking: str, control_seed: int | None = None) -> list[Row]:
        """The rows of one ranking's windows (or of one seed's controls), by their end."""
        key = judge, recipient, ranking, control_seed
        rows = [row for row in self.rows if (row.judge, row.recipient, row.ranking, row.control_seed) == key]
        return sorted(rows, key=lambda row: (row.hi, row.lo))

    def controls(self, row: Row) -> list[Row]:
        """The random controls of a row's window."""
        key = row.judge, row.recipient, row.ranking, row.lo, row.hi
        same = [r for r in self.rows if (r.judge, r.recipient, r.ranking, r.lo, r.hi) == key]
        return [r for r in same if r.control_seed is not None]


@dataclass(frozen=True)
class _Point:
    """What one row of the table runs. window: of the named ranking; patch: what is run for it."""

    recipient: str
    patch: Patch | None = None
    name: str | None = None
    seed: int | None = None
    window: Window = NOTHING


def sweep(
    engine: Engine,
    prompts: Sequence[Chat],
    rankings: Mapping[str, Ranking],
    judges: Mapping[str, Judge],
    config: SweepConfig,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Run every window of every ranking and of its random controls, for every recipient, and judge the texts.

    judges: name -> judge; each sees all texts. store: a folder that keeps completions, so that a killed sweep
    continues. A window of which no disjoint random control can be drawn has none, and a note says so.
    """
    if not rankings or not prompts or not judges:
        raise SnpatchError("sweep: needs at least one ranking, one prompt and one judge")
    points, notes = _points(engine, rankings, config)
    written = texts.write(
        engine, prompts, [p.patch or p.recipient for p in points], config.sampling, store=store, progress=progress
    )
    records = [{**_labels(p), **record} for p, mine in zip(points, written, strict=True) for record in mine]
    texts.judge_all(records, judges)
    rows = []
    for judge in judges:
        scores = np.array([record["scores"][judge] for record in records]).reshape(len(points), len(prompts))
        rows += _rows(engine, config, judge, points, written, scores)
    return SweepResult(config, rows, records, notes)


def _rows(engine, config, judge, points, written, scores) -> list[Row]:
    """A row a point, from its texts' scores [points, prompts]."""
    size = engine.geometry.n_layers * engine.geometry.n_neurons
    certainty = {"resamples": config.resamples, "confidence": config.confidence}
    unpatched = {point.recipient: scores[i] for i, point in enumerate(points) if point.patch is None}
    controls: dict[tuple, list[np.ndarray]] = {}
    for point, own in zip(points, scores, strict=True):
        if point.seed is not None:
            controls.setdefault((point.recipient, point.name, point.window), []).append(own)
    rows = []
    for point, mine, own in zip(points, written, scores, strict=True):
        effect, p_unpatched, p_control = (None, None, None), None, None
        if point.patch is not None:
            recipient = unpatched[point.recipient]
            effect = causal_effect(own, recipient, unpatched[config.donor], **certainty)
            p_unpatched = paired_p(own, recipient)
            random = controls.get((point.recipient, point.name, point.window))
            if random and point.seed is None:
                p_control = paired_p(own, np.mean(random, axis=0))
        rows.append(
            Row(
                judge,
                **_labels(point),
                share=len(point.window) / size,
                prompts=len(mine),
                tokens=sum(len(record["token_ids"]) for record in mine),
                overwrites=sum(record["overwrites"] for record in mine),
                **_named("mean", interval(np.mean, own, **certainty)),
                **_named("effect", effect),
                p_unpatched=p_unpatched,
                p_control=p_control,
            )
        )
    return rows


def _points(engine: Engine, rankings: Mapping[str, Ranking], config: SweepConfig) -> tuple[list[_Point], list[str]]:
    for model in (*config.recipients, config.donor):
        if model not in engine.models:
            raise SnpatchError(f"no model named {model!r}: there are {', '.join(engine.models)}")
    points, notes = [_Point(model) for model in (*config.recipients, config.donor)], []
    for name, ranking in rankings.items():
        lines: list[tuple[int | None, Window, Ranking, Window]] = []  # seed, window, what is run for it
        for window in config.windows:
            lines.append((None, window, ranking, window))
            try:
                for seed in range(config.controls):
                    control = ranking.random_control(
                        window, seed=seed, kind=config.control_kind, disjoint=config.disjoint
                    )
                    lines.append((seed, window, control, Window(0, len(control))))
            except NotEnoughNeuronsError as reason:
                notes.append(f"{name}: window [{window.lo}, {window.hi}) has no random control: {reason}")
        points += [
            _Point(recipient, Patch(recipient, config.donor, line, run, config.where), name, seed, window)
            for recipient in config.recipients
            for seed, window, line, run in lines
        ]
    return points, notes


def _labels(point: _Point) -> dict:
    donor = None if point.patch is None else point.patch.donor
    window = {"lo": point.window.lo, "hi": point.window.hi}
    return {
        "recipient": point.recipient,
        "donor": donor,
        "ranking": point.name,
        "control_seed": point.seed,
        **window,
    }


def _named(name: str, interval: tuple) -> dict:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
