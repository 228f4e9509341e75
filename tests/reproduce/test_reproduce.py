"""`snpatch reproduce`: presets, plans, steps, resuming, and the comparison with the paper."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run

from snpatch import experiments
from snpatch.data import DATASETS
from snpatch.demo import DEMO_MODEL
from snpatch.errors import SnpatchError
from snpatch.experiments.config import load_experiment_config
from snpatch.reproduce import paper, paper_comparison
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import PRESET_FOLDER, PRESET_NAMES, load_preset
from snpatch.reproduce.run_plan import plan_steps
from snpatch.reproduce.steps import Step, StepResult, Steps
from snpatch.training import trainer
from snpatch.training.settings import DpoSettings

TRAINED_PRESETS = ("llama2-7b", "mistral-7b", "gemma-7b", "qwen2.5-3b", "demo")
SMALL_PRESET = """
extends = "demo"
experiments = ["curve", "stability", "neuron_tokens"]

[training]
seeds = [42, 1]
objectives = []

[training.data]
sft = { source = "data/sft.jsonl", first = 64 }
safety = { source = "data/safety.jsonl", first = 64 }

[training.dpo]
epochs = 2

[config.settings.curve]
k = [0.0, 0.2]
controls = 1
"""
USE_ADAPTERS = [f"--use-adapter={name}={DEMO_MODEL / name}" for name in ("sft-1", "dpo-1")]
OPTIONS = ["--limit", "6", "--backend", "transformers", "--json"]


OWN_DATA_PRESET = """
[training.data.safety]
source = "pairs.jsonl"
column = "ask"
filter = ["kind", "x", "z"]
sample = 3
seed = 5

[training.dpo]
gradient_checkpointing = true
weight_decay_target = 1
weight_decay = 0.3
as_published = true
warmup_steps = 2
max_prompt_length = 99
lora_targets = ["k_proj", "o_proj"]
"""


@pytest.fixture
def small_preset(tmp_path):
    """Return a preset file with two trainings and three experiments on the demo model, and a new output folder."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL_PRESET)
    return path, tmp_path / "out"


def command(preset: Path, out: Path, *arguments: str) -> list[str]:
    return ["reproduce", "--model", str(preset), "--out", str(out), *USE_ADAPTERS, *OPTIONS, *arguments]


def steps_run(err: str) -> list[str]:
    """Return the steps that the log says were run, in order."""
    lines = [line.split("] ", 1)[1].split(": ", 1) for line in err.splitlines() if line.startswith("[")]
    return [name for name, state in lines if state != "done"]


def read_steps(out: Path) -> dict:
    return json.loads((out / "steps.json").read_text())


# Presets and plans


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_shipped_preset_loads(name, tmp_path):
    pipeline = Pipeline(load_preset(name), tmp_path / "out")
    config = pipeline.config
    usual = {"curve", "sliding_window", "transfer", "perplexity", "guard", "safeguard", "neuron_tokens"}
    assert usual <= pipeline.steps.steps.keys()
    assert set(config.recipients) <= {"base", *config.engine.sources}
    if name in TRAINED_PRESETS:
        assert pipeline.skipped.keys() == ({"competition"} if name == "demo" else set())
        assert len(config.seeds) == len(load_preset(name).training.seeds) >= 3
        dpo = config.engine.adapters["dpo"]
        assert [Path(part).name for part in dpo] == ["sft-42", "dpo-42"]
    else:
        assert config.engine.secondary is not None
        assert not pipeline.trainings
    assert not (tmp_path / "out").exists()


def test_every_preset_file_is_listed():
    assert {path.stem for path in PRESET_FOLDER.glob("*.toml")} == {*PRESET_NAMES, "common", "paper", "public"}


