"""Experiments of the paper's appendix on constructed data: averages over seeds, judges, directions of the tax."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from scipy import stats

from snpatch import SnpatchError, experiments
from snpatch.experiments.alignment_tax import build_headline
from snpatch.experiments.config import load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.experiments.curve_over_seeds import average_over_seeds
from snpatch.experiments.judge_agreement import compare_judges

RNG = np.random.default_rng(0)


# Averages over seeds


def build_run(seed: int, effect: float | None, random_effect: float | None = 0.0, mean: float = 1.0) -> dict:
    return {
        "seed": str(seed), "recipient": "sft", "k": 5, "neuron_fraction": 0.1, "mean": mean, "effect": effect,
        "random_effect": random_effect,
    }  # fmt: skip


def test_average_over_seeds_gives_students_interval():
    effects, randoms = [0.9, 0.8, 0.95, 0.7, 0.85], [0.1, 0.0, 0.05, -0.02, 0.03]
    runs = [build_run(seed, *values) for seed, values in enumerate(zip(effects, randoms, strict=True))]
    (row,) = average_over_seeds(runs, 0.95)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(effects), scale=stats.sem(effects))
    assert (row["effect"], row["effect_low"], row["effect_high"]) == pytest.approx((np.mean(effects), low, high))
    assert row["p_vs_random"] == pytest.approx(stats.ttest_rel(effects, randoms).pvalue)
    assert row["random_effect"] == pytest.approx(np.mean(randoms))
    assert (row["seeds"], row["mean"], row["mean_low"], row["mean_high"]) == (5, 1.0, 1.0, 1.0)


def test_average_over_seeds_interval_covers_the_true_mean():
    """Simulate 1000 experiments with 3 seeds each: 95 % of the intervals hold the true effect."""
    hits = 0
    for effects in RNG.normal(0.6, 0.1, (1000, 3)):
        (row,) = average_over_seeds([build_run(seed, effect) for seed, effect in enumerate(effects)], 0.95)
        hits += row["effect_low"] <= 0.6 <= row["effect_high"]
    assert 930 <= hits <= 970


def test_average_over_seeds_is_undefined_if_a_seed_lacks_the_figure():
    (row,) = average_over_seeds([build_run(1, 0.9, None), build_run(2, None, None)], 0.95)
    assert (row["effect"], row["effect_low"], row["random_effect"], row["p_vs_random"]) == (None,) * 4
    (row,) = average_over_seeds([build_run(1, 0.9)], 0.95)
    assert (row["effect"], row["effect_low"], row["effect_high"]) == (0.9, None, None)


# Judges


def compare(*pairs, thresholds=(0.0, 0.0)) -> dict:
    return compare_judges([np.array(pair, dtype=float) for pair in pairs], thresholds, 200, 0.95)


def test_compare_judges_matches_scipy():
    pairs = [RNG.normal(size=(2, 40)).round(1) for _ in range(3)]
    for pair in pairs:
        pair[1] += 0.8 * pair[0]
    row = compare(*pairs)
    x, y = np.concatenate(pairs, axis=1)
    assert row["n"] == 120
    assert row["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert row["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    for name in ("pearson", "spearman", "agreement", "kappa"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_compare_judges_gives_cohens_kappa():
    """Cohen's example: 20 both harmful, 15 both harmless, 5 and 10 mixed: agreement .7, kappa .4."""
    a = [1] * 25 + [-1] * 25
    b = [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    row = compare((a, b))
    assert (row["agreement"], row["kappa"]) == pytest.approx((0.7, 0.4))
    shifted = compare((np.add(a, 5), np.add(b, 1)), thresholds=(5.0, 1.0))
    assert shifted == pytest.approx(row), "each judge has its own threshold"


def test_compare_judges_of_constant_scores_is_undefined():
    row = compare(([1, 1, 1], [3, 1, 2]))
    assert (row["pearson"], row["spearman"]) == (None, None)
    assert (row["agreement"], row["kappa"]) == (1.0, None)


def test_compare_judges_of_opposite_judges_is_minus_one():
    row = compare(([1, -2, 3, -4], [-1, 2, -3, 4]))
    assert (row["pearson"], row["spearman"], row["agreement"], row["kappa"]) == pytest.approx((-1, -1, 0, -1))


def test_compare_judges_resamples_prompts_of_all_models_together():
    """Copies of one model's scores add no certainty: the interval is that of one copy."""
    pair = RNG.normal(size=(2, 30))
    one, five = compare(pair), compare(*[pair] * 5)
    for name in ("pearson", "agreement", "kappa"):
        bounds = [f"{name}_low", f"{name}_high"]
        assert [five[bound] for bound in bounds] == pytest.approx([one[bound] for bound in bounds])


# Directions of the alignment tax


def build_tax_row(judge: str, change: float, half: float) -> dict:
    return {
        "donor": "helpful", "recipient": "dpo", "set": "b", "judge": judge, "k": 9, "change": change,
        "change_low": change - half, "change_high": change + half,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "change", "half", "meaning"),
    [
        ("cost", 7.3, 1.0, "cost +7.30 (6.30 .. 8.30: less safe) on b"),
        ("cost", -10.1, 1.0, "cost -10.10 (-11.10 .. -9.10: safer) on b"),
        ("reward", 7.97, 1.0, "reward +7.97 (6.97 .. 8.97: more helpful) on b"),
        ("reward", -2.3, 1.0, "reward -2.30 (-3.30 .. -1.30: less helpful) on b"),
        ("cost", 0.5, 1.0, "cost +0.50 (-0.50 .. 1.50: no clear change) on b"),
        ("toxicity", 2.0, 1.0, "toxicity +2.00 (1.00 .. 3.00: higher) on b"),
    ],
)
def test_tax_headline_says_what_the_sign_means(judge, change, half, meaning):
    (sentence,) = build_headline([build_tax_row(judge, change, half)], "a and b share in their top 20")
    assert sentence == f"dpo patched from helpful on the 9 neurons that a and b share in their top 20: {meaning}."
    assert "gain" not in sentence


