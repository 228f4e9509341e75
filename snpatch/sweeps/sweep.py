"""Sweeps: completions of many patches over the same prompts, judged and compared with the unpatched models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np

from snpatch.data import Chat
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge
from snpatch.names import check_names
from snpatch.ranking.ranking import Ranking
from snpatch.statistics import UNDEFINED, interval
from snpatch.sweeps import coherence, generation, judging
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.generation import CompletionTask
from snpatch.sweeps.points import Point, build_points
from snpatch.sweeps.rows import Row, build_notes, build_rows
from snpatch.sweeps.store import Store

DEFAULT_SET = "prompts"  # name of a prompt set that has none


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        config: The grid.
        rows: One row per judge, prompt set and point, the unpatched models first.
        records: Every completion with its scores, and its log-probability per token under each unpatched model.
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
        reported_sets = [name for name in self.sets if name != self.config.harmless]
        for name, donor, strength in product(self.sets, self.config.donors, self.config.strengths):
            rows = [
                row
                for row in self.rows
                if row.set == name and (row.ranking is None or (row.donor, row.strength) == (donor, strength))
            ]
            dimensions = {name: reported_sets, f"donor {donor}": self.config.donors}
            dimensions |= {f"strength {strength:g}": self.config.strengths}
            label = ", ".join(value for value, values in dimensions.items() if len(values) > 1)
            recipients = tuple(recipient for recipient in self.config.recipients if recipient != donor)
            config = replace(self.config, recipients=recipients, donors=(donor,), strengths=(strength,))
            yield label, replace(self, config=config, rows=rows)

    def is_reported(self, judge: str) -> bool:
        """Return whether a slice has a table, plots and sentences for a judge.

        Scores of harmless prompts, and refusals, are columns of the other rows.
        """
        config = self.config
        return not config.harmless or (self.sets != [config.harmless] and judge != config.refusal_judge)

    def baseline(self, model: str, judge: str) -> Row:
        """Return the row of an unpatched model."""
        return next(r for r in self.rows if r.ranking is None and (r.recipient, r.judge) == (model, judge))

    def line(
        self, judge: str, recipient: str, ranking: str, control: str | None = None, control_seed: int | None = None
    ) -> list[Row]:
        """Return the rows of a ranking's windows, or of one of their controls, sorted by the window's end."""
        key = judge, recipient, ranking, control, control_seed
        rows = [
            row for row in self.rows if (row.judge, row.recipient, row.ranking, row.control, row.control_seed) == key
        ]
        return sorted(rows, key=lambda row: (row.rank_hi, row.rank_lo))

    def controls(self, row: Row, kind: str | None = None) -> list[Row]:
        """Return the rows of the controls of a row's window. kind: default is that of the random controls."""
        kind = kind or self.config.control_kind
        return [r for r in self.rows if r.control == kind and _window_key(r) == _window_key(row)]


def _window_key(row: Row) -> tuple:
    """Return what a row has in common with its controls."""
    return row.judge, row.set, row.recipient, row.donor, row.ranking, row.rank_lo, row.rank_hi, row.strength