def test_llama_preset_matches_paper():
    preset = load_preset("llama2-7b")
    training = preset.training
    assert training.seeds == (42, 1, 66, 88, 3407)
    assert training.objectives == (
        "helpful", "harmless-helpful", "shp", "reasoning", "stack-exchange", "reward-bench-safety",
    )  # fmt: skip
    assert training.dpo == DpoSettings(micro_batch_size=5, as_published=True)
    assert (training.data["sft"].source, training.data["safety"].source) == ("sharegpt", "hh-harmless")
    assert all(rows.source in DATASETS and rows.split in ("train", "filtered") for rows in training.data.values())
    config = preset.config
    assert (config["max_tokens"], config["contrast_tokens"], config["recipients"]) == (128, 256, ["sft", "base"])
    for name in (*config["benchmarks"], "contrast", "helpful"):
        assert (config["sets"][name]["sample"], config["sets"][name]["seed"]) == (200, 42)
    assert config["sets"]["beavertails"]["last"] == 600
    guards = {name: rows for name, rows in config["sets"].items() if name.startswith("guard-")}
    assert {rows["source"] for rows in guards.values()} == {
        "hh-harmless", "beavertails", "red-team-attempts", "harmbench", "jailbreak-llms",
    }  # fmt: skip
    assert guards.pop("guard-harmless") == {"source": "hh-harmless", "split": "train", "sample": 5000, "seed": 42}
    assert all(rows.keys() == {"source"} for rows in guards.values()), "whole sets"
    tasks = {name: (task.num_fewshot, task.limit) for name, task in preset.ability.tasks.items()}
    assert tasks == {
        "gsm8k_cot": (8, 200), "bbh_cot_fewshot": (3, 40), "mmlu": (0, None), "truthfulqa_mc1": (0, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_dry_run_writes_and_downloads_nothing(capsys, tmp_path, name):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "reproduce", "--model", name, "--out", out, "--dry-run", "--json")
    plan = json.loads(text)
    assert code == 0
    assert not out.exists()
    assert [row["step"] for row in plan["steps"]][-1] == "total"
    assert plan["commands"].keys() == {row["step"] for row in plan["steps"][:-1]}
    downloads = {row["download"] for row in plan["downloads"]}
    assert (downloads == set()) == (name == "demo")
    assert load_preset(name).config["model"] in downloads or name == "demo"


def test_dry_run_prints_totals(capsys, tmp_path):
    code, text, _ = run(capsys, "reproduce", "--model", "llama2-7b", "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "GPU hours" in text
    assert "total" in text
    assert "PKU-Alignment/beaver-7b-v1.0-cost" in text


def test_training_hours_are_modeled_from_sizes(tmp_path):
    """Hours are tokens x passes x 2 x parameters / rate; DPO has one more pass, for its reference."""
    pipeline = Pipeline(load_preset("llama2-7b"), tmp_path / "out")
    hours = {row[0]: row[2] for row in plan_steps(pipeline).rows}
    flops = 94_145 * 1_300 * 3 * 3 * 2 * 6_738_415_616
    assert float(hours["sft-42"]) == pytest.approx(flops / (0.4 * 989e12) / 3600, abs=0.006)
    flops = 42_537 * 400 * 3 * 4 * 2 * 6_738_415_616
    assert float(hours["dpo-42"]) == pytest.approx(flops / (0.4 * 989e12) / 3600, abs=0.006)
    assert hours["stack-exchange"] == "?"


def test_training_hours_use_measured_rate(tmp_path):
    """SFT at 9000 tokens/s on two GPUs gives DPO 6750, with four passes instead of three."""
    out = tmp_path / "out"
    (out / "adapters" / "sft-42").mkdir(parents=True)
    record = {"provenance": {"figures": {"tokens_per_s": 9000.0, "processes": 2, "resumed_at": 0}}}
    (out / "adapters" / "sft-42" / "training.json").write_text(json.dumps(record))
    (out / "steps.json").write_text(json.dumps({"sft-42": {"started_with": {}, "outputs": {}, "inputs": {}}}))
    row = next(row for row in plan_steps(Pipeline(load_preset("llama2-7b"), out)).rows if row[0] == "dpo-42")
    assert row[4] == "measured: 6750 tokens/s, by sft-42, 2 processes"
    assert float(row[2]) == pytest.approx(2 * 42_537 * 400 * 3 / 6750 / 3600, abs=0.006)  # GPU hours, not wall time


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titel = 'x'", "expected extends, title, .* got titel"),
        ("extends = 'nothing'", "extends: expected a shipped preset, got 'nothing'"),
        ("x = [", "not a TOML file"),
        ("[config]\nmodel = 'm'", r"expected \[training\], or config\.contrasts"),
        ("extends = 'paper'", "config.model is missing"),
        ("extends = 'demo'\nexperiments = ['curves']", "experiment: expected one of curve"),
        ("extends = 'demo'\n[training]\nseeds = [1, 1]", "training.seeds: expected one or more different seeds"),
        (
            "extends = 'demo'\n[training]\nobjectives = ['safety']",
            "training.objectives: expected different objectives besides safety",
        ),
        ("extends = 'demo'\n[training]\nsead = 1", "training: expected seeds, .* got sead"),
        (
            "extends = 'demo'\n[training.data]\nhelpfull = { source = 'x' }",
            "training.data: expected sft, safety, .* got helpfull",
        ),
        (
            "extends = 'demo'\n[training]\ndpo = { as_published = false }\nsettings = { method = 'lora' }",
            "training.settings: expected method = ia3, got lora",
        ),
        (
            "extends = 'paper'\n[config]\nmodel = 'm'\n[training]\nobjectives = ['kind']",
            "objective: expected one of safety, helpful",
        ),
        ("extends = 'demo'\n[config]\nfrom_nowhere = 1", "unknown key from_nowhere"),
        ("from_config = 'moon'", "from_config: expected demo, got 'moon'"),
        ("from_config = ['a']", "from_config: expected demo"),
        ("config = 3", "config: expected a table, got 3"),
        ("training = 1", "training: expected a table, got 1"),
        ("extends = 'demo'\nsize = 3", "size: expected a table, got 3"),
        ("extends = 'demo'\n[training]\nsettings = 3", "settings: expected a table, got 3"),
        (
            "extends = 'demo'\n[training]\nobjectives = 'helpfull'\ngenerated_by = 'x'",
            "generated_by: expected demo, got 'x'",
        ),
        ("extends = 'demo'\n[config]\nsets = 3", "sets: expected a table, got 3"),
        ("extends = 'demo'\n[config.judges]\ncost = 'x'", "judges.cost: expected a table with source"),
        ("extends = 'demo'\n[config.settings]\ncurve = 3", "curve: expected a table, got 3"),
        ("extends = 'demo'\n[config.settings.guard]\nkk = 1", "settings of guard: unknown key kk"),
        ("extends = 'demo'\n[config.settings.cruve]\nk = 1", "experiment: expected .*, got 'cruve'"),
        ("extends = 'demo'\n[config.adapters]\nx = 'y'", r"config\.adapters: follows from \[training\]"),
        (
            "extends = 'demo'\n[training]\nobjectives = ['curve']",
            "expected file names that are no model or step, got 'curve'",
        ),
        (
            "extends = 'llama2-7b'\npublished = 'llama-2'",
            "published: expected one of llama2-7b, mistral-7b, gemma-7b, qwen2.5-3b, got 'llama-2'",
        ),
    ],
)
def test_invalid_preset_raises(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SnpatchError, match=message):
        Pipeline(load_preset(str(path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama"], "preset: expected one of llama2-7b"),
        (
            ["--model", "demo", "--use-adapter", "dpo-2=x"],
            "--use-adapter: expected an adapter of this preset (sft-42, dpo-42",
        ),
        (["--model", "demo", "--use-adapter", "dpo-42=nowhere"], "--use-adapter dpo-42: expected a folder, got "),
        (["--model", "demo", "--use-adapter", "dpo-42"], "--use-adapter: expected name=folder"),
        (
            ["--model", "demo", "--launcher", "acelerate launch"],
            "--launcher: expected a program on PATH, got acelerate",
        ),
        (
            ["--model", "demo", "--template", "tokenizer"],
            "template: expected tulu, with which sft-42 is trained, got tokenizer",
        ),
        (["--model", "demo", "--only", "curves"], "step: expected one of rows, sft-42"),
        (["--model", "demo", "--start-at", "x"], "judge_agreement, got 'x'"),
        (
            ["--model", "demo", "--only", "curve", "--start-at", "curve"],
            "--start-at: expected no --only with --start-at",
        ),
        (["--model", "qwen3-4b-saferl", "--seed", "1"], "seeds: expected a preset with trainings"),
    ],
)
def test_invalid_arguments_are_one_line(capsys, tmp_path, arguments, message):
    code, _, err = run(capsys, "reproduce", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_train_command_has_all_settings(capsys, tmp_path, monkeypatch):
    """Parsed by `snpatch train`, the command gives the same settings and rows."""
    path = tmp_path / "mine.toml"
    rows = "".join(
        json.dumps({"ask": f"q{i}", "chosen": "a", "rejected": "b", "kind": "xy"[i % 2]}) + "\n" for i in range(9)
    )
    (tmp_path / "pairs.jsonl").write_text(rows)
    path.write_text(SMALL_PRESET.split("[training.data]")[0] + OWN_DATA_PRESET)
    preset = load_preset(str(path))
    pipeline = Pipeline(preset, tmp_path / "out")
    calls = []
    monkeypatch.setattr(trainer, "train_dpo", lambda *arguments, **_: calls.append(arguments) or {"steps": 1})
    command = shlex.split(pipeline.steps.steps["dpo-1"].command)
    code, _, err = run(capsys, *command[3:], "--json")
    assert code == 0, err
    ((model, sft, pairs, out, settings),) = calls
    assert (Path(model), Path(out)) == (DEMO_MODEL / "base", tmp_path / "out" / "adapters" / "dpo-1")
    assert sft == tmp_path / "out" / "adapters" / "sft-1"
    assert settings == pipeline.trainings["dpo-1"].settings
    assert settings.seed == 1
    assert sorted(row["prompt"][0]["content"] for row in pairs) == sorted(
        chat[0]["content"] for chat in preset.training.data["safety"].read(tmp_path).prompts
    )
    assert len(pairs) == 3


# Steps


class FakePipeline:
    """Three steps: `sft` reads `rows`; `dpo` reads `pairs`; `curve` reads the output of `sft`, and `prompts`, which it
    reports only after it has run.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.values, self.log = out, {"rows": "1", "pairs": "1", "prompts": "1", "unused": "1"}, []
        out.mkdir(exist_ok=True)
        self.steps = self.open_steps()

    def open_steps(self) -> Steps:
        steps = [
            Step("sft", lambda: self.write("sft"), "train sft", ("rows",), self.out / "sft"),
            Step("dpo", lambda: self.write("dpo"), "train dpo", ("pairs",), self.out / "dpo"),
            Step("curve", lambda: self.write("curve", ["prompts", "sft"]), "exp curve"),
        ]
        return Steps(self.out, steps, self.fingerprint)

    def fingerprint(self, name: str) -> str:
        if name == "sft":
            return (self.out / "sft" / "file").read_text()
        return self.values[name]

    def write(self, name: str, inputs=()) -> StepResult:
        self.log.append(name)
        (self.out / name).mkdir(exist_ok=True)
        (self.out / name / "file").write_text(f"{name} of {self.values}" if name != "curve" else "curve")
        return StepResult(inputs, [self.out / name])

    def run(self) -> list[str]:
        self.log = []
        for name in self.steps.steps:
            if self.steps.reason(name):
                self.steps.run(name)
        return self.log


def test_finished_steps_are_skipped(tmp_path):
    fake = FakePipeline(tmp_path / "out")
    assert fake.run() == ["sft", "dpo", "curve"]
    assert fake.run() == []
    fake.steps = fake.open_steps()
    assert fake.run() == []


def test_changed_input_reruns_dependents_only(tmp_path):
    fake = FakePipeline(tmp_path / "out")
    fake.run()
    fake.values["unused"] = "2"
    assert fake.run() == []
    fake.values["prompts"] = "2"
    assert fake.steps.reason("curve") == "input prompts changed"
    assert fake.run() == ["curve"]
    fake.values["pairs"] = "2"
    assert fake.run() == ["dpo"]  # the curve does not read dpo
    fake.values["rows"] = "2"
    assert fake.run() == ["sft", "curve"]


def test_step_with_missing_or_modified_output_reruns(tmp_path):
    fake = FakePipeline(tmp_path / "out")
    fake.run()
    (tmp_path / "out" / "dpo" / "file").write_text("cold")
    assert "output dpo was modified" in fake.steps.reason("dpo")
    assert fake.run() == ["dpo"]
    (tmp_path / "out" / "curve" / "file").unlink()
    assert fake.run() == ["curve"]


def test_replaced_outputs_are_archived(tmp_path):
    fake = FakePipeline(tmp_path / "out")
    fake.run()
    before = (tmp_path / "out" / "sft" / "file").read_text()
    fake.values["rows"] = "2"
    fake.run()
    assert (tmp_path / "out" / "replaced" / "sft-1" / "sft" / "file").read_text() == before
    fake.values["rows"] = "3"
    fake.run()
    assert (tmp_path / "out" / "replaced" / "sft-2" / "sft" / "file").exists()


def test_interrupted_step_resumes_unless_its_input_changed(tmp_path):
    fake = FakePipeline(tmp_path / "out")

    def interrupt():
        (tmp_path / "out" / "sft").mkdir()
        (tmp_path / "out" / "sft" / "partial").touch()
        raise KeyboardInterrupt

    fake.steps.steps["sft"] = Step("sft", interrupt, "train sft", ("rows",), tmp_path / "out" / "sft")
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    fake.steps = fake.open_steps()
    assert fake.steps.reason("sft") == "interrupted"
    fake.steps.run("sft")
    assert (tmp_path / "out" / "sft" / "partial").exists()
    assert fake.steps.reason("sft") is None
    (tmp_path / "out" / "steps.json").write_text(json.dumps({"sft": {"started_with": {"rows": "0"}}}))
    fake.steps = fake.open_steps()
    fake.steps.run("sft")
    assert not (tmp_path / "out" / "sft" / "partial").exists()


def test_damaged_output_is_archived_before_the_rerun(tmp_path):
    """A training that finds its own record in the folder would consider itself done."""
    fake = FakePipeline(tmp_path / "out")
    fake.run()
    (tmp_path / "out" / "sft" / "file").unlink()
    (tmp_path / "out" / "sft" / "record").touch()
    assert fake.run() == ["sft"]
    assert not (tmp_path / "out" / "sft" / "record").exists()


def test_input_that_changes_during_the_run_fails_the_step(tmp_path):
    fake = FakePipeline(tmp_path / "out")

    def change_input():
        result = fake.write("sft")
        fake.values["rows"] = "2"
        return result

    fake.steps.steps["sft"] = Step("sft", change_input, "train sft", ("rows",), tmp_path / "out" / "sft")
    with pytest.raises(SnpatchError, match="input rows changed while sft ran"):
        fake.run()
    fake.steps = fake.open_steps()
    assert fake.run() == ["sft", "dpo", "curve"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "expected JSON"), ("[]", "expected an object of steps"), ('{"sft": 3}', "expected an object of steps")],
)
def test_broken_steps_file_raises(tmp_path, text, message):
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(SnpatchError, match=f"steps.json: {message}"):
        Steps(tmp_path, [], str)


def test_output_of_changed_input_is_outdated(tmp_path):
    fake = FakePipeline(tmp_path / "out")
    fake.run()
    assert fake.steps.outdated_steps == []
    fake.values["prompts"] = "2"
    assert fake.steps.outdated_steps == ["curve"]
    fake.steps.archive("curve")
    assert fake.steps.outdated_steps == []
    assert (tmp_path / "out" / "replaced" / "curve-1" / "curve" / "file").exists()


# The paper's numbers


# Copied from the paper's notes as they print it, to check the numbers in another form than published.toml's.
PRINTED_COSTS = """
| llama2-7b | base / base+ | 2.2 / -5.7 | 5.7 / -5.7 | 8.0 / -3.9 | 1.1 / -7.9 | 5.1 / 5.6 |
| | sft / sft+ | -2.4 / -11.9 | -2.9 / -11.9 | 5.0 / -7.2 | 4.0 / -6.6 | 5.4 / 5.4 |
| | dpo | -11.8 | -11.8 | -11.0 | -10.5 | 5.5 |
| mistral-7b | base / base+ | -1.6 / -10.0 | -4.8 / -10.2 | -1.1 / -7.8 | 3.2 / -8.5 | 4.9 / 5.1 |
| | sft / sft+ | -7.6 / -12.9 | -7.3 / -12.2 | 3.7 / -3.6 | 0.2 / -6.1 | 5.2 / 5.3 |
| | dpo | -13.5 | -13.4 | -6.1 | -8.2 | 5.3 |
| gemma-7b | base / base+ | 1.1 / -10.3 | 0.4 / -9.5 | 7.8 / -4.8 | 1.1 / -7.1 | 6.6 / 7.0 |
| | sft / sft+ | -8.2 / -13.4 | -9.8 / -13.4 | 1.0 / -9.2 | -1.6 / -9.6 | 7.5 / 7.6 |
| | dpo | -13.6 | -14.1 | -11.9 | -10.6 | 7.9 |
| qwen2.5-3b | base / base+ | 0.9 / -12.0 | -1.3 / -12.4 | 3.7 / -8.1 | 6.9 / -8.8 | 7.6 / 7.9 |
| | sft / sft+ | -10.9 / -13.3 | -9.9 / -13.3 | -2.8 / -8.2 | -2.3 / -8.7 | 7.9 / 7.9 |
| | dpo | -13.8 | -14.1 | -10.7 | -10.0 | 8.0 |
"""
PRINTED_TAX = """
safety DPO <- helpfulness DPO | +7.3, +7.97 | +6.6, +8.1 | +4.4, +1.2 | +2.9, +1.9
helpfulness DPO <- safety DPO | -10.1, -2.3 | -10.7, -1.0 | -8.9, -2.5 | -5.1, -2.9
"""


def test_published_costs_equal_the_printed_table():
    printed, model = {}, ""
    for line in PRINTED_COSTS.strip().splitlines():
        name, rows, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        model = name or model
        columns = [list(map(float, cell.split("/"))) for cell in cells]
        for index, row in enumerate(rows.split(" / ")):
            printed.setdefault(model, {})[row] = [values[index] for values in columns]
    costs = paper.read_numbers()["costs"]
    assert {model: costs[model] for model in paper.list_models()} == printed
    assert (len(printed), costs["table"]) == (4, "Table 8")


def test_published_effects_follow_from_the_costs():
    """Eq. 4 of costs with one decimal is an interval, and each percentage of Table 1 rounds a number in it."""
    numbers = paper.read_numbers()
    effects, costs, baselines = numbers["effects"], numbers["costs"]["llama2-7b"], numbers["baselines"]
    num_checked = 0
    for recipient in ("base", "sft"):
        patched = {"safety": costs[f"{recipient}+"][:4], **baselines[recipient]}
        assert patched.keys() == effects[recipient].keys()
        for method, percents in effects[recipient].items():
            rows = zip(costs[recipient][:4], patched[method], costs["dpo"][:4], percents, strict=True)
            for before, after, donor, percent in rows:
                corners = [
                    (after + a - before - b) / (donor + d - before - b)
                    for a, b, d in itertools.product((-0.05, 0.05), repeat=3)
                ]
                assert 100 * min(corners) - 0.5 <= percent <= 100 * max(corners) + 0.5, (recipient, method)
                num_checked += 1
    assert num_checked == 24


def test_published_tax_has_the_signs_of_its_directions():
    """The donor's ability rises and the recipient's own falls, in each model and direction."""
    tax = paper.read_numbers()["alignment_tax"]
    assert tax["table"] == "Table 3"
    directions = {
        "safety DPO <- helpfulness DPO": "helpful-to-safe",
        "helpfulness DPO <- safety DPO": "safe-to-helpful",
    }
    for line in PRINTED_TAX.strip().splitlines():
        label, *cells = [cell.strip() for cell in line.split("|")]
        for model, cell in zip(paper.list_models(), cells, strict=True):
            cost, reward = map(float, cell.split(","))
            assert tax[model][directions[label]] == {"cost": cost, "reward": reward}
            assert (cost > 0) == (reward > 0) == (directions[label] == "helpful-to-safe")
    objectives = {"helpful-to-safe": ("helpful", "safety"), "safe-to-helpful": ("safety", "helpful")}
    assert objectives == paper_comparison.TAX_DIRECTIONS


def test_published_share_is_that_of_20000_neurons():
    """All neurons of a model: layers x intermediate size."""
    neurons = {"llama2-7b": 32 * 11008, "mistral-7b": 32 * 14336, "gemma-7b": 28 * 24576, "qwen2.5-3b": 36 * 11008}
    shares = {model: round(20_000 / n, 3) for model, n in neurons.items()}
    assert paper.read_numbers()["share"] == shares


def test_every_published_group_names_its_table():
    numbers = paper.read_numbers()
    groups = {name: group for name, group in numbers.items() if name not in ("share", "deviations", "finding")}
    assert all(group["table"] for group in (*groups.values(), *numbers["finding"].values()))
    assert all(texts and all(map(str.strip, texts)) for texts in numbers["deviations"].values())
    assert numbers["deviations"].keys() <= {*experiments.NAMES, "all", "ability"}


def write_tables(out: Path, config) -> None:
    """Write tables of experiments with a few made-up figures."""
    columns = {name: 0.5 for name in config.benchmarks} | {"perplexity": 6.0}
    effects = {f"effect on {name}": 0.8 for name in config.benchmarks}
    models = ["base", "base+", "sft", "sft+", config.donor]
    point = {"ranking": "safety", "rank_lo": 0, "set": "b"}
    tables = {
        "transfer-table": [{"model": m, **columns, **(effects if m.endswith("+") else {})} for m in models],
        "curve": [
            {
                **point,
                "recipient": recipient,
                "judge": judge,
                "control": None if seed is None else "per_layer",
                "control_seed": seed,
                "neuron_fraction": share,
                "effect": effect,
            }
            for recipient, judge, seed, share, effect in (
                ("sft", "cost", None, 0.03, 0.2),
                ("sft", "cost", None, 0.06, 0.7),
                ("sft", "cost", None, 0.2, 0.9),
                ("sft", "cost", 1, 0.057, 0.0),
                ("sft", "reward", None, 0.057, 0.1),
                ("base", "cost", None, 0.057, 0.3),
            )
        ],
        "stability": [
            {"a": "42", "b": b, "k": k, "overlap": o, "chance": k / 341_248, "spearman": o + 0.01}
            for b, k, o in (("1", 20_000, 0.97), ("66", 20_000, 0.91), ("66", 3_412, 0.5))
        ],
        "guard-summary": [
            {"features": "safety", "k": 10, "accuracy": 0.6},
            {"features": "safety", "k": 1500, "accuracy": 0.75},
            {"features": "random 1", "k": 1500, "accuracy": 0.9},
        ],
        "alignment_tax": [
            {"donor": "helpful", "recipient": "dpo", "set": "beavertails", "judge": "cost", "change": 5.0},
            {"donor": "dpo", "recipient": "helpful", "set": "beavertails", "judge": "cost", "change": -9.0},
        ],
        "distribution": [
            {"layer": 0, "skewness": 1.0, "above 0.1": 0.5},
            {"layer": "all", "skewness": 6.0, "above 0.1": 0.25},
        ],
        "judge_agreement": [{"completions": "all", "pearson": 0.5}],
        "competition": [{"set": "redteam", "recipient_mean": 3.0, "patched": -2.0, "donor_mean": -3.0}],
        "ability-sft-patched": [{"model": "sft+", "task": "mmlu", "value": 0.4}],
    }
    out.mkdir()
    for stem, rows in tables.items():
        (out / f"{stem}.json").write_text(json.dumps({"rows": rows}))


FINISHED = [
    "transfer", "curve", "stability", "guard", "alignment_tax", "distribution", "judge_agreement", "competition",
    "ability-sft-patched",
]  # fmt: skip


def compare(source, out: Path, **options) -> list[dict]:
    pipeline = Pipeline(load_preset(str(source)), out, **options)
    write_tables(out, pipeline.config)
    return paper_comparison.compare_with_paper(pipeline, FINISHED)


def test_comparison_has_measured_and_published_numbers(tmp_path):
    rows = compare("llama2-7b", tmp_path / "out")

    def row(quantity: str, model: str, prompt_set: str = "") -> dict:
        (match,) = [r for r in rows if (r["what"], r["model"]) == (quantity, model) and r["set"].startswith(prompt_set)]
        return match

    cost = row("mean cost", "sft+", "harmbench")
    assert (cost["published"], cost["measured"], cost["table"]) == (-7.2, 0.5, "Table 8")
    assert cost["difference"] == pytest.approx(7.7)
    assert row("mean cost", "dpo", "redteam")["measured"] == 0.5
    effect = row("effect (Eq. 4)", "base+", "beavertails")
    assert (effect["published"], effect["measured"], effect["table"]) == (0.56, 0.8, "Table 1")
    curves = {r["model"]: r for r in rows if r["what"].startswith("share of the safety gain that 5.7%")}
    assert (curves["sft"]["published"], curves["sft"]["measured"], curves["sft"]["set"]) == (1.01, 0.7, "b, 6.0%")
    assert (curves["base"]["published"], curves["base"]["measured"]) == (0.56, 0.3)
    (overlap,) = [r for r in rows if r["what"].startswith("overlap")]
    assert (overlap["bound"], overlap["published"], overlap["measured"]) == ("at least", 0.95, 0.91)
    (guard,) = [r for r in rows if r["what"].startswith("mean accuracy")]
    assert (guard["published"], guard["bound"], guard["measured"], guard["difference"]) == (0.762, "", 0.75, None)
    tax = row("change of mean cost", "helpful to safe", "beavertails")
    assert (tax["published"], tax["measured"], tax["table"], tax["difference"]) == (7.3, 5.0, "Table 3", None)
    assert row("change of mean cost", "safe to helpful", "beavertails")["measured"] == -9.0
    assert row("change of mean reward", "safe to helpful", "beavertails")["measured"] is None
    assert row("skewness of the change scores", "")["difference"] == pytest.approx(6.0 - 6.99)
    assert row("mean cost, competition", "patched", "redteam")["published"] == -11.09
    assert row("accuracy", "sft+", "mmlu")["measured"] == 0.4
    baseline = row("effect (Eq. 4), first 5 % by sn-tune", "sft", "redteam")
    assert (baseline["published"], baseline["measured"]) == (0.3, None)
    assert {r["difference"] for r in rows if r["measured"] is None} == {None}


def test_difference_is_left_out_where_the_protocol_deviates(tmp_path):
    rows = [row for row in compare("llama2-7b", tmp_path / "out") if row["measured"] is not None]
    compared = {row["what"].partition(",")[0] for row in rows if row["difference"] is not None}
    assert compared == {
        "mean cost",
        "perplexity",
        "effect (Eq. 4)",
        "share of the safety gain that 5.7% of the neurons recover",
        "overlap of the first 20000 neurons of two training seeds",
        "Spearman correlation over the common ones",
        "skewness of the change scores",
        "fraction of the ranked neurons with a change score above 0.1",
    }
    others = {row["table"] for row in rows if row["difference"] is None}
    assert others == {"text, safeguard", "Table 3", "text, E.1", "Table 10, E.4", "Table 8"}, "Table 8: ability"


def test_number_of_another_model_has_no_difference(tmp_path):
    """Table 8 has numbers of Mistral; those of the text are Llama2's."""
    rows = [row for row in compare("mistral-7b", tmp_path / "out") if row["measured"] is not None]
    assert {"mistral-7b", "llama2-7b"} <= {row["published_of"] for row in rows}
    assert {row["published_of"] for row in rows if row["difference"] is not None} == {"mistral-7b"}
    effect = next(row for row in rows if (row["what"], row["model"]) == ("effect (Eq. 4)", "sft+"))
    assert effect["published"] == pytest.approx((-12.9 + 7.6) / (-13.5 + 7.6))
    assert effect["table"] == "Table 8, Eq. 4"


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ("", []),
        ("[training]\nseeds = [7, 8]\nobjectives = []", []),
        ("[config.sets]\nharmbench = { source = 'harmbench', first = 10 }", ["sets"]),
        ("[config.judges]\ncost = { source = 'refusal' }", ["judges"]),
        ("[config]\nmodel = 'other'", ["model"]),
        ("[config.settings.transfer]\nk = 10", ["settings"]),
        ("[training.settings]\nepochs = 1.0", ["training"]),
        ("[ability]\ntasks = {}", ["ability"]),
    ],
)
def test_difference_is_computed_for_the_shipped_preset_only(tmp_path, change, differences):
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = 'llama2-7b'\n{change}")
    assert paper_comparison.list_differences(Pipeline(load_preset(str(path)), tmp_path / "o")) == differences
    rows = compare(path, tmp_path / "out")
    assert all(row["difference"] is None for row in rows) == bool(differences)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"limit": 6}, "limit"),
        ({"skip_invalid": True}, "skip_invalid"),
        ({"dtype": "float32"}, "engine"),
        ({"provided_adapters": {"sft-42": str(DEMO_MODEL / "sft")}}, "provided adapters"),
    ],
)
def test_other_options_are_listed_as_difference(tmp_path, options, difference):
    assert paper_comparison.list_differences(Pipeline(load_preset("llama2-7b"), tmp_path / "o", **options)) == [
        difference
    ]
    assert {row["difference"] for row in compare("llama2-7b", tmp_path / "out", **options)} == {None}


