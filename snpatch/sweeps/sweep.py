"""Sweeps: completions of many patches over the same prompts, judged and compared with the unpatched models."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from statistics import mean
from typing import Any

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
from snpatch.statistics import UNDEFINED, Interval, causal_effect, interval, net_effect, paired_p
from snpatch.sweeps import generation, judging
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.generation import CompletionTask
from snpatch.sweeps.store import Store

EMPTY_WINDOW = Window(0, 0)
DEFAULT_SET = "prompts"  # name of a prompt set that has none


@dataclass(frozen=True)
class Row:
    """One point of a sweep over one prompt set, as one judge scored it.

    Attributes:
        judge: Name of the judge.
        set: Name of the prompt set.
        recipient: The patched model, or the unpatched model where `ranking` is None.
        donor: The model whose activations are copied; None for an unpatched model.
        ranking: Name of the ranking; None for an unpatched model.
        control_seed: Seed of the random control; None for the ranking's own neurons.
        rank_lo: First rank of the window.
        rank_hi: Rank after the window's last.
        strength: Strength of the patch; None for an unpatched model.
        neuron_fraction: Patched neurons as a fraction of all neurons.
        prompts: Prompts with all completions written and scored, of this point and of those it is compared with.
        failed: All other prompts.
        tokens: Generated tokens.
        overwrites: Overwrites that the device counted.
        mean: Mean score of the completions. The bounds `_low` and `_high` are from a bootstrap over prompts.
        effect: Eq. 4: the fraction of the way from the recipient's mean to the donor's.
        net_effect: The same without what the random controls recover.
        p_vs_unpatched: p of a paired t-test against the scores of the unpatched recipient.
        p_vs_random: p of a paired t-test against the mean scores of the random controls.
        control_overlap: Fraction of a control's neurons that are the window's own; of a window, the mean over its
            controls. Above 0, net_effect and p_vs_random are conservative: the controls contain what they control for.

    A figure is None if there is nothing to compare with; a p also if no prompt's score differs.
    """

    judge: str
    set: str
    recipient: str
    donor: str | None
    ranking: str | None
    control_seed: int | None
    rank_lo: int
    rank_hi: int
    strength: float | None
    neuron_fraction: float
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
    net_effect: float | None
    net_effect_low: float | None
    net_effect_high: float | None
    p_vs_unpatched: float | None
    p_vs_random: float | None
    control_overlap: float | None = None

    @property
    def state(self) -> str:
        """Completeness of the figures: "whole" or, for example, "4 of 5 prompts"."""
        return "whole" if not self.failed else f"{self.prompts} of {self.prompts + self.failed} prompts"


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        config: The grid.
        rows: One row per judge, prompt set and point, the unpatched models first.
        records: Every completion with its scores.
        notes: Remarks about windows, for example one without a random control.
        failures: Completions and scores that failed: prompt and error.
    """

    config: SweepConfig
    rows: list[Row]
    records: list[dict]
    notes: list[str]
    failures: list[str]

    @property
    def judges(self) -> list[str]:
        """Return the distinct names of the judges, in the order of the rows."""
        return list(dict.fromkeys(row.judge for row in self.rows))

    @property
    def rankings(self) -> list[str]:
        """Return the distinct names of the rankings, in the order of the rows; unpatched models have none."""
        return list(dict.fromkeys(row.ranking for row in self.rows if row.ranking is not None))

    @property
    def sets(self) -> list[str]:
        """Return the distinct names of the prompt sets, in the order of the rows; a slice has one."""
        return list(dict.fromkeys(row.set for row in self.rows))

    @property
    def donor(self) -> str:
        """The donor of a slice."""
        (donor,) = self.config.donors
        return donor

    def slices(self) -> Iterator[tuple[str, "SweepResult"]]:
        """Yield label and result of each combination of prompt set, donor and strength; each is one curve."""
        for name, donor, strength in product(self.sets, self.config.donors, self.config.strengths):
            rows = [
                row
                for row in self.rows
                if row.set == name and (row.ranking is None or (row.donor, row.strength) == (donor, strength))
            ]
            dimensions = {name: self.sets, f"donor {donor}": self.config.donors}
            dimensions |= {f"strength {strength:g}": self.config.strengths}
            label = ", ".join(value for value, values in dimensions.items() if len(values) > 1)
            recipients = tuple(recipient for recipient in self.config.recipients if recipient != donor)
            config = replace(self.config, recipients=recipients, donors=(donor,), strengths=(strength,))
            yield label, replace(self, config=config, rows=rows)

    def baseline(self, model: str, judge: str) -> Row:
        """Return the row of an unpatched model."""
        return next(r for r in self.rows if r.ranking is None and (r.recipient, r.judge) == (model, judge))

    def line(self, judge: str, recipient: str, ranking: str, control_seed: int | None = None) -> list[Row]:
        """Return the rows of a ranking's windows, or of the controls of one seed, sorted by the window's end."""
        key = judge, recipient, ranking, control_seed
        rows = [row for row in self.rows if (row.judge, row.recipient, row.ranking, row.control_seed) == key]
        return sorted(rows, key=lambda row: (row.rank_hi, row.rank_lo))

    def controls(self, row: Row) -> list[Row]:
        """Return the rows of the random controls of a row's window."""
        return [r for r in self.rows if r.control_seed is not None and _window_key(r) == _window_key(row)]