@dataclass(frozen=True)
class SweepPlan:
    """All completions of a sweep.

    Attributes:
        points: The points.
        notes: Remarks about engine and windows.
        sets: Number of prompts of each prompt set.
        tasks: Tasks of each point, over the prompts of all sets.
        labels: Labels of each task, in the order of `flat_tasks`.
        clusters: Label of each prompt's cluster, by set; empty if every prompt is a cluster of its own.
    """

    points: list[Point]
    notes: list[str]
    sets: dict[str, int]
    tasks: list[list[CompletionTask]]
    labels: list[dict]
    clusters: Mapping[str, Sequence[object]]

    @property
    def flat_tasks(self) -> list[CompletionTask]:
        """The tasks of all points."""
        return list(chain.from_iterable(self.tasks))

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Names of the unpatched models that read each completion, by its key."""
        models = tuple(point.recipient for point in self.points if point.patch is None)
        readers: dict[str, tuple[str, ...]] = {}
        for point, tasks in zip(self.points, self.tasks, strict=True):
            for task in tasks:
                if task.key is not None:
                    names = (*readers.get(task.key, ()), *(point.readers or models))
                    readers[task.key] = tuple(dict.fromkeys(names))
        return readers

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
    clusters: Mapping[str, Sequence[object]] | None = None,
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
        clusters: Label of each prompt, by set ("prompts" if it has no name), if scores of prompts with the same label
            depend on one another. Intervals and tests are then over clusters.
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
    if config.harmless and config.refusal_judge not in judges:
        raise SnpatchError(
            f"sweep: refusal_judge: expected one of the judges, {', '.join(judges)}, got {config.refusal_judge}. The "
            "share of harmless prompts that are refused needs it."
        )
    plan = plan_sweep(engine, prompts, rankings, config, clusters)
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
            fingerprints = {model: engine.fingerprint(model) for model in config.models}
            if config.coherence:
                requests = {task.key: task.request for task in plan.flat_tasks if task.key and task.request}
                coherence.read_missing(
                    engine, requests, plan.readers, fingerprints, open_store,
                    max_restarts=max_restarts, progress=progress,
                )  # fmt: skip
        return build_result(plan, judges, config, open_store, fingerprints)


def plan_sweep(
    engine: Engine,
    prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]],
    rankings: Mapping[str, Ranking],
    config: SweepConfig,
    clusters: Mapping[str, Sequence[object]] | None = None,
) -> SweepPlan:
    """Plan all completions of a sweep, and check them before any is generated."""
    for recipient, donor in product(config.recipients, config.donors):
        models = [engine.requests.model(name) for name in (recipient, donor)]
        if recipient != donor and models[0].fingerprint == models[1].fingerprint:
            raise SnpatchError(f"sweep: expected two models, got {recipient} and {donor}, which are equal by content")
    sets = name_sets(prompts)
    sizes = {name: len(chats) for name, chats in sets.items()}
    if config.harmless and config.harmless not in sets:
        raise SnpatchError(f"sweep: harmless: expected one of the sets, {', '.join(sets)}, got {config.harmless}")
    _check_clusters(clusters, sizes, config)
    points, window_notes = build_points(rankings, config)
    notes = [*engine.notes, *window_notes]
    chats = list(chain.from_iterable(sets.values()))
    targets = [point.target for point in points]
    tasks = generation.plan_completions(engine, chats, targets, config.sampling, config.samples)
    return label_tasks(points, notes, sizes, tasks, clusters)


def label_tasks(
    points: list[Point],
    notes: list[str],
    sets: dict[str, int],
    tasks: list[list[CompletionTask]],
    clusters: Mapping[str, Sequence[object]] | None = None,
) -> SweepPlan:
    """Return the plan of these tasks, with their labels."""
    prompt_labels = [{"set": name, "prompt_index": index} for name, n in sets.items() for index in range(n)]
    labels = []
    for point, point_tasks in zip(points, tasks, strict=True):
        for task in point_tasks:
            prompt = {**prompt_labels[task.prompt_index], "prompt": task.prompt, "sample": task.sample}
            labels.append({**point.labels, **prompt})
    return SweepPlan(points, notes, sets, tasks, labels, clusters or {})


def build_result(
    plan: SweepPlan,
    judges: Mapping[str, Judge],
    config: SweepConfig,
    store: Store,
    fingerprints: Mapping[str, str],
) -> SweepResult:
    """Judge a sweep's stored completions and compare them. fingerprints: of its models, by name."""
    flat_records = chain.from_iterable(generation.build_records(plan.tasks, store))
    records = [{**record, **labels} for record, labels in zip(flat_records, plan.labels, strict=True)]
    judging.judge_all(records, judges, store)
    logprobs = coherence.load_logprobs(store, fingerprints)
    for record, task in zip(records, plan.flat_tasks, strict=True):
        record["logprobs"] = {
            model: None if task.key is None else values.get(task.key) for model, values in logprobs.items()
        }
    shape = (len(plan.points), sum(plan.sets.values()), config.samples)
    num_texts = shape[1] * shape[2]
    by_point = [records[start : start + num_texts] for start in range(0, len(records), num_texts)]
    refused = _estimate_refusals(plan, records, config, shape)
    rows, notes = [], [*plan.notes]
    for judge in judges:
        scores, first = _mean_scores(records, judge, shape), 0
        for name, n in plan.sets.items():
            indices = range(first, first + n)
            set_records = [[record for record in point_records if record["set"] == name] for point_records in by_point]
            set_scores, clusters = scores[:, indices], plan.clusters.get(name)
            set_rows = build_rows(config, judge, name, plan.points, set_records, set_scores, clusters)
            rows += [replace(row, **figures) for row, figures in zip(set_rows, refused, strict=True)]
            notes += build_notes(config, judge, name, plan.points, set_scores, clusters)
            first += n
    return SweepResult(config, rows, records, list(dict.fromkeys(notes)), _describe_failures(records))


def _estimate_refusals(
    plan: SweepPlan, records: Sequence[dict], config: SweepConfig, shape: tuple[int, int, int]
) -> list[dict[str, float | None]]:
    """Return the share of the harmless prompts that each point refuses, with its interval."""
    if not config.harmless:
        return [UNDEFINED.columns("harmless_refused")] * len(plan.points)
    names = list(plan.sets)
    start = sum(plan.sets[name] for name in names[: names.index(config.harmless)])
    scores = _mean_scores(records, config.refusal_judge, shape)[:, start : start + plan.sets[config.harmless]]
    certainty = {"resamples": config.resamples, "confidence": config.confidence}
    shares = []
    for values in scores:
        is_refused = values[~np.isnan(values)] < 0
        share = interval(np.mean, is_refused, **certainty) if len(is_refused) else UNDEFINED
        shares.append(share.columns("harmless_refused"))
    return shares


def name_sets(prompts: Sequence[Chat] | Mapping[str, Sequence[Chat]]) -> dict[str, Sequence[Chat]]:
    """Return prompt sets by name. Raise if one is empty."""
    sets = dict(prompts) if isinstance(prompts, Mapping) else {DEFAULT_SET: prompts}
    if not sets or not all(map(len, sets.values())):
        raise SnpatchError("sweep: prompts: expected at least one prompt in each set, got none")
    return sets


def _check_clusters(
    clusters: Mapping[str, Sequence[object]] | None, sizes: Mapping[str, int], config: SweepConfig
) -> None:
    """Raise if the clusters have no label for each prompt of each set."""
    if clusters is None:
        if config.cluster_by:
            raise SnpatchError(f"sweep: clusters: expected the {config.cluster_by} of each prompt, got none")
        return
    num_labels = {name: len(labels) for name, labels in clusters.items()}
    if num_labels != dict(sizes):
        raise SnpatchError(f"sweep: clusters: expected the number of prompts of each set, {sizes}, got {num_labels}")


def _mean_scores(records: Sequence[dict], judge: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a judge's scores [points, prompts], averaged over samples; NaN if a sample has no score."""
    scores = [record["scores"][judge] for record in records]
    return np.array([np.nan if score is None else score for score in scores]).reshape(shape).mean(-1)


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
