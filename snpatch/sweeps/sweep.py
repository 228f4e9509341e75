"""Sweeps: many patches over the same prompts, judged and compared with the unpatched models."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import NotEnoughNeuronsError, SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.names import check_names
from snpatch.patching.patch import Patch
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.statistics import causal_effect, interval, net_effect, paired_p
from snpatch.sweeps import judging, texts
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import Store

NOTHING = Window(0, 0)
PROMPTS = "prompts"  # the name of a set that has none


@dataclass(frozen=True)
class Row:
    """One point as one judge sees it: a patch (or an unpatched model: ranking None) over all prompts of a set.

    mean: mean score of the completions; effect: Eq. 4, the share of the way from the recipient's mean to the
    donor's; net: the same without what its random controls recover; low and high: bootstrap over prompts. share:
    patched part of all the model's neurons. prompts: that count: those of which every text that is compared was
    written and scored; failed: all others. p_unpatched: paired t-test against the recipient's own scores; p_control:
    against the mean of the window's random controls. None where there is nothing to compare with, or no prompt's score
    differs.
    """

    judge: str
    set: str
    recipient: str
    donor: str | None
    ranking: str | None
    control_seed: int | None
    lo: int
    hi: int
    strength: float | None
    share: float
    prompts: int
    failed: int
    tokens: int
    overwrites: int
    mean: float | None
    mean_low: float | None
    mean_high: float | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    net: float | None
    net_low: float | None
    net_high: float | None
    p_unpatched: float | None
    p_control: float | None

    @property
    def state(self) -> str:
        """ "whole", or how many prompts the figures are of: "4 of 5 prompts"."""
        return "whole" if not self.failed else f"{self.prompts} of {self.prompts + self.failed} prompts"


@dataclass(frozen=True)
class SweepResult:
    """rows: one a judge, set and point, the unpatched models first. records: every completion with its scores.

    failures: what could not be written or scored, by prompt and error.
    """

    config: SweepConfig
    rows: list[Row]
    records: list[dict]
    notes: list[str]
    failures: list[str]

    @property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(row.judge for row in self.rows))

    @property
    def rankings(self) -> list[str]:
        return list(dict.fromkeys(row.ranking for row in self.rows if row.ranking is not None))

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(row.set for row in self.rows))

    @property
    def donor(self) -> str:
        """The one donor of a slice."""
        (donor,) = self.config.donors
        return donor

    def slices(self) -> Iterator[tuple[str, "SweepResult"]]:
        """The parts with one set, one donor and one strength, which can be drawn as one curve; and what they are."""
        for name in self.sets:
            for donor in self.config.donors:
                for strength in self.config.strengths:
                    rows = [
                        row
                        for row in self.rows
                        if row.set == name and (row.ranking is None or (row.donor, row.strength) == (donor, strength))
                    ]
                    parts = {name: self.sets, f"donor {donor}": self.config.donors}
                    parts |= {f"strength {strength:g}": self.config.strengths}
                    label = ", ".join(part for part, all_of_it in parts.items() if len(all_of_it) > 1)
                    recipients = tuple(one for one in self.config.recipients if one != donor)
                    one = replace(self.config, recipients=recipients, donors=(donor,), strengths=(strength,))
                    yield label, replace(self, config=one, rows=rows)

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
        return [r for r in self.rows if r.control_seed is not None and _beside(r) == _beside(row)]


def _beside(row: Row) -> tuple:
    """What a row has in common with its random controls."""
    return row.judge, row.set, row.recipient, row.donor, row.ranking, row.lo, row.hi, row.strength


@dataclass(frozen=True)
class Point:
    """What one row of the table runs. window: of the named ranking; patch: what is run for it."""

    recipient: str
    patch: Patch | None = None
    name: str | None = None
    seed: int | None = None
    window: Window = NOTHING

    @property
    def runs(self) -> Patch | str:
        """The patch, or the model that is run unpatched."""
        return self.patch or self.recipient

    @property
    def compared(self) -> tuple:
        """What it has in common with its random controls."""
        return self.recipient, self.patch and (self.patch.donor, self.patch.strength), self.name, self.window

    @property
    def labels(self) -> dict:
        """What its rows and records are found by."""
        return {
            "recipient": self.recipient,
            "donor": None if self.patch is None else self.patch.donor,
            "ranking": self.name,
            "control_seed": self.seed,
            "lo": self.window.lo,
            "hi": self.window.hi,
            "strength": None if self.patch is None else self.patch.strength,
        }


def sweep(
    engine: Engine,
    prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]],
    rankings: Mapping[str, Ranking],
    judges: Mapping[str, Judge],
    config: SweepConfig,
    *,
    store: str | Path | Store | None = None,
    name: str = "sweep",
    restarts: int = texts.RESTARTS,
    progress: Progress | None = None,
) -> SweepResult:
    """Run every window of every ranking and of its random controls, for every recipient and donor, and judge the texts.

    prompts: or several sets of them by name. judges: name -> judge; each sees all texts. store: a folder that keeps
    texts and scores, so that a killed sweep continues; or an open Store, in which name tells its texts from those of
    other sweeps. A window of which no disjoint random control
    can be drawn has none, and a note says so. What fails is left out of the rows and told in `failures`. restarts: of
    an engine that dies.
    """
    check_names(judges, "a judge")
    asked = ask(engine, prompts, rankings, config)
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as kept:
        asked.name(name, judges, kept)
        with judging.Meanwhile(judges, kept) as meanwhile:
            how = {"restarts": restarts, "written": meanwhile.add, "progress": progress}
            texts.fill(engine, asked.flat, kept, **how)
        return finish(asked, judges, config, kept)


@dataclass(frozen=True)
class Asked:
    """All texts that a sweep wants. items: of each point; labels: of each item, in the same order, as one list."""

    points: list[Point]
    notes: list[str]
    sets: dict[str, int]  # how many prompts each has
    items: list[list[texts.Item]]
    labels: list[dict]

    @property
    def flat(self) -> list[texts.Item]:
        """The items of all points."""
        return list(chain.from_iterable(self.items))

    def name(self, sweep: str, judges: Mapping[str, Judge], store: Store) -> None:
        """Tell the store what its texts and scores are called from here on."""
        store.name(sweep, [(item.key, own, item.error) for item, own in zip(self.flat, self.labels, strict=True)])
        store.name_judges(judging.digests_of(judges, store))


def ask(engine: Engine, prompts, rankings: Mapping[str, Ranking], config: SweepConfig) -> Asked:
    """What a sweep of these wants, checked in full before anything is written."""
    for recipient, donor in product(config.recipients, config.donors):
        own, other = map(engine.requests.model, (recipient, donor))
        if recipient != donor and own.fingerprint == other.fingerprint:
            raise SnpatchError(f"sweep: {recipient} and {donor} are the same model by content: no patch can change it")
    sets = sets_of(prompts)
    points, notes = points_of(rankings, config)
    notes = [*engine.notes, *notes]
    chats = list(chain.from_iterable(sets.values()))
    items = texts.wanted(engine, chats, [point.runs for point in points], config.sampling, config.samples)
    return named(points, notes, {name: len(mine) for name, mine in sets.items()}, items)


def named(points: list[Point], notes: list[str], sets: dict[str, int], items: list[list[texts.Item]]) -> Asked:
    """Items with their labels."""
    place = [(name, index) for name, n in sets.items() for index in range(n)]
    labels = []
    for point, mine in zip(points, items, strict=True):
        for item in mine:
            name, index = place[item.prompt_index]
            own = {"set": name, "prompt_index": index, "prompt": item.prompt, "sample": item.sample}
            labels.append({**point.labels, **own})
    return Asked(points, notes, sets, items, labels)


def finish(asked: Asked, judges: Mapping[str, Judge], config: SweepConfig, store: Store) -> SweepResult:
    """Judge what the store has of a sweep's texts, and compare."""
    written = texts.records(asked.items, store)
    records = [{**record, **own} for record, own in zip(chain.from_iterable(written), asked.labels, strict=True)]
    judging.judge_all(records, judges, store)
    rows, shape = [], (len(asked.points), sum(asked.sets.values()), config.samples)
    for judge in judges:
        scores, first = _means(records, judge, shape), 0
        for name, n in asked.sets.items():
            own = range(first, first + n)
            texts_of = [[record for record in mine if record["prompt_index"] in own] for mine in written]
            rows += _rows(config, judge, name, asked.points, texts_of, scores[:, own])
            first += n
    return SweepResult(config, rows, records, asked.notes, _failures(records))


