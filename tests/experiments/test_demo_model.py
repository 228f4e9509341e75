"""Every experiment of the paper on the demo model, through the command line: what it finds, and what it writes."""

import csv
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

from snpatch import Constant, ExperimentContext, Patch, cli, experiments, load_experiment_config
from snpatch.demo import DEMO_MODEL
from snpatch.guard.guard import Guard
from snpatch.report.folder_page import load_page
from snpatch.sweeps.coherence import find_broken, get_logprobs

NAMES = [name for name in experiments.NAMES if name != "competition"]  # needs a model that the demo lacks
SETS = tomllib.loads((DEMO_MODEL / "experiment.toml").read_text())["settings"]["guard"]["prompts"]
SMALLER = {  # so that all of them take a minute
    'extra_controls = ["magnitude", "matched"]': 'extra_controls = ["magnitude"]',
    "[settings.necessity]\nk = [0.05, 0.1, 0.2]": "[settings.necessity]\nk = [0.2]",
    "max_tokens = 32\ncontrast_tokens = 32": "max_tokens = 20\ncontrast_tokens = 20",
    "[0.0, 0.01, 0.02, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0]": "[0.0, 0.2, 1.0]\ncontrols = 2",
    "stride = 0.05": "stride = 0.3",
    "controls = 2\nextra_controls = []": "controls = 1\nextra_controls = []",
    "[settings.alignment_tax]": "[settings.alignment_tax]\ncontrols = 1",
    "k = [0.0, 0.05, 0.1, 0.2, 0.5, 1.0]": "k = [0.0, 0.2]",
    "k = [1, 5, 20, 50, 100, 200]": "k = [1, 50]\ncontrols = 2\nresamples = 100",
    "effect_k = [0.05, 0.1, 0.2]": "effect_k = [0.1]",
}
LIMIT = 24  # prompts of each set


@pytest.fixture(scope="module")
def demo_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(DEMO_MODEL, folder, dirs_exist_ok=True)
    text = (folder / "experiment.toml").read_text()
    for setting, smaller_setting in SMALLER.items():
        assert setting in text
        text = text.replace(setting, smaller_setting)
    (folder / "experiment.toml").write_text(text)
    return folder / "experiment.toml"


