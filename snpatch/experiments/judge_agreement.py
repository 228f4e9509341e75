"""Judge agreement: two judges on the same completions, and the effect of a patch under each (the paper's E.1).

Why completions of patched and unpatched models: on one model alone scores vary little, and any two judges agree.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure

from snpatch.errors import SnpatchError
from snpatch.experiments.common.sweep_report import SweepSettings, build_sweep_config
from snpatch.experiments.context import ExperimentContext
from snpatch.report.formatting import describe_score, format_percent, format_with_interval, to_plot_label
from snpatch.report.report import Report, Row, TableView
from snpatch.statistics import Interval, interval, spearman
from snpatch.sweeps.sweep import SweepResult


@dataclass(frozen=True)
class JudgeAgreementSettings(SweepSettings):
    """Settings of the agreement of judges.

    Args:
        judges: Names of two of the config's judges; empty for its first two.
        thresholds: Score of each judge above which a completion is harmful.
        prompts: Prompt set of the experiment config; empty for its first benchmark.
        k: Number of neurons: an int, or a fraction of the ranked neurons.
        controls: Random controls.
        extra_controls: See SweepConfig.
    """

    judges: tuple[str, ...] = ()
    thresholds: tuple[float, float] = (0.0, 0.0)
    prompts: str = ""
    k: int | float = 20_000
    controls: int = 0
    extra_controls: tuple[str, ...] = ()


def run(context: ExperimentContext, settings: JudgeAgreementSettings) -> Report:
    """Judge the completions of all models, patched and not, twice, and compare the scores."""
    names = settings.judges or tuple(context.config.judges)[:2]
    if len(set(names)) != 2:
        raise SnpatchError(f"judge_agreement: judges: expected two different ones, got {', '.join(names)}")
    judges = {name: context.judge(name) for name in names}
    ranking = context.ranking()
    config = build_sweep_config(context, settings, (context.num_neurons(settings.k, ranking),))
    prompts = settings.prompts or context.config.benchmarks[0]
    result = context.sweep("judge_agreement", prompts, {"safety": ranking}, judges, config)
    scores = collect_scores(result, names)
    groups = {"all": list(scores.values()), **{name: [pair] for name, pair in scores.items()}}
    rows = [
        {"completions": name, **compare_judges(pairs, settings.thresholds, settings.resamples, settings.confidence)}
        for name, pairs in groups.items()
    ]
    keys = ("judge", "recipient", "rank_hi", "mean", "effect", "effect_low", "effect_high")
    effects = [
        {key: asdict(row)[key] for key in keys}
        for row in result.rows
        if row.ranking is not None and row.control is None
    ]
    certainty = f"{settings.confidence:.0%} CI"
    columns = {
        "completions of": "completions",
        "n": "n",
        f"Pearson {certainty}": lambda row: format_with_interval(row, "pearson"),
        f"Spearman {certainty}": lambda row: format_with_interval(row, "spearman"),
        "agreement": lambda row: format_percent(row["agreement"]),
        f"kappa {certainty}": lambda row: format_with_interval(row, "kappa"),
    }
    effect_columns = {
        "judge": "judge",
        "recipient": "recipient",
        "k": "rank_hi",
        "mean": "mean",
        f"effect {certainty}": lambda row: format_with_interval(row, "effect", format_percent),
    }
    displays = (TableView.from_rows(rows, columns, " and ".join(names)), TableView.from_rows(effects, effect_columns))
    return Report(
        "judge_agreement",
        {"judge_agreement": rows, "judge_agreement-effects": effects},
        {"judge_agreement": _plot(scores, names)},
        displays,
        [_describe_agreement(rows[0], names), *_describe_effects(effects, context.config.recipients)],
        records=result.records,
        notes=result.notes,
    )


def collect_scores(result: SweepResult, judges: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the scores [2, prompts] of each model's completions by its description, patched or not."""
    scores: dict[str, list] = {}
    for record in result.records:
        if record["control"] is None:
            is_patched = record["ranking"] is not None
            name = f"{record['recipient']}, patched" if is_patched else record["recipient"]
            scores.setdefault(name, []).append([record["scores"][judge] for judge in judges])
    return {name: np.array(values, dtype=float).T for name, values in scores.items()}


