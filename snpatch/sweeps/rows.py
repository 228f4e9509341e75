"""Rows of a sweep: the scores of each point, compared with unpatched models and random controls.

Why all rows of a set share their prompts: means over different prompts are not comparable, so that a prompt whose
completion failed under one patch would move the others' effects.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from snpatch.ranking.window import MAGNITUDE
from snpatch.significance import (
    POWER,
    control_p,
    detectable_difference,
    false_discovery_rate,
    holm,
    paired_p,
    paired_share_p,
)
from snpatch.statistics import (
    UNDEFINED,
    Clusters,
    causal_effect,
    estimate_gap,
    estimate_means,
    interval,
    net_effect,
    simultaneous_band,
)
from snpatch.sweeps.coherence import describe_texts, find_broken, get_logprobs
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.points import Point

MIN_COMPLETE_SHARE = 0.5  # of a point's prompts; a point with fewer does not decide which prompts all rows share
MIN_CLUSTERS = 10  # below which intervals over clusters are rough


@dataclass(frozen=True)
class Row:
    """One point of a sweep over one prompt set, as one judge scored it.

    Attributes:
        judge: Name of the judge.
        set: Name of the prompt set.
        recipient: The patched model, or the unpatched model where `ranking` is None.
        donor: The model whose activations are copied; None for an unpatched model.
        ranking: Name of the ranking; None for an unpatched model.
        control: Kind of the control; None for the ranking's own neurons.
        control_seed: Seed of a random control.
        rank_lo: First rank of the window.
        rank_hi: Rank after the window's last.
        strength: Strength of the patch; None for an unpatched model.
        neuron_fraction: Patched neurons as a fraction of all neurons of the model.
        prompts: Prompts that the figures are of: those with all completions written and scored at every point of the
            set. A point with less than half of its completions does not count there, and has fewer.
        failed: All other prompts.
        tokens: Generated tokens.
        overwrites: Overwrites that the device counted.
        mean: Mean score of the completions. The bounds `_low` and `_high` are from a bootstrap over prompts.
        effect: Eq. 4: the fraction of the way from the recipient's mean to the donor's, with Fieller's interval; None
            if the gap between them is not established (see statistics.estimate_gap).
        net_effect: The same without what the random controls recover on average; its interval is over prompts and
            draws, and None for one draw.
        p_vs_unpatched: p of a two-sided paired t-test against the scores of the unpatched recipient.
        p_vs_random: p of a one-sided test that one more random draw moves the mean as far towards the donor; see
            significance.control_p. None for one draw.
        control_overlap: Fraction of a control's neurons that are the window's own; of a window, the mean over its
            controls. Above 0, net_effect and p_vs_random are conservative: the controls contain what they control for.
        ranked_fraction: Patched neurons as a fraction of the ranked ones.
        controls: Number of random controls that the row is compared with.
        gap: Mean score of the unpatched donor minus the unpatched recipient's, with its t-interval.
        gap_t: Paired t of the gap; None without spread.
        band_low: Lower bound of the mean, which holds for all windows of the curve at once.
        band_high: The upper bound.
        q_vs_random: p_vs_random corrected over the windows of the curve by the false discovery rate.
        p_holm_vs_random: The same by Holm's method.
        share_above_0: Share of prompts with a score above 0: the attack success rate, for a cost.
        p_share_above_0: p of McNemar's exact test of that share against the unpatched recipient's.
        net_of_magnitude: The effect without that of the magnitude control, whose neurons have the recipient's largest
            activations.
        energy: Fraction of the model's squared change, over the contrast's texts, that the patch carries.
        ended: Share of texts that end before the length limit.
        mean_tokens: Mean length of a text in tokens.
        repeated_4grams: Mean share of a text's 4-grams that it had before.
        distinct_2: Mean share of a text's bigrams that it did not have before.
        logprob: Mean log-probability per token, averaged over texts, each under the unpatched model (recipient or
            donor) that finds it likelier.
        broken: Share of texts whose log-probability is below the first percentile of the unpatched models' own texts.
        effect_coherent: The effect over the prompts without a broken text.
        coherent_prompts: Number of these prompts.
        harmless_refused: Share of the harmless prompts (SweepConfig.harmless) that are refused under the same patch.

    A curve is the windows of one judge, set, recipient, donor, strength and ranking. A figure is None if there is
    nothing to compare with; a p also if no prompt's score differs.
    """

    judge: str
    set: str
    recipient: str
    donor: str | None
    ranking: str | None
    control: str | None
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
    ranked_fraction: float | None = None
    controls: int = 0
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    gap_t: float | None = None
    band_low: float | None = None
    band_high: float | None = None
    q_vs_random: float | None = None
    p_holm_vs_random: float | None = None
    share_above_0: float | None = None
    p_share_above_0: float | None = None
    net_of_magnitude: float | None = None
    net_of_magnitude_low: float | None = None
    net_of_magnitude_high: float | None = None
    energy: float | None = None
    ended: float | None = None
    mean_tokens: float | None = None
    repeated_4grams: float | None = None
    distinct_2: float | None = None
    logprob: float | None = None
    broken: float | None = None
    effect_coherent: float | None = None
    effect_coherent_low: float | None = None
    effect_coherent_high: float | None = None
    coherent_prompts: int | None = None
    harmless_refused: float | None = None
    harmless_refused_low: float | None = None
    harmless_refused_high: float | None = None

    @property
    def state(self) -> str:
        """Completeness of the figures: "whole" or, for example, "4 of 5 prompts"."""
        return "whole" if not self.failed else f"{self.prompts} of {self.prompts + self.failed} prompts"

    @property
    def num_patched(self) -> int:
        """Number of patched neurons."""
        return self.rank_hi - self.rank_lo


class Coherence:
    """Coherence of the texts of each point of a prompt set."""

    def __init__(
        self, points: Sequence[Point], records: Sequence[Sequence[dict]], num_prompts: int, unpatched: dict[str, int]
    ) -> None:
        self._points, self._records, self._num_prompts, self._unpatched = points, records, num_prompts, unpatched

    def figures(self, index: int) -> dict[str, Any]:
        """Return a point's figures: those of its texts, their log-probability, and the share that is broken."""
        point, records = self._points[index], self._records[index]
        logprobs = get_logprobs(records, point.readers or self._unpatched)
        is_read = not np.isnan(logprobs).all()
        return {
            **describe_texts(records),
            "logprob": float(np.nanmean(logprobs)) if is_read else None,
            "broken": float(self._is_broken(index).mean()) if is_read and point.patch is not None else None,
        }

    def is_coherent(self, index: int) -> np.ndarray:
        """Return a mask of the prompts none of whose texts is broken."""
        return ~np.any(self._is_broken(index).reshape(self._num_prompts, -1), axis=1)

    def _is_broken(self, index: int) -> np.ndarray:
        pair = self._points[index].readers
        own = [get_logprobs(self._records[self._unpatched[model]], pair) for model in pair]
        return find_broken(get_logprobs(self._records[index], pair), np.concatenate([*own, []]))