def test_public_pair_is_compared_with_the_independent_run(tmp_path):
    pipeline = Pipeline(load_preset("tulu-2-7b"), tmp_path / "out")
    write_tables(tmp_path / "out", pipeline.config)
    rows = paper_comparison.compare_with_paper(pipeline, ["curve"])
    assert [(row["published"], row["measured"], row["difference"]) for row in rows] == [
        (0.19, 0.3, None),
        (0.88, 0.3, None),
    ]
    assert all("full fine-tune" in row["published_of"] for row in rows)


# Inputs of steps


def fingerprints(source, out: Path, names, **options) -> list[str]:
    pipeline = Pipeline(load_preset(str(source)), out, **options)
    return [pipeline.inputs.fingerprint(name) for name in names]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"template": "auto"}, {"quantization": "fp8"}])
def test_engine_option_that_changes_results_changes_fingerprint(tmp_path, options):
    assert fingerprints("demo", tmp_path, ["engine"]) != fingerprints("demo", tmp_path, ["engine"], **options)


@pytest.mark.parametrize("options", [{"backend": "transformers"}, {"max_num_seqs": 7}, {"gpu_memory_utilization": 0.5}])
def test_engine_option_without_effect_keeps_fingerprint(tmp_path, options):
    assert fingerprints("demo", tmp_path, ["engine"]) == fingerprints("demo", tmp_path, ["engine"], **options)