def _window_key(row: Row) -> tuple:
    """Return what a row has in common with its random controls."""
    return row.judge, row.set, row.recipient, row.donor, row.ranking, row.rank_lo, row.rank_hi, row.strength


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
    def window_key(self) -> tuple:
        """Key that the point has in common with its random controls."""
        return self.recipient, self.patch and (self.patch.donor, self.patch.strength), self.ranking, self.window

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


@dataclass(frozen=True)
class SweepPlan:
    """All completions of a sweep.

    Attributes:
        points: The points.
        notes: Remarks about engine and windows.
        sets: Number of prompts of each prompt set.
        tasks: Tasks of each point, over the prompts of all sets.
        labels: Labels of each task, in the order of `flat_tasks`.
    """

    points: list[Point]
    notes: list[str]
    sets: dict[str, int]
    tasks: list[list[CompletionTask]]
    labels: list[dict]

    @property
    def flat_tasks(self) -> list[CompletionTask]:
        """The tasks of all points."""
        return list(chain.from_iterable(self.tasks))

    def set_labels(self, sweep: str, judges: Mapping[str, Judge], store: Store) -> None:
        """Store the labels of the sweep's completions, and under which keys its judges' scores are stored."""
        rows = zip(self.flat_tasks, self.labels, strict=True)
        store.set_labels(sweep, [(task.key, labels, task.error) for task, labels in rows])
        store.set_judges(judging.judge_keys(judges, store))


def sweep(
    engine: Engine,
    prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]],
    rankings: Mapping[str, Ranking],
    judges: Mapping[str, Judge],
    config: SweepConfig,
    *,
    store: str | Path | Store | None = None,
    name: str = "sweep",
    max_restarts: int = generation.MAX_RESTARTS,
    progress: Progress | None = None,
) -> SweepResult:
    """Run a sweep: generate and judge completions for every window, recipient and donor.

    The windows are those of every ranking and of its random controls. Where too few neurons are left for a disjoint
    control, it contains some of the window's own, and a note names the window and the overlap. A window that leaves no
    neuron has no control, and a note says so. Completions and scores that fail are left out of the rows and listed in
    `failures`.

    Args:
        engine: The engine.
        prompts: Prompts, or several prompt sets by name.
        rankings: Rankings by name.
        judges: Judges by name; each scores all completions.
        config: The grid.
        store: A folder that stores completions and scores, so that a killed sweep resumes; or an open Store.
        name: Separates the completions of this sweep in the store from those of other sweeps.
        max_restarts: Maximum number of restarts after engine crashes.
        progress: Called as `progress(done, total)`.

    Returns:
        A SweepResult with one row per judge, prompt set and point.

    Raises:
        SnpatchError: The grid, a name or a prompt set is invalid, or a judge can score nothing.
    """
    check_names(judges, "a judge")
    plan = plan_sweep(engine, prompts, rankings, config)
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as open_store:
        plan.set_labels(name, judges, open_store)
        with judging.BackgroundScorer(judges, open_store) as scorer:
            generation.generate_missing(
                engine,
                plan.flat_tasks,
                open_store,
                max_restarts=max_restarts,
                on_completion=scorer.add,
                progress=progress,
            )
        return build_result(plan, judges, config, open_store)


def plan_sweep(engine: Engine, prompts, rankings: Mapping[str, Ranking], config: SweepConfig) -> SweepPlan:
    """Plan all completions of a sweep, and check them before any is generated."""
    for recipient, donor in product(config.recipients, config.donors):
        models = [engine.requests.model(name) for name in (recipient, donor)]
        if recipient != donor and models[0].fingerprint == models[1].fingerprint:
            raise SnpatchError(f"sweep: expected two models, got {recipient} and {donor}, which are equal by content")
    sets = name_sets(prompts)
    points, window_notes = build_points(rankings, config)
    notes = [*engine.notes, *window_notes]
    chats = list(chain.from_iterable(sets.values()))
    targets = [point.target for point in points]
    tasks = generation.plan_completions(engine, chats, targets, config.sampling, config.samples)
    return label_tasks(points, notes, {name: len(chats) for name, chats in sets.items()}, tasks)


def label_tasks(
    points: list[Point], notes: list[str], sets: dict[str, int], tasks: list[list[CompletionTask]]
) -> SweepPlan:
    """Return the plan of these tasks, with their labels."""
    prompt_labels = [{"set": name, "prompt_index": index} for name, n in sets.items() for index in range(n)]
    labels = []
    for point, point_tasks in zip(points, tasks, strict=True):
        for task in point_tasks:
            prompt = {**prompt_labels[task.prompt_index], "prompt": task.prompt, "sample": task.sample}
            labels.append({**point.labels, **prompt})
    return SweepPlan(points, notes, sets, tasks, labels)