def sets_of(prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]]) -> dict[str, Sequence[Chat]]:
    """Sets of prompts by name; none of them is empty."""
    sets = dict(prompts) if isinstance(prompts, Mapping) else {PROMPTS: prompts}
    if not sets or not all(map(len, sets.values())):
        raise SnpatchError("sweep: needs at least one prompt of each set")
    return sets


def points_of(rankings: Mapping[str, Ranking], config: SweepConfig) -> tuple[list[Point], list[str]]:
    """What a sweep runs, the unpatched models first, and which windows have no control."""
    if not rankings:
        raise SnpatchError("sweep: needs at least one ranking")
    check_names(rankings, "a ranking")
    points, notes = [Point(model) for model in config.models], []
    for name, ranking in rankings.items():
        for window in config.windows:
            controls, note = _controls(ranking, window, config)
            if note:
                notes.append(f"{name} [{window.lo}, {window.hi}) has no random control: {note}")
            for border in {window.lo, window.hi}:
                if tied := ranking.ties(border):
                    notes.append(f"{name}: {tied} neurons share the score at the border {border} of a window")
            for recipient in config.recipients:
                for donor in (one for one in config.donors if one != recipient):
                    for strength in config.strengths:
                        how = {"positions": config.positions, "strength": strength}
                        patch = Patch(recipient, donor, ranking, window, **how)
                        points.append(Point(recipient, patch, name, None, window))
                        for seed, control in enumerate(controls):
                            patch = Patch(recipient, donor, control, len(window), **how)
                            points.append(Point(recipient, patch, name, seed, window))
    return points, notes