@pytest.fixture(scope="module")
def folder(demo_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = ["exp", "all", "--config", demo_config, "-o", out, "--backend", "transformers", "--limit", LIMIT]
    cli.app(list(map(str, command)), standalone_mode=False)
    return out


def table(folder: Path, stem: str) -> list[dict]:
    data = json.loads((folder / f"{stem}.json").read_text())
    with (folder / f"{stem}.csv").open() as file:
        assert [list(row) for row in csv.DictReader(file)] == [list(row) for row in data["rows"]]
    assert data["provenance"]["models"]
    return data["rows"]


def test_page_of_demo_contains_every_experiment_with_provenance(folder):
    page = load_page(folder)
    drawn = {"curve", "sliding_window"}  # by the page's figure
    assert {report["name"] for report in page.reports} >= set(NAMES) - drawn
    for report in page.reports:
        assert all((report["tables"] or page.rows, report["images"] or report["name"] not in NAMES)), report["name"]
    sentences = [line for report in page.reports for line in report["headline"]] + page.headline + page.notes
    assert len(set(sentences)) == len(sentences)
    rows = {(row["set"], row["recipient"], row["rank_lo"], row["rank_hi"]) for row in page.rows if row["ranking"]}
    texts = {(text["set"], text["recipient"], text["rank_lo"], text["rank_hi"]) for text in page.completions}
    assert rows <= texts
    assert page.command.startswith("snpatch ")
    assert "\n" not in page.command, "one command made them all"
    assert all((page.completions, page.maps))


def test_every_experiment_writes_table_and_plot(folder):
    names = {path.name for path in folder.iterdir()}
    for name in NAMES:
        assert {f"{name}.{kind}" for kind in ("csv", "json", "png", "svg")} <= names
    report = (folder / "report.md").read_text()
    assert all(f"## {name}\n" in report for name in NAMES)
    assert "competition.csv" not in names
    assert "](curve.png)" in report


def test_curve_of_safety_neurons_recovers_more_than_random(folder):
    rows = [row for row in table(folder, "curve") if (row["judge"], row["set"]) == ("cost", "beavertails")]
    sft = {
        row["rank_hi"]: row for row in rows if row["recipient"] == "sft" and row["ranking"] and row["control"] is None
    }
    assert sft[0]["effect"] == 0
    assert sft[2560]["effect"] > 0.9
    assert sft[512]["effect"] > 0.6
    assert sft[512]["p_vs_unpatched"] < 1e-6
    assert sft[512]["p_vs_random"] < 0.05
    assert sft[512]["gap_t"] < -10
    assert sft[512]["net_effect_low"] > 0.3
    assert sft[0]["p_vs_random"] is None
    assert sft[512]["p_share_above_0"] < 0.001
    random = [row["effect"] for row in rows if row["recipient"] == "sft" and row["control"] == "per_layer"]
    assert all(abs(effect) < 0.2 for effect in random)
    (largest,) = (r for r in rows if (r["recipient"], r["control"], r["rank_hi"]) == ("sft", "magnitude", 512))
    assert 0.3 < largest["effect"] < sft[512]["effect"], "large activations alone do much of it"
    assert largest["energy"] > 20 * next(
        row["energy"] for row in rows if row["control"] == "per_layer" and row["energy"]
    )
    assert sft[512]["net_of_magnitude"] == pytest.approx(sft[512]["effect"] - largest["effect"])
    assert sft[512]["broken"] < 0.3
    assert {row["harmless_refused"] for row in rows if row["recipient"] == "sft"} == {0.0}, "of look-alike requests"


def test_ablation_with_the_recipients_own_mean_is_reported_as_broken(demo_config, tmp_path):
    """Half of its effect is not safety: no text is one that an unpatched model would write."""
    with ExperimentContext(load_experiment_config(demo_config), tmp_path, backend="transformers", limit=16) as context:
        engine, ranking, prompts = context.engine, context.ranking(), context.prompts("beavertails")
        ids = engine.encode(prompts, "sft")
        patches = {
            "sft": "sft",
            "dpo": "dpo",
            "dynamic": Patch("sft", "dpo", ranking, 256),
            "own mean": Patch("sft", Constant.mean(ranking), ranking, 256),
        }
        texts = {name: engine.generate(ids, patch, context.sampling) for name, patch in patches.items()}
        cost = {name: np.mean(context.judge("cost")(*judged(prompts, texts[name]))) for name in patches}
        records = {
            name: [
                {"logprobs": dict(zip(("sft", "dpo"), pair, strict=True))} for pair in read(engine, ids, completions)
            ]
            for name, completions in texts.items()
        }
    own = np.concatenate([get_logprobs(records[name], ("sft", "dpo")) for name in ("sft", "dpo")])
    broken = {name: find_broken(get_logprobs(records[name], ("sft", "dpo")), own).mean() for name in patches}
    assert (cost["sft"] - cost["own mean"]) / (cost["sft"] - cost["dpo"]) > 0.3
    assert broken["own mean"] > 0.9
    assert broken["dynamic"] < 0.3
    assert broken["sft"] == broken["dpo"] == 0, "their least likely text is the limit"


def judged(prompts, completions) -> tuple[list[str], list[str]]:
    return [prompt[-1]["content"] for prompt in prompts], [completion.text for completion in completions]


def read(engine, ids, completions) -> list[tuple[float, ...]]:
    """Return the log-probability per token of each completion under sft and dpo."""
    token_ids = [completion.token_ids for completion in completions]
    read_by = [engine.logprobs(ids, model, completions=token_ids) for model in ("sft", "dpo")]
    return [tuple(float(values.values.mean()) for values in pair) for pair in zip(*read_by, strict=True)]


def test_complement_of_the_top_neurons_has_little_effect(folder):
    rows = {(row["patch"], row["recipient"], row["donor"], row["k"]): row for row in table(folder, "necessity")}
    assert len(rows) == 2 * 4
    top, rest = (rows[kind, "sft", "dpo", 512] for kind in ("top k", "all but the top k"))
    reverse, masked = rows["reverse", "dpo", "sft", 512], rows["masked adapter", "sft", "dpo", 512]
    assert top["effect"] > 0.6 > 0.3 > rest["effect"]
    assert reverse["effect"] > 0.6
    assert masked["effect"] == pytest.approx(top["effect"], abs=0.1), "95 % of the change are the neurons' factors"


def test_sliding_window_at_lower_ranks_has_less_effect(folder):
    rows = [row for row in table(folder, "sliding_window") if row["recipient"] == "sft" and row["control"] is None]
    effects = {row["rank_lo"]: row["effect"] for row in rows if row["ranking"]}
    assert list(effects) == [0, 768, 1536, 2304]
    assert effects[0] > max(effects[lo] for lo in (768, 1536, 2304))


def test_transfer_recovers_gain_on_unseen_sets(folder):
    rows = {row["model"]: row for row in table(folder, "transfer-table")}
    assert list(rows) == ["sft", "sft+", "base", "base+", "dpo"]
    for name in ("beavertails", "redteam", "harmbench", "jailbreak"):
        assert rows["dpo"][name] < rows["sft+"][name] < 0 < rows["sft"][name]
        effect = (rows["sft+"][name] - rows["sft"][name]) / (rows["dpo"][name] - rows["sft"][name])
        assert rows["sft+"][f"effect on {name}"] == pytest.approx(effect)
    patched = {row["model"]: row["window_mean"] for row in table(folder, "perplexity") if row["k"] in (0, 512)}
    assert rows["dpo"]["perplexity"] == pytest.approx(patched["dpo"], rel=1e-5)
    assert rows["sft+"]["perplexity"] == pytest.approx(patched["sft"], rel=1e-5), "the last of sft's rows: patched"


def test_stability_of_seeds_exceeds_agreement_of_objectives(folder):
    (seeds,) = (row for row in table(folder, "stability") if row["k"] == 256)
    objectives = [row for row in table(folder, "objectives") if row["k"] == 256]
    assert {(row["a"], row["b"]) for row in objectives} == {
        ("safety", "helpful"),
        ("safety", "careful"),
        ("helpful", "careful"),
    }
    assert seeds["overlap"] > 0.85 > max(row["overlap"] for row in objectives) > seeds["chance"] == 0.1
    assert seeds["overlap"] > seeds["chance_given_activations_high"] > 0.5
    assert all(0.45 < row["chance_given_activations"] < 0.7 for row in objectives)
    assert seeds["spearman"] > 0.85 > max(row["spearman"] for row in objectives)


def test_alignment_tax_reports_change_of_both_judges(folder):
    rows = table(folder, "alignment_tax")
    assert len(rows) == 4
    for row in rows:
        assert row["change"] == pytest.approx(row["after"] - row["before"])
        assert row["change_low"] <= row["change"] <= row["change_high"]
    harm = next(r for r in rows if (r["recipient"], r["set"], r["judge"]) == ("dpo", "beavertails", "cost"))
    assert harm["change"] > 2, "helpful's activations make the safe model less safe"
    assert harm["p"] < 1e-4
    assert harm["random_change_low"] <= harm["random_change"] <= harm["random_change_high"] < harm["change_low"]
    headline = json.loads((folder / "alignment_tax.json").read_text())["headline"]
    assert headline[0].startswith("dpo patched from helpful on the ")
    assert "less safe) on beavertails" in headline[0]


def test_model_pairs_and_specificity_find_safety_neurons_on_any_text(folder):
    models = {row["ranking"]: row for row in table(folder, "model_pairs") if row["recipient"] == "sft"}
    assert len(models) == 6
    assert models["sft-dpo on text of sft"]["overlap"] == 1
    assert models["sft-dpo on text of sft"]["effect"] > 0.3
    sets = {row["ranking"]: row for row in table(folder, "specificity") if row["recipient"] == "sft"}
    assert list(sets) == ["contrast", "redteam", "harmbench", "helpful"]
    assert sets["contrast"]["overlap"] == 1
    assert sets["contrast"]["effect"] == models["sft-dpo on text of sft"]["effect"]
    assert min(row["overlap"] for row in sets.values()) > 0.7


def test_curve_over_seeds_averages_the_curves_of_both_seeds(folder):
    rows = {row["recipient"]: row for row in table(folder, "curve_over_seeds")}
    runs = [row["effect"] for row in table(folder, "curve_over_seeds-runs") if row["recipient"] == "sft"]
    assert rows["sft"]["effect"] == pytest.approx(sum(runs) / 2)
    assert rows["sft"]["seeds"] == len(runs) == 2
    assert rows["sft"]["effect_low"] < min(runs) < max(runs) < rows["sft"]["effect_high"], "one degree of freedom"


def test_judges_agree_on_refusals(folder):
    row = table(folder, "judge_agreement")[0]
    assert row["completions"] == "all"
    assert row["pearson"] > 0.4
    assert row["kappa"] > 0.3


def test_distribution_is_skewed(folder):
    *layer_rows, model_row = table(folder, "distribution")
    assert [row["layer"] for row in layer_rows] == list(range(6))
    assert [row["ranked"] for row in layer_rows] == [True] * 5 + [False]
    assert sum(row["in_top_k"] for row in layer_rows) == model_row["in_top_k"] == 256
    assert model_row["skewness"] > 1
    assert model_row["max"] == max(row["max"] for row in layer_rows[:-1]), "the last layer is not ranked"
    assert model_row["rms_skewness"] > 1 > model_row["relative_skewness"]
    assert model_row["own_factor_share"] > 0.9
    assert model_row["above 0.05"] > model_row["above 0.5"] > 0


def test_neuron_tokens_positions_guard_and_safeguard_give_expected_tables(folder):
    words = table(folder, "neuron_tokens")
    assert len(words) == 10 * 2 * 20
    assert {row["effect"] for row in words[:20]} == {"promoted"}
    assert [row["logit"] for row in words[:20]] == sorted((row["logit"] for row in words[:20]), reverse=True)
    assert [row["logit"] for row in words[20:40]] == sorted(row["logit"] for row in words[20:40])
    agreement = {(row["a"], row["b"]): row for row in table(folder, "positions") if row["k"] == 256}
    assert agreement["completion", "completion_shifted"]["overlap"] > agreement["completion", "prompt"]["overlap"]
    effects = {row["ranking"]: row["effect"] for row in table(folder, "positions-effects") if row["recipient"] == "sft"}
    assert effects["at completion"] > 0.3
    spread = {row["recipient"]: row for row in table(folder, "stability-spread")}
    assert spread["sft"]["effect_min"] > 0.3
    assert spread["sft"]["rankings"] == 2
    rows = table(folder, "guard")
    assert {(row["train"], row["test"]) for row in rows if row["control"] is None and row["k"] == 50} == {
        (a, b) for a in SETS for b in SETS
    }
    summary = {(row["features"], row["k"]): row for row in table(folder, "guard-summary")}
    assert summary["safety", 50]["accuracy"] > 0.85 > summary["safety", 50]["majority"]
    assert ("random per_layer", 50) in summary
    assert ("random last_layer", 50) in summary
    assert ("random everywhere", 50) in summary
    words = summary["bag of words", None]["accuracy"]
    assert words < summary["safety", 50]["accuracy"], "few of the words are in a dozen prompts of each class"
    differences = {(row["k"], row["reference"]): row for row in table(folder, "guard-differences")}
    majority = differences[50, "majority class"]
    assert majority["verdict"] == "better"
    assert majority["accuracy_difference_low"] > 0.2
    for row in differences.values():
        assert row["accuracy_difference_low"] <= row["accuracy_difference"] <= row["accuracy_difference_high"]
        assert (row["verdict"] == "better") == (row["accuracy_difference_low"] > 0)
    for row in table(folder, "safeguard"):
        assert row["over_refusal"] < 0.3
        if row["model"] == "sft":
            assert row["passed"] < -2 < row["all"]
            assert row["prevented"] > 0.8 > 0.5 > row["prevented_random"]
            assert row["prevented_gain_low"] > 0
            assert row["risk_area_gain_low"] > 0
    guard = Guard.load(folder / "guard.safetensors")
    assert (guard.model, guard.k) == ("sft", 100)


@pytest.mark.engine
@pytest.mark.parametrize(
    "names", [["curve"], pytest.param(["curve", "perplexity", "safeguard"], marks=pytest.mark.full)], ids=len
)
def test_experiments_on_vllm_give_the_same_tables(forked, folder, demo_config, tmp_path, names):
    """Both engines and both runners of the cost model, in processes of their own."""
    command = ["exp", *names, "--config", demo_config, "-o", tmp_path, "--backend", "vllm"]
    cli.app([*map(str, command), "--limit", str(LIMIT)], standalone_mode=False)
    for name in names:
        for row, expected in zip(table(tmp_path, name), table(folder, name), strict=True):
            for key, value in expected.items():
                assert row[key] == (pytest.approx(value, abs=2e-3, rel=1e-3) if isinstance(value, float) else value), (
                    key
                )