def build_result(plan: SweepPlan, judges: Mapping[str, Judge], config: SweepConfig, store: Store) -> SweepResult:
    """Judge the stored completions of a sweep, and compare them."""
    point_records = generation.build_records(plan.tasks, store)
    flat_records = chain.from_iterable(point_records)
    records = [{**record, **labels} for record, labels in zip(flat_records, plan.labels, strict=True)]
    judging.judge_all(records, judges, store)
    shape = (len(plan.points), sum(plan.sets.values()), config.samples)
    rows = []
    for judge in judges:
        scores, first = _mean_scores(records, judge, shape), 0
        for name, n in plan.sets.items():
            indices = range(first, first + n)
            set_records = [[record for record in rs if record["prompt_index"] in indices] for rs in point_records]
            rows += _build_rows(config, judge, name, plan.points, set_records, scores[:, indices])
            first += n
    return SweepResult(config, rows, records, plan.notes, _describe_failures(records))


def name_sets(prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]]) -> dict[str, Sequence[Chat]]:
    """Return prompt sets by name. Raise if one is empty."""
    sets = dict(prompts) if isinstance(prompts, Mapping) else {DEFAULT_SET: prompts}
    if not sets or not all(map(len, sets.values())):
        raise SnpatchError("sweep: prompts: expected at least one prompt in each set, got none")
    return sets


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


def _mean_scores(records: Sequence[dict], judge: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a judge's scores [points, prompts], averaged over samples; NaN if a sample has no score."""
    scores = [record["scores"][judge] for record in records]
    return np.array([np.nan if score is None else score for score in scores]).reshape(shape).mean(-1)


def _build_rows(
    config: SweepConfig,
    judge: str,
    set_name: str,
    points: Sequence[Point],
    records: Sequence[Sequence[dict]],  # of each point
    scores: np.ndarray,  # [points, prompts]
) -> list[Row]:
    """Return one row per point."""
    num_neurons = next(math.prod(point.patch.ranking.shape) for point in points if point.patch is not None)
    unpatched = {point.recipient: values for point, values in zip(points, scores, strict=True) if point.patch is None}
    control_scores: dict[tuple, list[np.ndarray]] = {}
    for point, point_scores in zip(points, scores, strict=True):
        if point.control_seed is not None:
            control_scores.setdefault(point.window_key, []).append(point_scores)
    rows = []
    for point, point_records, point_scores in zip(points, records, scores, strict=True):
        compared = [point_scores]
        if point.patch is not None:
            assert isinstance(point.patch.donor, str)  # see build_points
            compared += [unpatched[point.recipient], unpatched[point.patch.donor]]
            if point.control_seed is None and point.window_key in control_scores:
                compared.append(np.mean(control_scores[point.window_key], axis=0))
        is_complete = ~np.isnan(compared).any(axis=0)
        figures = _compare(config, *(values[is_complete] for values in compared))
        rows.append(
            Row(
                judge,
                set_name,
                **point.labels,
                neuron_fraction=len(point.window) / num_neurons,
                prompts=int(is_complete.sum()),
                failed=int((~is_complete).sum()),
                tokens=sum(len(record["token_ids"]) for record in point_records),
                overwrites=sum(record["overwrites"] for record in point_records),
                **figures,
                control_overlap=point.control_overlap,
            )
        )
    return rows


def _compare(
    config: SweepConfig,
    point_scores: np.ndarray,
    recipient: np.ndarray | None = None,
    donor: np.ndarray | None = None,
    random: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return mean, effects and p values of a point's scores [prompts].

    The other arguments are the scores that it is compared with.
    """
    certainty = {"resamples": config.resamples, "confidence": config.confidence}
    mean: Interval = interval(np.mean, point_scores, **certainty) if len(point_scores) else UNDEFINED
    effect = net = UNDEFINED
    p_vs_unpatched = p_vs_random = None
    if recipient is not None and donor is not None and len(point_scores):
        effect = causal_effect(point_scores, recipient, donor, **certainty)
        p_vs_unpatched = paired_p(point_scores, recipient)
        if random is not None:
            net = net_effect(point_scores, random, recipient, donor, **certainty)
            p_vs_random = paired_p(point_scores, random)
    return {
        **mean.columns("mean"),
        **effect.columns("effect"),
        **net.columns("net_effect"),
        "p_vs_unpatched": p_vs_unpatched,
        "p_vs_random": p_vs_random,
    }


def _describe_failures(records: Sequence[dict]) -> list[str]:
    """Return one line for each different failure."""
    lines = []
    for record in records:
        prompt = f"{record['set']}, prompt {record['prompt_index']}"
        if record["completion"] is None:
            lines.append(f"{prompt}: {record['error']}")
        for judge, score in record["scores"].items():
            if score is None and record["completion"] is not None:
                lines.append(f"{prompt}: {judge} has no score of its completion")
    return list(dict.fromkeys(lines))
