"""Experiments on constructed data: agreement, shared neurons, perplexity, words, distribution, tables."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from activations import rank_activations, rank_changes
from transformers import AutoModelForCausalLM

from snpatch import Ranking, SnpatchError, experiments
from snpatch.data import DATASETS
from snpatch.data.prompt_set import PromptSet
from snpatch.demo import DEMO_MODEL
from snpatch.experiments.alignment_tax import intersect_top
from snpatch.experiments.common import agreement
from snpatch.experiments.common.effect_spread import summarize_effects
from snpatch.experiments.config import load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.experiments.distribution import describe_factors, describe_scores
from snpatch.experiments.neuron_tokens import mean_changes, neuron_logits
from snpatch.experiments.perplexity import compute_difference
from snpatch.models.weights import open_weights
from snpatch.ranking import nulls
from snpatch.report import files, terminal
from snpatch.report.report import Report, TableView
from snpatch.statistics import interval
from snpatch.sweeps.perplexity import Perplexity, split_into_windows

SHAPE = (2, 10)


def order(*flat: int) -> Ranking:
    """Return a ranking of these neurons of two layers of ten, best first."""
    return Ranking.from_order(torch.tensor([[i // 10, i % 10] for i in flat]), SHAPE)


def test_compare_rankings_of_constructed_orders_gives_known_values():
    ranking, reverse = order(*range(20)), order(*range(19, -1, -1))
    half = order(0, 1, 2, 3, 10, 11, 12, 13, *range(4, 10), *range(14, 20))
    rows = agreement.compare_rankings(
        {"same": ranking, "copy": order(*range(20)), "back": reverse, "half": half}, [8, 20]
    )
    row_by_pair = {(row["a"], row["b"], row["k"]): row for row in rows}
    assert len(rows) == 12
    assert row_by_pair["same", "copy", 8]["overlap"] == row_by_pair["same", "copy", 8]["spearman"] == 1
    assert row_by_pair["same", "back", 20]["spearman"] == pytest.approx(-1)
    assert (row_by_pair["same", "back", 8]["overlap"], row_by_pair["same", "back", 8]["spearman"]) == (0, None)
    assert row_by_pair["same", "half", 8]["overlap"] == 0.5
    assert row_by_pair["same", "half", 8]["common"] == 4
    assert row_by_pair["same", "half", 8]["spearman"] == pytest.approx(1), "re-ranked within the four that both hold"
    assert row_by_pair["same", "half", 8]["chance"] == 0.4
    for row in rows:
        assert row["chance_given_activations"] is row["p_overlap"] is row["p_spearman"] is None, "no statistics"
        assert row["relative_spearman"] is row["signed_correlation"] is None


def draw_uniform(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def test_compare_rankings_with_statistics_gives_null_and_correlations():
    rms, relative = draw_uniform(2, 2, 100, seed=0)
    first, second = rank_changes(rms, relative), rank_changes(rms, -relative)
    (row,) = agreement.compare_rankings({"a": first, "b": second}, [20])
    null = nulls.draw_agreement_nulls({"a": first, "b": second}, [20])["a", "b"]
    assert row["overlap"] == row["spearman"] == 1
    assert row["chance_given_activations"] == pytest.approx(null.overlap.mean())
    low, high = (row[f"chance_given_activations_{end}"] for end in ("low", "high"))
    assert (low, high) == pytest.approx(tuple(np.quantile(null.overlap, [0.025, 0.975])))
    assert row["p_overlap"] == pytest.approx(1 / 51), "of 50 draws none reaches 1"
    reached = int((null.spearman > 1 - 1e-6).sum())
    assert row["p_spearman"] == pytest.approx((1 + reached) / 51)
    assert row["relative_spearman"] == pytest.approx(1)
    assert row["signed_correlation"] == pytest.approx(-1)


def test_agreement_headline_names_both_nulls_and_pairs_above():
    rms = draw_uniform(2, 150, seed=1) ** 3
    relative = draw_uniform(2, 150, seed=2) ** 3
    related = {name: rank_changes(rms, relative * factor) for name, factor in (("a", 1), ("b", 1.5))}
    unrelated = rank_changes(rms, draw_uniform(2, 150, seed=9))
    rows = agreement.compare_rankings({**related, "c": unrelated}, [30])
    first, second, *_ = agreement._build_headline(rows, [], "3 objectives")
    assert first.startswith("3 objectives: overlap ")
    assert " for unrelated changes of the same activations, 0.10 for random orders); " in first
    assert first.endswith("; 1 of 3 pairs overlap more than unrelated changes (a, b).")
    assert second.startswith("3 objectives: Spearman of the shared neurons ")
    for part, end in ((rows[1:], "no pair overlaps"), (rows[:1], "they overlap"), (rows[1:2], "they overlap no")):
        sentence, *_ = agreement._build_headline(part, [], "2 objectives")
        assert sentence.endswith(f"; {end} more than unrelated changes.")


def test_summarize_effects_of_rankings_gives_spread():
    effects = [("sft", 5, 0.2), ("sft", 5, 0.5), ("sft", 5, 0.8), ("base", 5, None), ("base", 5, 0.4)]
    rows = [{"recipient": recipient, "rank_hi": k, "effect": effect} for recipient, k, effect in effects]
    sft, base = summarize_effects(rows)
    assert (sft["rankings"], sft["effect_min"], sft["effect_max"]) == (3, 0.2, 0.8)
    assert (sft["effect_mean"], sft["effect_std"]) == pytest.approx((0.5, 0.3))
    assert (base["rankings"], base["effect_mean"], base["effect_std"]) == (1, 0.4, None)


def test_objectives_patch_each_ranking(tmp_path, zoo):
    config = config_file(tmp_path, zoo("llama"), extend_config)
    settings = {"k": 0.1, "more_k": [0.2], "effect_k": [0.3]}
    with ExperimentContext(
        load_experiment_config(config, trust=True), tmp_path / "out", backend="transformers"
    ) as context:
        report = experiments.run("objectives", context, settings)
        unpatched = experiments.run("objectives", context, settings | {"effect_k": []})
    (sft, base) = report.tables["objectives-spread"]
    assert (sft["recipient"], base["recipient"]) == ("sft", "base")
    k = round(0.3 * 2 * tiny.NEURONS)
    assert sft["k"] == base["k"] == k
    patched = [row for row in report.tables["objectives-effects"] if row["ranking"]]
    assert [(row["recipient"], row["ranking"], row["rank_hi"]) for row in patched] == [
        (recipient, ranking, k) for ranking in ("safety", "other") for recipient in ("sft", "base")
    ]
    assert all(row["overlap"] is not None for row in report.tables["objectives-halves"])
    assert not any("no statistics" in note for note in report.notes)
    assert list(unpatched.tables) == ["objectives", "objectives-halves"]
    assert unpatched.headline == report.headline[: len(unpatched.headline)]


def test_agreement_plot_draws_every_pair():
    rankings = {"a": order(*range(20)), "b": order(*range(19, -1, -1)), "c": order(*range(0, 20, 2), *range(1, 20, 2))}
    rows = agreement.compare_rankings(rankings, [5, 10])
    by_k, matrix, ranks, _ = agreement.plot_agreement(rows, rankings, 10).axes
    assert [line.get_label() for line in by_k.get_lines()] == ["a, b", "a, c", "b, c", "random orders"]
    assert len([text for text in matrix.texts if text.get_text()]) == 6
    common = sum(row["common"] for row in rows if row["k"] == 10)
    assert ranks.images[0].get_array().sum() == common


def test_intersect_top_returns_neurons_in_both_top_k():
    first, second = order(*range(20)), order(9, 8, 7, 3, 15, 16, *range(3), *range(4, 7), *range(10, 15), 17, 18, 19)
    common = intersect_top(first, second, 6)
    assert common.top(len(common)).tolist() == [[0, 3]], "the only one that both hold"
    common = intersect_top(first, second, 10)
    assert [neuron for _, neuron in common.top(len(common)).tolist()] == [0, 1, 2, 3, 4, 7, 8, 9]
    with pytest.raises(SnpatchError, match="no neuron is in the top 2 of both objectives"):
        intersect_top(first, second, 2)


def test_agreement_plot_draws_the_null():
    rms, relative = draw_uniform(2, 2, 100, seed=0)
    rankings = {"a": rank_changes(rms, relative), "b": rank_changes(rms, relative.flip(1))}
    rows = agreement.compare_rankings(rankings, [10, 20])
    axis = agreement.plot_agreement(rows, rankings, 10).axes[0]
    (band,) = axis.collections
    lows, highs = (sorted({row[f"chance_given_activations_{end}"] for row in rows}) for end in ("low", "high"))
    drawn = band.get_paths()[0].vertices[:, 1]
    assert (drawn.min(), drawn.max()) == pytest.approx((lows[0], highs[-1]))


def test_perplexity_difference_is_paired_by_window():
    unpatched = Perplexity(tuple((10.0 + 5 * (i % 4), 10) for i in range(40)))
    patched = Perplexity(tuple((total + 0.5, n) for total, n in unpatched.losses))
    difference = compute_difference(patched, unpatched, resamples=200, confidence=0.95)
    assert difference.value == pytest.approx(unpatched.token_weighted * (math.exp(0.05) - 1))
    assert difference.low > 0, "although the windows differ more than the models"
    own = interval(lambda t, axis: np.exp(t.mean(axis) / 10), [t for t, _ in unpatched.losses], resamples=200)
    assert difference.high - difference.low < (own.high - own.low) / 5
    one = compute_difference(Perplexity(((11.0, 10),)), Perplexity(((10.0, 10),)), resamples=200, confidence=0.95)
    assert (one.value, one.low, one.high) == (pytest.approx(math.exp(1.1) - math.e), None, None)


def test_perplexity_reports_window_and_token_means():
    perplexity = Perplexity(((20.0, 10), (1.0, 1)))
    assert perplexity.window_mean == pytest.approx(math.exp((2.0 + 1.0) / 2))
    assert perplexity.token_weighted == pytest.approx(math.exp(21 / 11))
    assert perplexity.tokens == 11
    assert split_into_windows([1, 2, 3, 4, 5, 6, 7], 3) == [[1, 2, 3], [4, 5, 6]], "the last token predicts nothing"
    assert split_into_windows([1, 2, 3, 4, 5], 3, bos=9) == [[9, 2, 3], [9, 5]]
    with pytest.raises(SnpatchError, match="fewer than two tokens"):
        split_into_windows([1], 3)


def test_describe_scores_of_constructed_scores_gives_known_values():
    scores = np.array([0.0, 0.0, 0.0, 4.0])
    description = describe_scores(scores, (0.5, 4.0))
    assert (description["mean"], description["max"], description["median"]) == (1.0, 4.0, 0.0)
    assert description["skewness"] == pytest.approx((3 * (-1.0) ** 3 + 27) / 4 / 3**1.5)
    assert (description["above 0.5"], description["above 4"]) == (0.25, 0.0)
    assert describe_scores(np.ones(4), (0.5,))["skewness"] is None


def test_describe_factors_of_constructed_changes_gives_known_values():
    rms = torch.tensor([[1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    relative = torch.tensor([[0.1, 0.2, 0.3, 0.2], [0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    ranking = rank_changes(rms, relative, exclude_layers=(1,))
    factors = describe_factors(ranking, np.array([[True] * 4, [False] * 4]))
    assert factors["rms_skewness"] == pytest.approx((3 * (-1.0) ** 3 + 27) / 4 / 3**1.5)
    assert factors["relative_skewness"] == pytest.approx(0, abs=1e-5), "scores are float32"
    assert factors["own_factor_share"] == pytest.approx(1), "one token is one factor"
    opposite = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]], dtype=torch.float64)
    d = torch.tensor([[[2.0, 2.0]], [[2.0, 2.0]]], dtype=torch.float64)
    ranking = rank_activations(opposite, d)
    assert describe_factors(ranking, np.array([[True, False]]))["own_factor_share"] == pytest.approx(1), "b = 2"
    factors = describe_factors(ranking, np.array([[False, True]]))
    assert factors["own_factor_share"] == pytest.approx(2 / 10), "b = 0: own 2, content 8"
    assert set(describe_factors(order(*range(20)), np.ones(SHAPE, bool)).values()) == {None}


def test_distribution_leaves_excluded_layers_out_of_all(tmp_path, zoo):
    with ExperimentContext(
        load_experiment_config(config_file(tmp_path, zoo("llama"))), tmp_path / "out", backend="transformers"
    ) as context:
        ranking = context.ranking()
        *layers, total = experiments.run("distribution", context, {"k": 0.1}).tables["distribution"]
    assert [row["ranked"] for row in layers] == [True, True, False]
    scores = ranking.scores[:-1].double()
    assert total["mean"] == pytest.approx(scores.mean().item())
    assert total["max"] == pytest.approx(scores.max().item())
    assert layers[-1]["max"] == pytest.approx(ranking.scores[-1].max().item())
    changes, own = (
        t[:-1].sum().item() for t in (ranking.statistics.sums[:, 4], ranking.statistics.own_factor_changes())
    )
    assert total["own_factor_share"] == pytest.approx(own / changes)


def test_neuron_tokens_have_the_sign_of_the_change(tmp_path, zoo):
    with ExperimentContext(
        load_experiment_config(config_file(tmp_path, zoo("llama"))), tmp_path / "out", backend="transformers"
    ) as context:
        ranking = context.ranking()
        report = experiments.run("neuron_tokens", context, {"neurons": 6, "tokens": 3})
        rows = report.tables["neuron_tokens"]
        logits = neuron_logits(zoo("llama").folder, ranking, 6)
        key = next(iter(context._rankings))
        context._rankings[key] = replace(ranking, moments={})
        without_means = experiments.run("neuron_tokens", context, {"neurons": 6, "tokens": 3})
    changes = mean_changes(ranking, 6)
    for rank in range(6):
        promoted, suppressed = (
            [row["token_id"] for row in rows if (row["rank"], row["effect"]) == (rank, effect)]
            for effect in ("promoted", "suppressed")
        )
        largest, smallest = (logits[rank].topk(3, largest=is_largest).indices.tolist() for is_largest in (True, False))
        assert (promoted, suppressed) == ((largest, smallest) if changes[rank] > 0 else (smallest, largest))
    assert 0 < (changes < 0).sum() < 6, "both signs occur"
    assert "its mean change of " in report.headline[0]
    assert "its own output (the ranking has no mean activations" in without_means.headline[0]
    first = [row["token_id"] for row in without_means.tables["neuron_tokens"][:3]]
    assert first == logits[0].topk(3).indices.tolist()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neuron_logits_equal_the_models_head_on_a_column(zoo, tmp_path, architecture, dtype):
    model = AutoModelForCausalLM.from_pretrained(zoo(architecture).folder, dtype=dtype)
    model.save_pretrained(tmp_path)
    places = [(2, 5), (0, 95), (1, 0), (0, 3)]
    ranking = Ranking.from_order(torch.tensor(places), (tiny.LAYERS, tiny.NEURONS))
    logits = neuron_logits(tmp_path, ranking, 4)
    layers = model.model.layers
    columns = torch.stack([layers[layer].mlp.down_proj.weight[:, neuron] for layer, neuron in places])
    assert torch.equal(logits, model.lm_head(model.model.norm(columns)).float())
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for row, (layer, neuron) in zip(logits, places, strict=True):
        column = state[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron]
        normed = column / (column.square().mean() + model.config.rms_norm_eps).sqrt()
        normed = normed * (state["model.norm.weight"] + architecture.startswith("gemma"))
        expected = state["lm_head.weight"] @ normed
        assert torch.allclose(row, expected, atol=1e-4 if dtype is torch.float32 else 0.05 * expected.abs().max())


def test_neuron_logits_use_the_dtype_of_the_config():
    """The demo's weights are stored in bfloat16 and computed in float32."""
    base = DEMO_MODEL / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    places = [(0, 13), (5, 1)]
    ranking = Ranking.from_order(torch.tensor(places), (len(model.model.layers), model.config.intermediate_size))
    columns = torch.stack([model.model.layers[layer].mlp.down_proj.weight[:, neuron] for layer, neuron in places])
    assert open_weights(base).read("model.norm.weight").dtype != model.dtype
    assert torch.equal(neuron_logits(base, ranking, 2), model.lm_head(model.model.norm(columns)).float())