def _controls(ranking: Ranking, window: Window, config: SweepConfig) -> tuple[list[Ranking], str | None]:
    """The random controls of a window, or why there are none."""
    try:
        kind = {"kind": config.control_kind, "disjoint": config.disjoint}
        return [ranking.random_control(window, seed=seed, **kind) for seed in range(config.controls)], None
    except NotEnoughNeuronsError as error:
        return [], str(error)


def _means(records: Sequence[dict], judge: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Scores [points, prompts] of a judge, NaN where one of a prompt's samples has none."""
    scores = [record["scores"][judge] for record in records]
    return np.array([np.nan if score is None else score for score in scores]).reshape(shape).mean(-1)


def _rows(config, judge, name, points, written, scores) -> list[Row]:
    """A row a point, from its texts' scores [points, prompts]."""
    size = next(math.prod(point.patch.ranking.shape) for point in points if point.patch is not None)
    certainty = {"resamples": config.resamples, "confidence": config.confidence}
    unpatched = {point.recipient: own for point, own in zip(points, scores, strict=True) if point.patch is None}
    controls: dict[tuple, list[np.ndarray]] = {}
    for point, own in zip(points, scores, strict=True):
        if point.seed is not None:
            controls.setdefault(point.compared, []).append(own)
    rows = []
    for point, mine, own in zip(points, written, scores, strict=True):
        compared = [own]
        if point.patch is not None:
            compared += [unpatched[point.recipient], unpatched[point.patch.donor]]
            if point.seed is None and point.compared in controls:
                compared.append(np.mean(controls[point.compared], axis=0))
        whole = ~np.isnan(compared).any(axis=0)
        own, *others = (each[whole] for each in compared)
        effect = net = (None, None, None)
        p_unpatched = p_control = None
        if others and len(own):
            recipient, donor, *random = others
            effect, p_unpatched = causal_effect(own, recipient, donor, **certainty), paired_p(own, recipient)
            if random:
                net = net_effect(own, random[0], recipient, donor, **certainty)
                p_control = paired_p(own, random[0])
        rows.append(
            Row(
                judge,
                name,
                **point.labels,
                share=len(point.window) / size,
                prompts=len(own),
                failed=len(whole) - len(own),
                tokens=sum(len(record["token_ids"]) for record in mine),
                overwrites=sum(record["overwrites"] for record in mine),
                **_named("mean", interval(np.mean, own, **certainty) if len(own) else (None, None, None)),
                **_named("effect", effect),
                **_named("net", net),
                p_unpatched=p_unpatched,
                p_control=p_control,
            )
        )
    return rows


def _named(name: str, interval: tuple) -> dict:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def _failures(records: Sequence[dict]) -> list[str]:
    """One line for each different thing that could not be made."""
    lines = []
    for record in records:
        if record["completion"] is None:
            lines.append(f"{record['set']}, prompt {record['prompt_index']}: {record['error']}")
        for judge, score in record["scores"].items():
            if score is None and record["completion"] is not None:
                lines.append(f"{record['set']}, prompt {record['prompt_index']}: {judge} has no score of its text")
    return list(dict.fromkeys(lines))