def build_rows(
    config: SweepConfig,
    judge: str,
    set_name: str,
    points: Sequence[Point],
    records: Sequence[Sequence[dict]],  # of each point
    scores: np.ndarray,  # [points, prompts]; NaN where a completion or a score failed
    clusters: Clusters = None,
) -> list[Row]:
    """Return one row per point, in their order."""
    num_neurons = next(math.prod(point.patch.ranking.shape) for point in points if point.patch is not None)
    patched = {p.ranking: p.patch for p in points if p.patch is not None and p.control is None}
    num_ranked = {name: len(patch.ranking) for name, patch in patched.items()}
    unpatched = {point.recipient: index for index, point in enumerate(points) if point.patch is None}
    is_scored, shared = ~np.isnan(scores), find_shared_prompts(scores)
    random, magnitude = (find_controls(points, scores, kind) for kind in (config.control_kind, MAGNITUDE))
    coherence = Coherence(points, records, scores.shape[1], unpatched)
    rows = []
    for index, point in enumerate(points):
        compared = {"scores": index}
        if point.patch is not None:
            assert isinstance(point.patch.donor, str)  # see build_points
            compared |= {"recipient": unpatched[point.recipient], "donor": unpatched[point.patch.donor]}
        draws = random.get(point.window_key, []) if point.control is None else []
        largest = magnitude.get(point.window_key, []) if point.control is None else []
        indices = shared & is_scored[[*compared.values(), *draws, *largest]].all(axis=0)
        figures = compare_scores(
            **{name: scores[compared_index, indices] for name, compared_index in compared.items()},
            controls=scores[draws][:, indices] if draws else None,
            magnitude=scores[largest[0], indices] if largest else None,
            is_coherent=coherence.is_coherent(index)[indices],
            clusters=_select(clusters, indices),
            resamples=config.resamples,
            confidence=config.confidence,
        )
        rows.append(
            Row(
                judge,
                set_name,
                **point.labels,
                neuron_fraction=len(point.window) / num_neurons,
                prompts=int(indices.sum()),
                failed=int((~indices).sum()),
                tokens=sum(len(record["token_ids"]) for record in records[index]),
                overwrites=sum(record["overwrites"] for record in records[index]),
                **figures,
                **coherence.figures(index),
                control_overlap=point.control_overlap,
                energy=point.energy,
                ranked_fraction=None if point.ranking is None else len(point.window) / num_ranked[point.ranking],
                controls=len(draws),
            )
        )
    return _compare_windows(config, points, rows, scores, clusters)