def test_neuron_tokens_loads_no_second_model(tmp_path, zoo, monkeypatch):
    with ExperimentContext(
        load_experiment_config(config_file(tmp_path, zoo("llama"))), tmp_path / "out", backend="transformers"
    ) as context:
        context.ranking()
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
        rows = experiments.run("neuron_tokens", context, {"neurons": 3, "tokens": 4}).tables["neuron_tokens"]
    assert len(rows) == 3 * 2 * 4


def config_file(folder: Path, tiny_model, change=lambda text: text) -> Path:
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    adapters = "\n".join(f"{name} = {[str(f) for f in tiny_model.adapters[name]]}" for name in ("sft", "dpo"))
    text = f"""
model = "{tiny_model.folder}"
template = "tulu"
recipients = ["sft", "base"]
benchmarks = ["p"]
max_tokens = 4
contrast_tokens = 4
[adapters]
{adapters}
[contrasts]
safety = {{ recipient = "sft", donor = "dpo", prompts = "p" }}
[judges]
cost = {{ source = "refusal" }}
[sets]
p = {{ source = "p.jsonl" }}
[settings.curve]
k = [0, 0.5]
controls = 1
"""
    (folder / "experiment.toml").write_text(change(text))
    return folder / "experiment.toml"


BAD = {
    "an unknown key": (lambda t: 'color = "red"\n' + t, "the file: unknown key color"),
    "no safety": (lambda t: t.replace("safety =", "other ="), "contrasts: expected one named safety"),
    "an unknown model": (lambda t: t.replace('donor = "dpo"', 'donor = "tulu"'), "got 'tulu'"),
    "an unknown set": (
        lambda t: t.replace('benchmarks = ["p"]', 'benchmarks = ["q"]'),
        "prompt set: expected .*, got 'q'",
    ),
    "an unknown key of a set": (
        lambda t: t.replace("p.jsonl", 'p.jsonl", frist = 3, x="'),
        "sets.p: unknown key frist",
    ),
    "a judge without source": (
        lambda t: t.replace('source = "refusal"', ""),
        "judges.cost: expected a table with source",
    ),
    "a missing key": (lambda t: t.replace('recipients = ["sft", "base"]', ""), "recipients: expected at least one"),
    "no model": (lambda t: t.replace("model =", "#"), "model is missing"),
    "both samples": (lambda t: t.replace('"p.jsonl"', '"p.jsonl", first = 1, sample = 2'), "first or sample"),
    "a donor that is recipient": (
        lambda t: t.replace('"base"]', '"dpo"]'),
        "expected a model that is no recipient, got 'dpo'",
    ),
    "no TOML": (lambda t: t + "[[", "not a TOML file"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_experiment_config_is_rejected(tmp_path, zoo, case):
    change, message = BAD[case]
    with pytest.raises(SnpatchError, match=message) as caught:
        load_experiment_config(config_file(tmp_path, zoo("llama"), change))
    assert "\n" not in str(caught.value)


def test_missing_experiment_config_is_rejected():
    with pytest.raises(SnpatchError, match="expected a file or one of demo, got neither"):
        load_experiment_config("nowhere")


def test_settings_of_the_demo_config_are_valid():
    config = load_experiment_config("demo")
    for experiment, settings in config.settings.items():
        experiments.parse_settings(experiment, settings)
    for prompt_set in config.sets.values():
        assert Path(config.resolve_path(prompt_set.source)).is_file() or prompt_set.source in DATASETS


def test_rankings_and_completions_are_cached_and_reused(tmp_path, zoo, monkeypatch):
    config = load_experiment_config(config_file(tmp_path, zoo("llama")))

    def run() -> Report:
        with ExperimentContext(config, tmp_path / "out", backend="transformers") as context:
            return experiments.run("curve", context)

    first = run()
    from snpatch import Engine

    monkeypatch.setattr(Engine, "contrast", lambda *_, **__: pytest.fail("the ranking is there"))
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("the texts are there"))
    assert run().tables == first.tables
    second_config = load_experiment_config(
        config_file(tmp_path, zoo("llama"), lambda t: t.replace("contrast_tokens = 4", "contrast_tokens = 5"))
    )
    with (
        ExperimentContext(second_config, tmp_path / "out", backend="transformers") as context,
        pytest.raises(pytest.fail.Exception),
    ):
        context.ranking()


def test_table_file_contains_its_provenance(tmp_path, zoo):
    with ExperimentContext(
        load_experiment_config(config_file(tmp_path, zoo("llama"))), tmp_path / "out", backend="transformers", limit=3
    ) as context:
        report = experiments.run("curve", context, {"k": [0, 0.25, 7], "resamples": 50})
    paths = files.write_report(report, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "curve.json").read_text())
    provenance = data["provenance"]
    assert provenance["settings"]["k"] == [0, 0.25, 7]
    assert provenance["settings"]["resamples"] == 50
    assert provenance["settings"]["controls"] == 1, "the config's"
    assert provenance["backend"] == "transformers"
    assert provenance["sets"]["p"]["rows_used"] == 3
    assert provenance["sets"]["p"]["sha256"]
    assert provenance["judges"] == {"cost": {"source": "refusal"}}
    assert list(provenance["rankings"]) == ["sft, dpo, p, completion"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert len(data["rows"]) == len((tmp_path / "out" / "curve.csv").read_text().splitlines()) - 1
    assert {path.suffix for path in paths} == {".csv", ".json", ".jsonl", ".png", ".svg"}
    ks = {row["rank_hi"] for row in data["rows"] if row["ranking"]}
    assert ks == {0, round(0.25 * 2 * tiny.NEURONS), 7}


def split_sets(text: str) -> str:
    """Give contrast, benchmark and further seen prompts a set of their own."""
    text = text.replace('prompts = "p"', 'prompts = "c"')
    text = text.replace("[sets]", '[sets]\nc = { source = "c.jsonl" }\ns = { source = "s.jsonl" }')
    return 'seen_sets = ["s"]\n' + text


def test_overlap_with_seen_prompts_is_noted_and_left_out_by_setting(tmp_path, zoo):
    path = config_file(tmp_path, zoo("llama"), split_sets)
    prompts = [*tiny.PROMPTS, tiny.PROMPTS[0]]
    n = len(prompts)
    for name, texts in (
        ("p", prompts),
        ("c", ["x y", tiny.PROMPTS[0].upper() + "!", "z"]),
        ("s", [tiny.PROMPTS[1]]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with ExperimentContext(load_experiment_config(path), tmp_path / "out", backend="transformers") as context:
        report = experiments.run("curve", context, {"k": [0]})
    seen = {"c": {"exact": 2, "near": 0}, "s": {"exact": 1, "near": 0}}
    expected = {"prompts": n, "repeats": 1, "seen": seen, "unread": {}, "excluded": 0}
    assert report.provenance["overlaps"] == {"p": expected}
    assert f"2 of {n} prompts of p are also in c (2 word for word, 0 nearly)." in report.notes
    assert any(note.startswith(f"1 of {n} prompts of p repeat an earlier one") for note in report.notes)
    path.write_text("exclude_seen = true\n" + path.read_text())
    with ExperimentContext(load_experiment_config(path), tmp_path / "out", backend="transformers") as context:
        report = experiments.run("curve", context, {"k": [0]})
        assert [chat[0]["content"] for chat in context.prompts("p")] == list(tiny.PROMPTS[2:])
        assert len(context.prompts("c")) == 3
    assert report.provenance["overlaps"]["p"]["excluded"] == 3
    assert report.provenance["sets"]["p"]["selection"] == ["without 3 left out (also in seen prompts)"]
    assert {row["prompts"] for row in report.tables["curve"]} == {n - 3}
    assert (
        f"1 of {n} prompts of p were left out because they are also in s (1 word for word, 0 nearly)." in report.notes
    )
    (tmp_path / "s.jsonl").write_text((tmp_path / "p.jsonl").read_text())
    with (
        ExperimentContext(load_experiment_config(path), tmp_path / "out", backend="transformers") as context,
        pytest.raises(SnpatchError, match=rf"expected prompts, got none: all {n} are left out"),
    ):
        context.prompts("p")
    path.write_text(path.read_text().replace('seen_sets = ["s"]', 'seen_sets = ["q"]'))
    with pytest.raises(SnpatchError, match=r"seen_sets: prompt set: expected .*, got 'q'"):
        load_experiment_config(path)


def test_overlap_reads_the_training_data_that_a_record_names(tmp_path, zoo):
    model = zoo("llama")
    folders = {name: tmp_path / name for name in ("trained", "lost", "old")}
    for folder in folders.values():
        shutil.copytree(model.adapters["sft"][0], folder)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": tiny.PROMPTS[2], "response": "x"}) + "\n")
    for name, source in (("trained", "rows.jsonl"), ("lost", "gone.jsonl")):
        record = {"provenance": {"source": {"prompt_set": asdict(PromptSet(str(tmp_path / source)))}}}
        (folders[name] / "training.json").write_text(json.dumps(record))
    (folders["old"] / "training.json").write_text(json.dumps({"provenance": {"source": {}}}))
    adapters = "\n".join(f'{name} = ["{folder}"]' for name, folder in folders.items())
    path = config_file(tmp_path, model, lambda t: split_sets(t).replace("[contrasts]", f"{adapters}\n[contrasts]"))
    for name in ("c", "s"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "other"}) + "\n")
    with ExperimentContext(load_experiment_config(path), tmp_path / "out", backend="transformers") as context:
        context.prompts("p")
        (overlap,) = context._overlaps.values()
    assert overlap.indices == overlap.overlaps["the training data of trained"].exact == (2,)
    assert overlap.unread.keys() == {"the training data of lost", "the training data of old"}
    assert "names no training data" in overlap.unread["the training data of old"]
    assert any(note.startswith("overlap of p with the training data of lost is unknown: ") for note in overlap.notes)


ORDER = {
    "curve": {},
    "distribution": {"k": 0.1},
    "neuron_tokens": {"neurons": 2, "tokens": 2},
    "sliding_window": {"width": 0.5, "stride": 0.5, "last": 0.5, "controls": 0},
    "positions": {"k": 0.1, "more_k": [0.2], "effect_k": [0.1]},
    "alignment_tax": {"objectives": ["safety", "other"], "neurons": ["other", "safety"], "k": 0.9},
    "perplexity": {"text": "t", "k": [0, 0.5], "window": 16},
    "guard": {"k": [5], "folds": 2, "controls": 1, "harm_threshold": -1.0},
    "objectives": {"k": 0.1, "more_k": [0.2], "effect_k": [0.1]},
}


def extend_config(text: str) -> str:
    """Add a second objective, a text, and a judge that scores both."""
    text = text.replace("[judges]", 'other = { recipient = "base", donor = "sft", prompts = "p" }\n[judges]')
    text = text.replace('source = "refusal"', 'source = "some_judge:by_words"')
    return text.replace("[sets]", '[sets]\nt = { source = "t.jsonl", format = "wikitext-2" }')


def test_provenance_is_independent_of_earlier_experiments(tmp_path, zoo):
    config = config_file(tmp_path, zoo("llama"), extend_config)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": " ".join(tiny.WORDS * 2)}) + "\n")

    def run_all(names, out) -> dict[str, str]:
        with ExperimentContext(
            load_experiment_config(config, trust=True), tmp_path / out, backend="transformers"
        ) as context:
            provenances = {name: experiments.run(name, context, ORDER[name]).provenance for name in names}
        return {name: json.dumps(facts | {"seconds": None}, indent=1) for name, facts in provenances.items()}

    forward = run_all(ORDER, "forward")
    backward = run_all(reversed(ORDER), "backward")
    cached = run_all(reversed(ORDER), "forward")  # rankings and completions exist
    for name, text in forward.items():
        assert backward[name] == text, name
        assert cached[name] == text, name
        assert json.loads(text)["backend"] == "transformers"
    models = {name: list(json.loads(text)["models"]) for name, text in forward.items()}
    assert models["distribution"] == ["dpo", "sft"]
    assert models["neuron_tokens"] == models["curve"] == ["base", "dpo", "sft"]
    assert models["guard"] == ["dpo", "sft"]
    sets = {name: list(json.loads(text)["sets"]) for name, text in forward.items()}
    assert sets["distribution"] == sets["curve"] == ["p"]
    assert sets["perplexity"] == ["p", "t"]


def test_experiments_name_overlapping_controls_once(tmp_path, zoo):
    config = config_file(tmp_path, zoo("llama"), extend_config)
    settings = {
        "curve": {"k": [0.9]},
        "transfer": {"k": 0.9, "text": "", "controls": 1},
        "alignment_tax": ORDER["alignment_tax"] | {"controls": 1},
    }
    with ExperimentContext(
        load_experiment_config(config, trust=True), tmp_path / "out", backend="transformers"
    ) as context:
        for name, one in settings.items():
            report = experiments.run(name, context, one)
            sentences = [*report.headline, *report.notes]
            assert sum("random controls overlap with the window" in line for line in sentences) == 1, name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nothing", {}, "got 'nothing'"),
        ("curve", {"kk": [1]}, "settings of curve: unknown key kk"),
        ("curve", {"k": [1.5]}, r"k: expected a fraction of the neurons in 0\.0\.\.1\.0, got 1.5"),
        ("curve", {"judges": ["reward"]}, "judge: expected .*, got 'reward'"),
        ("curve", {"prompts": "q"}, "prompt set: expected .*, got 'q'"),
        ("stability", {}, "needs at least two"),
        ("alignment_tax", {}, "needs the contrast helpful, got safety"),
        ("perplexity", {"k": [0]}, "prompt set: expected .*, got 'text'"),
        ("perplexity", {"text": "p", "k": [0]}, "expected running text, got prompts"),
        ("sliding_window", {"width": 0}, "at least one neuron"),
        ("neuron_tokens", {"neurons": 0}, "at least 1"),
        ("safeguard", {}, "expected sets other than p"),
        ("safeguard", {"train": "q", "prompts": ["p"], "harmless": ["p"]}, "harmless: expected sets .*, got p"),
        ("safeguard", {"activations": "both"}, "activations: expected one of own, fitted, got 'both'"),
        ("guard", {"protocol": "both"}, "protocol: expected one of pairwise, merged, got 'both'"),
    ],
)
def test_experiment_that_cannot_run_gives_the_reason(tmp_path, zoo, name, settings, message):
    with (
        ExperimentContext(
            load_experiment_config(config_file(tmp_path, zoo("llama"))), tmp_path / "out", backend="transformers"
        ) as context,
        pytest.raises(SnpatchError, match=message),
    ):
        experiments.run(name, context, settings)


def test_report_writes_full_values_and_prints_short_ones(tmp_path):
    rows = [{"a": 1, "b": None, "c": 0.123456}, {"a": 2, "b": "x,y", "c": 1e-5}]
    table = TableView.from_rows(rows, {"A": "a", "C": "c", "B": lambda row: row["b"]})
    report = Report("t", {"t": rows}, {}, (table,))
    files.write_report(report, tmp_path)
    assert (tmp_path / "t.csv").read_text() == 'a,b,c\n1,,0.123456\n2,"x,y",1e-05\n'
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows
    from rich.console import Console

    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print_report(report, console)
    text = console.export_text()
    assert "0.12" in text
    assert "0.123" not in text
    assert "1e-05" in text


def test_report_modules_import_neither_rich_nor_matplotlib():
    code = "import sys, snpatch.report.report, snpatch.report.files; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "snpatch.report.report" in modules
    assert not {"matplotlib", "rich", "scipy"} & {*modules}