def test_inputs_have_content_hashes(tmp_path):
    """Fingerprints of judges, models with tokenizers, datasets and generated rows change with their content only."""
    config = tmp_path / "models"
    shutil.copytree(DEMO_MODEL, config)
    (tmp_path / "judge_of_mine.py").write_text("def by(prompts, completions): return [0.0 for _ in prompts]\n")
    path = tmp_path / "mine.toml"

    def read_all(text: str = "", **options) -> dict[str, str]:
        judges = "[config.judges]\ncost = { source = 'models/cost' }\nmine = { source = 'judge_of_mine:by' }\n"
        path.write_text(f"extends = 'demo'\n[config]\nmodel = 'models/base'\n{judges}{text}")
        pipeline = Pipeline(load_preset(str(path), trust=True), tmp_path / "out", **options)
        names = ["model/base", "judge/cost", "judge/mine", "set/contrast", "judges", "cost", "generator", "benchmarks"]
        return {name: pipeline.inputs.fingerprint(name) for name in names}

    def diff_keys(before: dict, after: dict) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    sys.path.insert(0, str(tmp_path))
    try:
        first = read_all()
        assert read_all() == first
        with open(config / "base" / "tokenizer_config.json", "a") as file:
            file.write(" ")
        second = read_all()
        assert diff_keys(first, second) == {"model/base"}
        (tmp_path / "judge_of_mine.py").write_text("def by(prompts, completions): return [1.0 for _ in prompts]\n")
        third = read_all()
        assert diff_keys(second, third) == {"judge/mine"}
        assert diff_keys(third, read_all("more = { source = 'refusal' }")) == {"judges"}
        assert diff_keys(third, read_all(limit=3)) == {"set/contrast"}
        assert diff_keys(third, read_all("[training]\nobjectives = ['helpful']")) == {"generator"}
    finally:
        sys.path.remove(str(tmp_path))