# Whole experiments on a tiny model


@pytest.fixture(scope="module")
def context(zoo, tmp_path_factory):
    """Open a config of a tiny model with two seeds, two objectives and a second prompt set."""
    folder, model = tmp_path_factory.mktemp("config"), zoo("llama")
    for name, prompts in (("p", tiny.PROMPTS), ("q", [f"{prompt} {tiny.WORDS[3]}" for prompt in tiny.PROMPTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    adapters = "\n".join(f"{name} = {[str(f) for f in model.adapters[name]]}" for name in ("sft", "dpo"))
    text = f"""
model = "{model.folder}"
template = "tulu"
recipients = ["sft", "base"]
benchmarks = ["p", "q"]
max_tokens = 4
contrast_tokens = 4
[adapters]
{adapters}
[contrasts]
safety = {{ recipient = "sft", donor = "dpo", prompts = "q" }}
helpful = {{ recipient = "base", donor = "sft", prompts = "q" }}
harmless-helpful = {{ recipient = "base", donor = "dpo", prompts = "q" }}
[seeds]
1 = {{ recipient = "sft", donor = "dpo", prompts = "q" }}
2 = {{ recipient = "base", donor = "dpo", prompts = "q" }}
[judges]
cost = {{ source = "some_judge:by_words" }}
refusal = {{ source = "refusal" }}
[sets]
p = {{ source = "p.jsonl" }}
q = {{ source = "q.jsonl" }}
"""
    (folder / "experiment.toml").write_text(text)
    config = load_experiment_config(folder / "experiment.toml", trust=True)
    with ExperimentContext(config, folder / "out", backend="transformers", limit=4) as context:
        yield context


def test_model_pairs_compares_each_pair_on_both_texts(context):
    report = experiments.run("model_pairs", context, {"k": [0.2], "prompts": "p"})
    rows = report.tables["model_pairs"]
    names = [f"{a}-{b} on text of {c}" for a, b in (("base", "sft"), ("base", "dpo"), ("sft", "dpo")) for c in (a, b)]
    assert list(dict.fromkeys(row["ranking"] for row in rows)) == names
    assert [row["recipient"] for row in rows[:2]] == ["sft", "base"]
    overlaps = {row["ranking"]: row["overlap"] for row in rows}
    assert overlaps["sft-dpo on text of sft"] == 1, "the safety contrast itself"
    assert set(report.provenance["models"]) == {"base", "sft", "dpo"}
    curve = experiments.run("curve", context, {"k": [0.2], "prompts": "p", "controls": 0}).tables["curve"]
    expected = {row["recipient"]: (row["mean"], row["effect"]) for row in curve if row["ranking"]}
    actual = {r["recipient"]: (r["mean"], r["effect"]) for r in rows if r["ranking"] == "sft-dpo on text of sft"}
    assert actual == expected


def test_specificity_finds_neurons_on_each_set(context):
    report = experiments.run("specificity", context, {"k": [0.1, 0.2], "prompts": "p"})
    rows = report.tables["specificity"]
    assert {row["ranking"] for row in rows} == {"q"}
    assert {row["overlap"] for row in rows} == {1.0}, "the safety contrast's own prompts"
    assert len(rows) == 2 * 2
    with pytest.raises(SnpatchError, match="specificity: contrast_prompts: expected sets other than p"):
        experiments.run("specificity", context, {"contrast_prompts": ["p"], "prompts": "p"})


def test_competition_patches_the_recipients_own_neurons(context):
    report = experiments.run("competition", context, {"k": 0.3, "controls": 1})
    rows = report.tables["competition"]
    assert [(row["set"], row["recipient"], row["donor"]) for row in rows] == [("p", "sft", "dpo"), ("q", "sft", "dpo")]
    for row in rows:
        gap = row["donor_mean"] - row["recipient_mean"]
        if gap:
            assert row["effect"] == pytest.approx((row["patched"] - row["recipient_mean"]) / gap)
        assert row["random_mean"] is not None
    assert list(report.provenance["rankings"]) == ["base, sft, q, completion"]


def test_judge_agreement_scores_the_same_completions_twice(context):
    report = experiments.run("judge_agreement", context, {"k": 0.3, "prompts": "p"})
    rows = report.tables["judge_agreement"]
    names = ["all", "sft", "base", "dpo", "sft, patched", "base, patched"]
    assert [(row["completions"], row["n"]) for row in rows] == [(name, 4 if name != "all" else 20) for name in names]
    assert {row["judge"] for row in report.tables["judge_agreement-effects"]} == {"cost", "refusal"}
    assert all(set(record["scores"]) == {"cost", "refusal"} for record in report.records)
    with pytest.raises(SnpatchError, match="needs two judges, got 1"):
        experiments.run("judge_agreement", context, {"judges": ["cost"]})
    with pytest.raises(SnpatchError, match="expected two different ones, got cost, cost"):
        experiments.run("judge_agreement", context, {"judges": ["cost", "cost"]})


def test_curve_over_seeds_uses_each_seeds_pair(context):
    report = experiments.run("curve_over_seeds", context, {"k": [0, 0.2], "prompts": "p", "controls": 1})
    runs = report.tables["curve_over_seeds-runs"]
    assert {(run["seed"], run["model"], run["recipient"]) for run in runs} == {
        ("1", "sft", "sft"),
        ("2", "base", "sft"),
    }
    rows = report.tables["curve_over_seeds"]
    assert [(row["recipient"], row["k"], row["seeds"]) for row in rows] == [("sft", 0, 2), ("sft", runs[1]["k"], 2)]
    means = [run["mean"] for run in runs if run["k"] == rows[1]["k"]]
    assert rows[1]["mean"] == pytest.approx(np.mean(means))


def test_tax_takes_neurons_of_other_objectives(context):
    settings = {"objectives": ["safety", "helpful"], "neurons": ["harmless-helpful", "safety"], "k": 0.9, "controls": 2}
    report = experiments.run("alignment_tax", context, settings)
    rows = report.tables["alignment_tax"]
    assert {(row["donor"], row["recipient"]) for row in rows} == {("dpo", "sft"), ("sft", "dpo")}
    assert {row["set"] for row in rows} == {"p"}, "the first benchmark, for both judges"
    for row in rows:
        assert row["random_change_low"] <= row["random_change"] <= row["random_change_high"]
    with pytest.raises(SnpatchError, match="needs the contrast shp, got safety, helpful"):
        experiments.run("alignment_tax", context, settings | {"neurons": ["safety", "shp"]})


def test_find_missing_names_what_a_config_lacks(context):
    config = replace(context.config, seeds={}, contrasts={"safety": context.config.safety})
    missing = {
        name: experiments.find_missing(config, name, experiments.resolve_settings(config, name))
        for name in experiments.NAMES
    }
    assert {name for name, reason in missing.items() if reason} == {
        "curve_over_seeds", "stability", "objectives", "alignment_tax", "competition",
    }  # fmt: skip
    assert missing["competition"] == "needs the contrast helpful, got safety"
