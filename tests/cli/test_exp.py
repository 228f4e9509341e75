"""The command line of experiments, guards, datasets and judges: real runs on the golden model, and bad input."""

import json
import sys
from pathlib import Path

import pytest
from commands import GOLDEN, JUDGE, MODEL, PAIR, run, write_sweep_file

import snpatch.experiments
from snpatch.errors import ReceiptError
from snpatch.experiments import NAMES
from snpatch.sweeps import generation


def test_guard_commands_fit_evaluate_and_apply(capsys, prompts, ranking, tmp_path):
    guard = tmp_path / "guard.safetensors"
    common = ["--judge", JUDGE, "--max-tokens", 3, *PAIR]
    fit = ["guard", "fit", MODEL, prompts, *common, "--model", "sft", "--ranking", ranking, "-k", 200, "--folds", 2]
    code, out, err = run(capsys, *fit, "--C", "1,10", "--refusal", "no .", "-o", guard, "--json")
    assert code == 0, err
    fitted = json.loads(out)
    assert fitted["n"] == 12
    assert fitted["C"] in (1.0, 10.0)
    assert 0 < fitted["harmful"] < 12
    evaluate = ["guard", "eval", MODEL, "--guard", guard]
    code, _, err = run(capsys, *evaluate, prompts, *common)
    assert code == 2
    assert "expected prompts to test on, got only ones of the prompts that the guard was fitted on" in err
    fitted_rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    new_texts = [" ".join(reversed(row["prompt"].split())) for row in fitted_rows]
    other = tmp_path / "other.jsonl"
    eval_texts = [*new_texts, new_texts[0].upper(), fitted_rows[0]["prompt"]]
    other.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in eval_texts))
    code, out, err = run(capsys, *evaluate, other, *common, "--json")
    assert code == 0, err
    scores = json.loads(out)
    num_new = len(set(new_texts) - {row["prompt"] for row in fitted_rows})
    assert (scores["n"], scores["left_out"], scores["harm_threshold"]) == (num_new, len(eval_texts) - num_new, 0.0)
    for warning in ("prompts that the guard was fitted on are left out", "1 repeated prompts are left out",
                    "with fewer than 20 of a class"):  # fmt: skip
        assert warning in err
    code, out, err = run(capsys, *evaluate, other, *common, "--harm-threshold", 2, "--judge", "some_judge:by_letters",
                         "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["harm_threshold"] == 2
    assert "fitted to labels of the judge some_judge:by_words, not of some_judge:by_letters" in err
    texts = tmp_path / "texts.jsonl"
    code, _, err = run(capsys, "guard", "apply", MODEL, prompts, *PAIR, "--guard", guard, "--recipient", "dpo",
                       "--max-tokens", 3, "-o", texts)  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    refused = [row for row in rows if row["finish_reason"] == "guard"]
    assert len(refused) == fitted["harmful"]
    assert all(row["completion"] == "no ." and row["token_ids"] == [] and row["harm"] > 0.5 for row in refused)
    assert all(row["token_ids"] and row["harm"] <= 0.5 for row in rows if row not in refused)
    code, out, err = run(capsys, *fit, "-o", guard)
    assert code == 0, err
    assert "by cross-validation" in out
    code, _, err = run(capsys, *evaluate, other, *common[:4], "-a", f"sft={GOLDEN / 'adapters/dpo'}",
                       "--template", "tulu", "--backend", "transformers")  # fmt: skip
    assert code == 2
    assert "expected the model 'sft' that it was fitted on" in err


def test_sweep_with_two_judges_and_a_dataset_scores_both(capsys, ranking, tmp_path):
    table = tmp_path / "behaviors.csv"
    words = [row["content"] for row in json.loads((GOLDEN / "prompts.json").read_text())["prompts"][:3]]
    lines = [f'"{text}",standard,,,,{i}' for i, text in enumerate(words)]
    header = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    table.write_text("\n".join([header, *lines, '"",standard,,,,bad']) + "\n")
    command = ["sweep", MODEL, table, "--format", "harmbench", *PAIR, "--ranking", f"safety={ranking}", "--donor",
               "dpo", "--recipient", "sft", "-k", "0,70", "--judge", f"cost={JUDGE}", "--judge", "refused=refusal",
               "--controls", 0, "--max-tokens", 3, "-o", tmp_path / "out", "--json"]  # fmt: skip
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "behaviors.csv, line 5: Behavior" in err
    code, out, err = run(capsys, *command, "--skip-invalid")
    assert code == 0, err
    assert "skipped 1 invalid rows" in err
    rows = json.loads(out)["tables"]["sweep"]
    assert {row["judge"] for row in rows} == {"cost", "refused"}
    assert {row["prompts"] for row in rows} == {3}
    provenance = json.loads((tmp_path / "out" / "sweep.json").read_text())["provenance"]
    assert list(provenance["models"]) == list(provenance["adapters"]) == ["dpo", "sft"], "what was used, and no more"
    assert provenance["judges"]["refused"]["source"] == "refusal"
    assert provenance["sets"]["prompts"]["rows_used"] == 3
    assert provenance["rankings"]["safety"]["digest"]


def test_sweep_file_is_run_resumed_and_exported(capsys, prompts, ranking, tmp_path):
    path, out = write_sweep_file(tmp_path, prompts, ranking), tmp_path / "out"
    code, out_text, err = run(capsys, "sweep", path, "--trust-config", "-o", out, "--json")
    assert code == 0, err
    rows = json.loads(out_text)["tables"]["sweep"]
    points = {(r["ranking"], r["control"], r["control_seed"], r["rank_lo"], r["rank_hi"], r["strength"]) for r in rows}
    patched = {
        (n, *c, *w, x)
        for n in ("safety", "own")
        for c in ((None, None), ("per_layer", 0), ("magnitude", None))
        for w in ((0, 0), (10, 70))
        for x in (1, 0.5)
    }
    # No neurons need no control, and the file of safety has no statistics.
    patched -= {p for p in patched if p[1] == "magnitude" and (p[0] == "safety" or p[4] == 0)}
    assert points == {(None, None, None, 0, 0, None), *patched}
    assert {(r["set"], r["prompts"]) for r in rows} == {("few", 2), ("more", 3)}
    assert {r["judge"] for r in rows} == {"cost", "refused"}
    assert {f.name for f in out.glob("sweep-*.png")} >= {
        "sweep-few-strength 0.5.png",
        "sweep-refused-more-strength 1.png",
    }
    code, out_text, err = run(capsys, "sweep", "status", out, "--json")
    status = json.loads(out_text)
    assert (code, status["open"], status["failed"], status["runs"][-1]["outcome"]) == (0, 0, 0, "done")
    assert status["done"] > 20
    csv_file, before = out / "sweep.csv", status["done"]
    table = csv_file.read_bytes()
    assert run(capsys, "sweep", out / "spec.json", "--trust-config", "-o", out)[0] == 0, (
        "the file that it wrote is the same sweep"
    )
    assert csv_file.read_bytes() == table
    assert json.loads(run(capsys, "sweep", "status", out, "--json")[1])["done"] == before
    assert f"{before} completions done, 0 open" in run(capsys, "sweep", "status", out)[1]
    for name in ("texts.jsonl", "texts.csv", "texts.parquet"):
        assert run(capsys, "sweep", "export", out, tmp_path / name)[0] == 0
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == len(points) * 5 + 5, "sft and dpo unpatched"
    assert all(t["completion"] is not None and t["score cost"] is not None for t in texts)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    assert pyarrow.read_table(tmp_path / "texts.parquet").num_rows == len(texts)
    code, _, err = run(capsys, "sweep", "export", out, tmp_path / "texts.xml")
    assert (code, "expected a name that ends in .csv, .jsonl or .parquet" in err) == (2, True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"windows": []}, [], "windows: expected at least one value"),
        ({"windows": ["many"]}, [], "a window: expected a number, got 'many'"),
        ({"recipients": ["tulu"]}, [], "got 'tulu'"),
        ({"sets": ["none"]}, [], "sets: prompt set: expected one of few, more, got 'none'"),
        ({"judges": ["none"]}, [], "judges: judge: expected one of cost, refused, got 'none'"),
        ({"strength": 1}, [], "sweep: unknown key strength"),
        ({"samples": 2}, [], "several samples of a prompt need a temperature above 0"),
        ({}, ["-k", "3"], "--windows: expected no --windows with a sweep file"),
        ({}, ["-a", "x=y"], "--adapter: expected no --adapter with a sweep file"),
    ],
)
def test_invalid_sweep_file_is_rejected_in_one_line(capsys, prompts, ranking, tmp_path, change, options, message):
    path = write_sweep_file(tmp_path, prompts, ranking, **change)
    code, _, err = run(capsys, "sweep", path, "--trust-config", "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_sweep_by_flags_names_missing_options(capsys, prompts, ranking, tmp_path):
    code, _, err = run(capsys, "sweep", MODEL, prompts, *PAIR, "--ranking", ranking, "-o", tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (
        2, "snpatch: error: sweep: expected a sweep file or --donor, --recipient, --windows, --judge, got neither."
    )  # fmt: skip
    code, _, err = run(capsys, "sweep", "status", tmp_path)
    assert (code, "holds no sweep" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exp", "nothing", "-c", "demo"], "experiment: expected one of curve"),
        (["exp", "curve", "-c", "nowhere"], "config nowhere: expected a file or one of demo, got neither"),
        (["exp", "curve", "neuron_tokens", "-c", "demo", "--set", "k=[1]"], "--set: expected one experiment, got 2"),
        (["exp", "curve", "-c", "demo", "--set", "k"], "--set: expected name=value, got 'k'"),
        (
            ["exp", "neuron_tokens", "-c", "demo", "--set", "neurons=0", "--backend", "transformers", "--limit", "2"],
            "at least 1",
        ),
        (["exp", "curve", "-c", "demo", "--backend", "jax"], "backend: expected one of"),
        (["exp", "curve"], "--config: expected an experiment config, got none"),
    ],
)
def test_invalid_experiment_command_is_rejected_in_one_line(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, *arguments, "-o", tmp_path / "out")
    lines = [line for line in err.splitlines() if line.startswith("snpatch: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not out


def test_exp_list_describes_every_experiment(capsys):
    code, out, _ = run(capsys, "exp", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(NAMES)
    code, out, _ = run(capsys, "exp", "list", "--json")
    assert (code, list(json.loads(out))) == (0, list(NAMES))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "kuze"}\n')
    path = tmp_path / "experiment.toml"
    path.write_text(f"""
model = "{MODEL}"
template = "tulu"
recipients = ["sft"]
benchmarks = ["p"]
max_tokens = 3
contrast_tokens = 3
adapters = {{ sft = "{GOLDEN / "adapters/sft"}", dpo = ["{GOLDEN / "adapters/sft"}", "{GOLDEN / "adapters/dpo"}"] }}
judges = {{ cost = {{ source = "refusal" }} }}
sets = {{ p = {{ source = "p.jsonl" }} }}
[contrasts]
safety = {{ recipient = "sft", donor = "dpo", prompts = "p" }}
[settings.distribution]
k = 0.1
[settings.curve]
k = [0.1]
controls = 0
[settings.neuron_tokens]
neurons = 2
tokens = 2
""")
    return path


def test_failing_experiment_does_not_stop_others(capsys, config, tmp_path):
    out = tmp_path / "out"
    code, _, err = run(capsys, "exp", "stability", "distribution", "-c", config, "-o", out, "--backend", "transformers")
    assert code == 2
    assert "snpatch: stability: needs at least two training seeds in the experiment config, got none" in err
    assert "snpatch: error: 1 of 2 experiments failed: stability" in err
    assert (out / "distribution.csv").is_file()
    assert "## distribution" in (out / "report.md").read_text()
    assert not (out / "stability.csv").exists()


def test_wrong_receipt_stops_all_and_removes_tables(capsys, monkeypatch, config, tmp_path):
    def raise_receipt_error(*_, **__):
        raise ReceiptError("7 overwrites were done, 8 are implied")

    out = tmp_path / "out"
    monkeypatch.setattr(generation, "generate_missing", raise_receipt_error)
    names = "distribution", "curve", "neuron_tokens"
    code, _, err = run(capsys, "exp", *names, "-c", config, "-o", out, "--backend", "transformers")
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("snpatch: error: "))
    assert "curve: 7 overwrites were done, 8 are implied" in line
    assert "tables of this run were removed" in line
    assert {path.name for path in out.iterdir()} <= {"rankings", "sweep.sqlite"}, "words did not run"


def test_summary_contains_tables_of_one_config_and_its_settings(capsys, config, tmp_path):
    def exp(*arguments):
        code, _, err = run(capsys, "exp", *arguments, "-c", config, "-o", out, "--backend", "transformers")
        assert code == 0, err
        return err, list(json.loads((out / "report.json").read_text())), (out / "report.md").read_text()

    out, text = tmp_path / "out", config.read_text()
    assert exp("curve")[1] == ["curve"]
    assert exp("neuron_tokens")[1] == ["curve", "neuron_tokens"], "an earlier run's, of the same config"
    config.write_text(text.replace("neurons = 2", "neurons = 3"))
    err, names, markdown = exp("distribution")
    assert names == ["curve", "distribution"]
    assert "snpatch: neuron_tokens.json is left out of report.md: made with other settings" in err
    assert "- [neuron_tokens.json](neuron_tokens.json): made with other settings" in markdown
    assert exp("neuron_tokens")[1] == ["curve", "distribution", "neuron_tokens"]
    assert exp("neuron_tokens", "--set", "tokens=3")[1] == ["curve", "distribution", "neuron_tokens"]
    config.write_text(text.replace("contrast_tokens = 3", "contrast_tokens = 2"))
    assert exp("neuron_tokens")[1] == ["neuron_tokens"], "other rankings"
    config.write_text(text.replace("neurons = 2", "neurons = 3"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "kuze"}\n{"prompt": "kuze kuze"}\n')
    err, names, _ = exp("distribution")
    assert names == ["distribution"]
    assert "curve.json is left out of report.md: made with other sets" in err
    config.write_text(text.replace("sft", "one").replace("adapters/one", "adapters/sft"))
    err, names, _ = exp("neuron_tokens")
    assert names == ["neuron_tokens"]
    assert "curve.json is left out of report.md: of another config: model: expected one of " in err
    (out / "curve.json").write_text("nothing")
    assert exp("neuron_tokens")[1] == ["neuron_tokens"]


def test_shards_write_parts_that_the_sweep_merges(capsys, prompts, ranking, tmp_path):
    path, out, unsharded_out = write_sweep_file(tmp_path, prompts, ranking), tmp_path / "out", tmp_path / "alone"
    assert run(capsys, "sweep", path, "--trust-config", "-o", unsharded_out)[0] == 0
    counts = []
    for shard in ("1/2", "2/2"):
        code, out_text, err = run(capsys, "sweep", path, "--trust-config", "-o", out, "--shard", shard)
        assert code == 0, err
        counts.append(int(out_text.split()[1]))
    assert max(counts) - min(counts) <= 1
    code, _, err = run(capsys, "sweep", path, "--trust-config", "-o", out)
    assert code == 0, err
    assert f"merged {counts[1]} completions of sweep-2-of-2.sqlite" in err
    assert (out / "sweep.csv").read_bytes() == (unsharded_out / "sweep.csv").read_bytes()
    status = json.loads(run(capsys, "sweep", "status", out, "--json")[1])
    assert (status["done"], status["rate"] is not None) == (sum(counts), True)
    for invalid_shard in ("0/2", "3/2", "2"):
        code, _, err = run(capsys, "sweep", path, "--trust-config", "-o", out, "--shard", invalid_shard)
        assert (code, "--shard wants i/n with i in 1..n" in err) == (2, True)


def test_report_command_writes_page_of_a_sweep_folder(capsys, prompts, ranking, tmp_path):
    path, out = write_sweep_file(tmp_path, prompts, ranking, strengths=[1]), tmp_path / "out"
    code, _, err = run(capsys, "report", tmp_path)
    assert (code, "holds no table and no completions" in err) == (2, True)
    assert run(capsys, "sweep", path, "--trust-config", "-o", out)[0] == 0
    code, out_text, err = run(capsys, "report", out)
    assert code == 0, err
    assert out_text == f"wrote {out / 'report.html'}\n"
    text = (out / "report.html").read_text()
    for part in ("snpatch sweep", '"net_effect_low"', "application/json-gz", "Plotly"):
        assert part in text
    for table in out.glob("*.json"):
        table.unlink()
    assert run(capsys, "report", out)[0] == 0, "of a sweep that is not finished"


LIKE_DONOR = """
def share(prompts, completions):
    words = [[text.split() for text in texts] for texts in (completions, DONOR)]
    return [max(sum(a == b for a, b in zip(own, donor)) for donor in words[1]) / 4 for own in words[0]]
"""


def test_find_minimal_finds_the_k_of_the_complete_grid(capsys, prompts, ranking, tmp_path, monkeypatch):
    """The search samples all prompts of windows near the result; a later sweep reuses the completions."""
    texts = tmp_path / "dpo.jsonl"
    code, _, err = run(capsys, "generate", MODEL, prompts, *PAIR, "--recipient", "dpo", "--max-tokens", 4, "-o", texts)
    assert code == 0, err
    donor_texts = [json.loads(line)["completion"] for line in texts.read_text().splitlines()]
    (tmp_path / "like_donor.py").write_text(f"DONOR = {donor_texts!r}\n{LIKE_DONOR}")
    monkeypatch.syspath_prepend(tmp_path)
    common = [MODEL, prompts, *PAIR, "--ranking", f"safety={ranking}", "--donor", "dpo", "--recipient", "base",
              "--judge", "like_donor:share", "--max-tokens", 4, "-k", "0,50,100,200,300,500,800,1100,1408"]  # fmt: skip
    out = tmp_path / "out"
    code, out_text, err = run(
        capsys, "find-minimal", *common, "-o", out, "--target-effect", 0.5, "--blocks", 2, "--json"
    )
    assert code == 0, err
    rows = json.loads(out_text)["tables"]["minimal"]
    (smallest,) = [row["k"] for row in rows if row["is_answer"]]
    assert ("is the smallest k on the grid" in json.loads(out_text)["headline"][0]) != any(
        row["conflict"] for row in rows
    )
    assert {row["block"] for row in json.loads(out_text)["tables"]["minimal-blocks"]} <= {"layers 0-1", "layers 2-3"}
    code, out_text, err = run(capsys, "sweep", *common, "--controls", 0, "-o", out, "--json")
    assert code == 0, err
    sweep_rows = json.loads(out_text)["tables"]["sweep"]
    unpatched = {row["recipient"]: row["mean"] for row in sweep_rows if not row["ranking"]}
    gap = unpatched["dpo"] - unpatched["base"]
    effects = {row["rank_hi"]: (row["mean"] - unpatched["base"]) / gap for row in sweep_rows if row["ranking"]}
    assert effects[smallest] >= 0.5
    below = max((k for k in effects if k < smallest), default=None)
    assert below is None or effects[below] < 0.5
    for row in rows:
        if row["prompts"] == 12:
            assert row["effect"] == pytest.approx(effects[row["k"]])
    options = ["--no-monotone", "--score-range", 0, 1, "--target-effect", 0.5]
    code, out_text, err = run(capsys, "find-minimal", *common, *options, "-o", out, "--json")
    assert code == 0, err
    rows = json.loads(out_text)["tables"]["minimal"]
    (sure,) = [row["k"] for row in rows if row["is_answer"]]
    assert sure == min(k for k, effect in effects.items() if effect >= 0.5)
    assert {row["k"] for row in rows} >= {k for k in effects if k < sure}, "each smaller k is measured"
    code, _, err = run(capsys, "find-minimal", *common, "--strengths", "1,2", "-o", out)
    assert (code, "one donor, one strength and one sample" in err) == (2, True)


def test_replicas_without_ray_name_the_package_to_install(capsys, prompts, ranking, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "snpatch.experiments.replicas", raising=False)
    monkeypatch.delattr(snpatch.experiments, "replicas", raising=False)  # set by an earlier import
    path = write_sweep_file(tmp_path, prompts, ranking)
    code, _, err = run(capsys, "sweep", path, "--trust-config", "-o", tmp_path / "out", "--ray", 2)
    assert (code, "--ray: replicas need more packages: pip install 'ray>=" in err) == (2, True)