def compare_scores(
    scores: np.ndarray,
    recipient: np.ndarray | None = None,
    donor: np.ndarray | None = None,
    controls: np.ndarray | None = None,
    *,
    magnitude: np.ndarray | None = None,
    is_coherent: np.ndarray | None = None,
    clusters: Clusters = None,
    resamples: int = SweepConfig.resamples,
    confidence: float = SweepConfig.confidence,
) -> dict[str, Any]:
    """Return the figures of one point: mean, gap, effects, shares and p values.

    Args:
        scores: Scores [prompts] of the point; they may be empty.
        recipient: Scores of the unpatched recipient; None for an unpatched model.
        donor: Scores of the unpatched donor; None if there are none.
        controls: Scores [draws, prompts] under the random controls; None without any.
        magnitude: Scores under the magnitude control; None without one.
        is_coherent: Mask [prompts] of those without a broken text; None: all.
        clusters: Label of each prompt.
        resamples: Bootstrap resamples.
        confidence: Level of the intervals.
    """
    certainty = {"clusters": clusters, "resamples": resamples, "confidence": confidence}
    level = {"clusters": clusters, "confidence": confidence}
    mean = interval(np.mean, scores, **certainty) if len(scores) else UNDEFINED
    effect = net = net_of_magnitude = difference = effect_coherent = UNDEFINED
    gap_t = p_vs_unpatched = p_vs_random = p_share = None
    if recipient is not None and len(scores):
        p_vs_unpatched = paired_p(scores, recipient, clusters)
        p_share = paired_share_p(scores > 0, recipient > 0)
    if recipient is not None and donor is not None and len(scores):
        gap = estimate_gap(recipient, donor, **level)
        difference, gap_t = gap.difference, gap.t if gap.t is not None and math.isfinite(gap.t) else None
        effect = causal_effect(scores, recipient, donor, **level)
        if is_coherent is None or is_coherent.all():
            effect_coherent = effect
        elif is_coherent.any():
            parts = (part[is_coherent] for part in (scores, recipient, donor))
            effect_coherent = causal_effect(*parts, clusters=_select(clusters, is_coherent), confidence=confidence)
        if magnitude is not None:
            net_of_magnitude = causal_effect(recipient + scores - magnitude, recipient, donor, **level)
        if controls is not None:
            net = net_effect(scores, controls, recipient, donor, **certainty)
            p_vs_random = control_p(scores, controls, difference.value or 0.0, clusters)
    return {
        **mean.columns("mean"),
        **effect.columns("effect"),
        **net.columns("net_effect"),
        **net_of_magnitude.columns("net_of_magnitude"),
        **effect_coherent.columns("effect_coherent"),
        "coherent_prompts": len(scores) if is_coherent is None else int(is_coherent.sum()),
        "p_vs_unpatched": p_vs_unpatched,
        "p_vs_random": p_vs_random,
        **difference.columns("gap"),
        "gap_t": gap_t,
        "share_above_0": float((scores > 0).mean()) if len(scores) else None,
        "p_share_above_0": p_share,
    }