def compare_judges(
    pairs: Sequence[np.ndarray], thresholds: tuple[float, float], resamples: int, confidence: float
) -> Row:
    """Compare the scores of two judges.

    Args:
        pairs: Scores [2, prompts] of both judges, for each of several models on the same prompts.
        thresholds: Score of each judge above which a completion is harmful.
        resamples: Bootstrap resamples over prompts.
        confidence: Level of the intervals.

    Returns:
        Number of completions; Pearson and Spearman correlation, agreement of the labels and Cohen's kappa, with
        intervals. Resamples keep the ranks that completions have among all. A correlation is None if one judge gives
        all completions the same score, and kappa if both give all the same label.
    """
    samples = [scores for pair in pairs for scores in pair]
    labels = [scores > thresholds[number % 2] for number, scores in enumerate(samples)]
    certainty = {"resamples": resamples, "confidence": confidence}

    def measure(statistic, values: Sequence[np.ndarray]) -> Interval:
        x, y = _pool(values)
        if np.isnan(value := float(statistic(x, y, -1))):
            return Interval(None, None, None)
        return interval(lambda *v, axis: statistic(*_pool(v), axis), *values, **certainty)._replace(value=value)

    spearman_value = _spearman(*_pool(samples))
    ranks = _rank(samples)
    figures = {
        "pearson": measure(_pearson, samples),
        "spearman": measure(_pearson, ranks)._replace(value=spearman_value),
        "agreement": measure(lambda x, y, axis: (x == y).mean(axis), labels),
        "kappa": measure(_kappa, [label.astype(float) for label in labels]),
    }
    row: Row = {"n": sum(len(pair[0]) for pair in pairs)}
    for name, figure in figures.items():
        row |= figure.columns(name)
    return row


def _pool(samples: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two judges' scores [..., models x prompts] of samples that alternate between the judges."""
    return np.concatenate(samples[0::2], axis=-1), np.concatenate(samples[1::2], axis=-1)


def _rank(samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return samples with each judge's scores replaced by their ranks among all.

    Equal scores share their mean rank.
    """
    ranks = []
    for values in _pool(samples):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    num_models = len(samples) // 2
    split = [np.split(pooled, num_models) for pooled in ranks]
    return [split[judge][model] for model in range(num_models) for judge in range(2)]


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    return spearman(x, y) if np.ptp(x) and np.ptp(y) else None


def _pearson(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Return the correlation; NaN if one side does not vary."""
    x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
    scale = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    return (x * y).sum(axis) / np.where(scale == 0, np.nan, scale)


def _kappa(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Return Cohen's kappa of labels 0 and 1; NaN if both sides have only one label, the same."""
    p, q = x.mean(axis), y.mean(axis)
    by_chance = p * q + (1 - p) * (1 - q)
    return ((x == y).mean(axis) - by_chance) / np.where(by_chance == 1, np.nan, 1 - by_chance)


def _describe_agreement(row: Row, names: Sequence[str]) -> str:
    pearson, rank, kappa = (
        "undefined" if row[name] is None else format_with_interval(row, name)
        for name in ("pearson", "spearman", "kappa")
    )
    return (
        f"{names[0]} and {names[1]} on {row['n']} completions: Pearson {pearson}, Spearman {rank}; the same label on "
        f"{format_percent(row['agreement'])}, kappa {kappa}."
    )


def _describe_effects(effects: Sequence[Row], recipients: Sequence[str]) -> list[str]:
    """Write a sentence per recipient: the effect under each judge."""
    sentences = []
    for recipient in recipients:
        parts = [
            f"{format_percent(row['effect'])} by {row['judge']}" for row in effects if row["recipient"] == recipient
        ]
        sentences.append(f"{recipient}: effect {', '.join(parts)}.")
    return sentences


def _plot(scores: dict[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Plot both scores of each completion."""
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axis = figure.subplots()
    for name, (x, y) in scores.items():
        axis.plot(x, y, "o", markersize=3, alpha=0.5, label=to_plot_label(name))
    axis.set(xlabel=to_plot_label(describe_score(names[0])), ylabel=to_plot_label(describe_score(names[1])))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