def test_removed_preset_input_reruns_dependents(tmp_path):
    pipeline = Pipeline(load_preset("demo"), tmp_path / "out")
    with pytest.raises(SnpatchError, match="unknown to this version of snpatch"):
        pipeline.inputs.fingerprint("spice/pepper")
    for name in ("set/gone", "judge/gone", "model/gone", "training/gone", "contrast/seeds/9"):
        with pytest.raises(SnpatchError, match="removed from the preset"):
            pipeline.inputs.fingerprint(name)


def test_current_folder_does_not_shadow_names_of_a_preset(tmp_path, monkeypatch):
    (tmp_path / "harmbench").mkdir()
    (tmp_path / "meta-llama" / "Llama-2-7b-hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_preset("llama2-7b").config
    assert config["sets"]["harmbench"]["source"] == "harmbench"
    assert config["model"] == "meta-llama/Llama-2-7b-hf"


def test_paths_in_preset_file_are_relative_to_its_folder(tmp_path):
    for name in ("ia3", "lora", "checkpoint", "m"):
        (tmp_path / "here" / name).mkdir(parents=True)
    path = tmp_path / "here" / "mine.toml"
    path.write_text(
        "extends = 'public'\n[config]\nmodel = 'm'\nadapters = { sft = ['ia3'] }\n"
        "models = { dpo = { lora = ['lora'], adapters = ['ia3'] } }\n"
        "contrasts = { safety = { recipient = 'sft', donor = 'dpo' } }\n"
    )
    engine = Pipeline(load_preset(str(path)), tmp_path / "out").config.engine
    folder = tmp_path / "here"
    assert engine.model == str(folder / "m")
    assert engine.adapters == {"sft": (str(folder / "ia3"),)}
    assert (engine.models["dpo"].lora, engine.models["dpo"].adapters) == (
        (str(folder / "lora"),),
        (str(folder / "ia3"),),
    )


def test_extending_preset_replaces_models_and_judges_whole(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "extends = 'qwen3-4b-saferl'\n[config]\nmodels = { other = 'x/y' }\n"
        "contrasts = { safety = { recipient = 'base', donor = 'other' } }\n"
        "[config.judges]\ncost = { source = 'refusal' }\n"
        "[config.sets]\nharmbench = { source = 'harmbench', sample = 3 }\n[config.settings.curve]\ncontrols = 1\n"
    )
    config = load_preset(str(path)).config
    assert config["models"] == {"other": "x/y"}
    assert config["judges"]["cost"] == {"source": "refusal"}
    assert "reward" in config["judges"]
    assert config["sets"]["harmbench"] == {"source": "harmbench", "sample": 3}
    assert Pipeline(load_preset(str(path)), tmp_path / "out").config.engine.secondary.checkpoint == "x/y"


def test_resume_rejects_different_options(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "options.json").write_text(json.dumps({"model": "demo", "use_adapter": {"dpo-42": "x"}, "limit": 5}))
    code, _, err = run(capsys, "reproduce", "--model", "demo", "--out", out, "--limit", "5")
    assert code == 2
    assert "expected use_adapter = {'dpo-42': 'x'}, with which it was made, got {}" in err
    assert not (out / "steps.json").exists()


def test_broken_options_file_is_one_line(capsys, tmp_path):
    (tmp_path / "options.json").write_text("{")
    code, _, err = run(capsys, "reproduce", "--model", "demo", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "options.json: cannot be read" in err


def test_plan_includes_steps_that_follow_from_a_change(tmp_path):
    """A training that will run again makes the readers of its adapter run as well."""
    pipeline = Pipeline(load_preset("demo"), tmp_path)
    records = {name: {"started_with": {}, "outputs": {}, "inputs": {}, "seconds": 3.0} for name in pipeline.steps.steps}
    records["dpo-42"]["inputs"] = {"training/dpo-42": "another"}
    records["curve"]["inputs"] = {name: pipeline.inputs.fingerprint(name) for name in ("settings/curve",)} | {
        "model/dpo": "x"
    }
    records["neuron_tokens"]["inputs"] = {
        "settings/neuron_tokens": pipeline.inputs.fingerprint("settings/neuron_tokens")
    }
    (tmp_path / "steps.json").write_text(json.dumps(records))
    for name in ("sft-42", "dpo-42"):
        shutil.copytree(DEMO_MODEL / name.split("-")[0], tmp_path / "adapters" / name)
    pipeline = Pipeline(load_preset("demo"), tmp_path)
    states = {row[0]: row[1] for row in plan_steps(pipeline).rows}
    assert states["dpo-42"] == "input training/dpo-42 changed"
    assert states["curve"] in ("dpo-42 runs before it", "input model/dpo changed")
    assert states["neuron_tokens"] == states["sft-42"] == "done"
    assert {row[1] for row in plan_steps(pipeline, only=("neuron_tokens",)).rows[:-1]} == {
        "requested again",
        "not requested",
    }
    with pytest.raises(SnpatchError, match=r"step: expected one of .* got 'x'"):
        plan_steps(pipeline, start="x")


# End to end


def test_killed_run_resumes(small_preset, capsys):
    """SIGKILL during DPO training and again during the curve; then a changed input, --only and --start-at."""
    preset, out = small_preset
    arguments = [sys.executable, "-m", "snpatch.cli", *command(preset, out)]

    def killed_when(condition) -> None:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        while not condition():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    killed_when(lambda: (out / "adapters" / "dpo-42" / "checkpoints" / "inputs.json").exists())
    assert "outputs" in read_steps(out)["sft-42"]
    assert "outputs" not in read_steps(out)["dpo-42"]
    killed_when(lambda: "curve" in read_steps(out))
    assert "outputs" not in read_steps(out)["curve"]
    code, text, err = run(capsys, *command(preset, out))
    assert code == 0, err
    assert steps_run(err) == ["curve", "stability", "neuron_tokens"]
    assert json.loads(text)["failed"] == []
    assert load_experiment_config(out / "experiment.toml").donor == "dpo"

    report = (out / "report.md").read_text()
    assert "## Measured and published" not in report, "the demo is not the paper's model"
    assert "| mean cost | dpo | beavertails | -11.80 | llama2-7b | Table 8 |" in report
    assert "## Known deviations of the presets from the paper" in report
    assert "weight decay 0 towards 0" in report
    assert "sft-1: provided, not trained here" in report
    assert "2 training seeds: overlap" in report
    table = (out / "reproduction.csv").read_text()
    assert table.startswith("what,model,set,published,bound,measured,published_of,table,difference\n")
    assert (out / "report.html").stat().st_size > 10_000
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("adapters/*/adapter_model.safetensors")}
    assert len(stamps) == 2

    # A changed setting of one experiment reruns it alone.
    preset.write_text(SMALL_PRESET.replace("k = [0.0, 0.2]", "k = [0.0, 0.3]"))
    code, _, err = run(capsys, *command(preset, out))
    assert code == 0
    assert steps_run(err) == ["curve"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for options, expected in (
        (["--only", "neuron_tokens"], ["neuron_tokens"]),
        (["--start-at", "stability"], ["stability", "neuron_tokens"]),
        ([], []),
    ):
        assert steps_run(run(capsys, *command(preset, out, *options))[2]) == expected