def find_shared_prompts(scores: np.ndarray) -> np.ndarray:
    """Return a mask of the prompts with a score at every point that has at least half of its scores."""
    is_scored = ~np.isnan(scores)
    return np.all(is_scored[is_scored.mean(axis=1) >= MIN_COMPLETE_SHARE], axis=0)


def find_controls(points: Sequence[Point], scores: np.ndarray, kind: str) -> dict[tuple, list[int]]:
    """Return the indices of each window's controls of a kind that have at least half of their scores."""
    is_usable = (~np.isnan(scores)).mean(axis=1) >= MIN_COMPLETE_SHARE
    controls: dict[tuple, list[int]] = {}
    for index, point in enumerate(points):
        if point.control == kind and is_usable[index]:
            controls.setdefault(point.window_key, []).append(index)
    return controls


def build_notes(
    config: SweepConfig,
    judge: str,
    set_name: str,
    points: Sequence[Point],
    scores: np.ndarray,  # [points, prompts]
    clusters: Clusters = None,
) -> list[str]:
    """Return remarks about prompts that are left out, and the difference that the prompts can detect.

    The latter is from the unpatched models' scores alone, so that it does not depend on what patches do.
    """
    shared, notes = find_shared_prompts(scores), []
    if num_left_out := int((~shared).sum()):
        notes.append(
            f"{set_name}: {num_left_out} of {len(shared)} prompts are left out of all rows of {judge}: a completion or "
            "a score failed"
        )
    if clusters is not None:
        num_clusters = len({clusters[index] for index in shared.nonzero()[0]})
        rough = f"; fewer than {MIN_CLUSTERS} make them rough" if num_clusters < MIN_CLUSTERS else ""
        notes.append(f"{set_name}: intervals are over {num_clusters} clusters of prompts{rough}")
    unpatched = {point.recipient: scores[index] for index, point in enumerate(points) if point.patch is None}
    labels = [point.labels for point in points if point.patch is not None]
    pairs = dict.fromkeys((label["recipient"], label["donor"]) for label in labels)
    for recipient, donor in pairs:
        differences = unpatched[donor] - unpatched[recipient]
        indices = shared & ~np.isnan(differences)
        num_prompts = int(indices.sum())
        if not num_prompts:
            continue
        error = float(estimate_means(differences[None, indices], _select(clusters, indices)).errors[0])
        if error > 0:
            detectable = detectable_difference(error * math.sqrt(num_prompts), num_prompts)
            notes.append(
                f"{set_name}, {recipient} and {donor}: with {num_prompts} prompts a difference in mean {judge} of "
                f"{detectable:.2g} can be detected (power {POWER:.0%})"
            )
    return notes


def _compare_windows(
    config: SweepConfig, points: Sequence[Point], rows: list[Row], scores: np.ndarray, clusters: Clusters
) -> list[Row]:
    """Add to each curve's rows what depends on all its windows: the band, and p values for many tests."""
    shared = find_shared_prompts(scores)
    curves: dict[tuple, list[int]] = {}
    for index, point in enumerate(points):
        if point.patch is not None and point.control is None:
            curves.setdefault(point.curve_key, []).append(index)
    for indices in curves.values():
        p_values = [rows[index].p_vs_random for index in indices]
        corrected = zip(indices, false_discovery_rate(p_values), holm(p_values), strict=True)
        for index, q, p_holm in corrected:
            rows[index] = replace(rows[index], q_vs_random=q, p_holm_vs_random=p_holm)
        banded = [index for index in indices if rows[index].prompts == shared.sum()]
        band = simultaneous_band(
            scores[banded][:, shared],
            clusters=_select(clusters, shared),
            resamples=config.resamples,
            confidence=config.confidence,
        )
        for index, (_, low, high) in zip(banded, band, strict=True):
            rows[index] = replace(rows[index], band_low=low, band_high=high)
    return rows


def _select(clusters: Clusters, mask: np.ndarray) -> Clusters:
    """Return the labels of the prompts of a mask."""
    return None if clusters is None else [clusters[index] for index in mask.nonzero()[0]]
