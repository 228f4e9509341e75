"""Experiments on constructed data: agreement, shared neurons, perplexity, words, distribution, tables."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from snpatch import Ranking, SnpatchError, experiments
from snpatch.data import DATASETS
from snpatch.demo import DEMO_MODEL
from snpatch.experiments.alignment_tax import intersect_top
from snpatch.experiments.common import agreement
from snpatch.experiments.config import load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.experiments.distribution import describe_scores
from snpatch.experiments.neuron_tokens import neuron_logits
from snpatch.models.weights import open_weights
from snpatch.report import files, terminal
from snpatch.report.report import Report, TableView
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
    assert len(rows) == 12


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


ORDER = {
    "curve": {},
    "distribution": {"k": 0.1},
    "neuron_tokens": {"neurons": 2, "tokens": 2},
    "sliding_window": {"width": 0.5, "stride": 0.5, "last": 0.5, "controls": 0},
    "positions": {"k": 0.1, "more_k": [0.2], "effect_k": [0.1]},
    "alignment_tax": {"objectives": ["safety", "other"], "neurons": ["other", "safety"], "k": 0.9},
    "perplexity": {"text": "t", "k": [0, 0.5], "window": 16},
    "guard": {"k": [5], "folds": 2, "controls": 1, "harm_threshold": -1.0},
    "objectives": {"k": 0.1, "more_k": [0.2]},
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
