"""`snpatch reproduce`: presets, steps by content, what is killed goes on, the paper's numbers beside the measured."""

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

from snpatch.data import DATASETS
from snpatch.demo import DEMO_MODEL
from snpatch.errors import SnpatchError
from snpatch.experiments.config import load_experiment_config
from snpatch.reproduce import comparison, estimates, paper
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import FOLDER, NAMES, load_preset
from snpatch.reproduce.steps import Done, Step, Steps
from snpatch.training import trainer
from snpatch.training.settings import DpoSettings

TRAINED = ("llama2-7b", "mistral-7b", "gemma-7b", "demo")
SMALL = """
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
TAKEN = [f"--use-adapter={name}={DEMO_MODEL / name}" for name in ("sft-1", "dpo-1")]
HOW = ["--limit", "6", "--backend", "transformers", "--json"]


OWN_ROWS = """
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
def small(tmp_path):
    """A preset of two trainings and three experiments on the demo model, and an empty folder for it."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path, tmp_path / "out"


def command(preset: Path, out: Path, *arguments: str) -> list[str]:
    return ["reproduce", "--model", str(preset), "--out", str(out), *TAKEN, *HOW, *arguments]


def ran(err: str) -> list[str]:
    """The steps that a run's lines say were run, in order."""
    lines = [line.split("] ", 1)[1].split(": ", 1) for line in err.splitlines() if line.startswith("[")]
    return [name for name, what in lines if what != "done"]


def steps_of(out: Path) -> dict:
    return json.loads((out / "steps.json").read_text())


# Presets and plans


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_is_a_world_that_loads(name, tmp_path):
    pipeline = Pipeline(load_preset(name), tmp_path / "out")
    config = pipeline.config
    usual = {"curve", "sliding_window", "transfer", "perplexity", "guard", "safeguard", "neuron_tokens"}
    assert usual <= pipeline.steps.steps.keys()
    assert set(config.recipients) <= {"base", *config.engine.sources}
    if name in TRAINED:
        assert pipeline.skipped == {}
        assert len(config.seeds) == len(load_preset(name).training.seeds) >= 3
        dpo = config.engine.adapters["dpo"]
        assert [Path(part).name for part in dpo] == ["sft-42", "dpo-42"]
    else:
        assert config.engine.secondary is not None
        assert not pipeline.pairs
    assert not (tmp_path / "out").exists()


def test_no_file_of_presets_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*NAMES, "common", "paper", "public"}


def test_the_papers_presets_are_the_papers():
    preset = load_preset("llama2-7b")
    training = preset.training
    assert training.seeds == (42, 1, 66, 88, 3407)
    assert training.objectives == ("helpful", "shp", "reasoning", "stack-exchange", "reward-bench-safety")
    assert training.dpo == DpoSettings(micro_batch_size=5)
    assert (training.data["sft"].source, training.data["safety"].source) == ("sharegpt", "hh-harmless")
    assert all(rows.source in DATASETS and rows.split in ("train", "filtered") for rows in training.data.values())
    config = preset.config
    assert (config["max_tokens"], config["contrast_tokens"], config["recipients"]) == (128, 256, ["sft", "base"])
    assert all(config["sets"][name]["first"] == 200 for name in (*config["benchmarks"], "contrast"))


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_writes_and_downloads_nothing(capsys, tmp_path, name):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "reproduce", "--model", name, "--out", out, "--dry-run", "--json")
    told = json.loads(text)
    assert code == 0
    assert not out.exists()
    assert [row["step"] for row in told["steps"]][-1] == "all that is to run"
    assert told["commands"].keys() == {row["step"] for row in told["steps"][:-1]}
    fetched = {row["from the hub, if it is not in its cache"] for row in told["downloads"]}
    assert (fetched == set()) == (name == "demo")
    assert load_preset(name).config["model"] in fetched or name == "demo"


def test_a_dry_run_for_people_has_the_sums(capsys, tmp_path):
    code, text, _ = run(capsys, "reproduce", "--model", "llama2-7b", "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "GPU hours" in text
    assert "all that is to run" in text
    assert "PKU-Alignment/beaver-7b-v1.0-cost" in text


def test_hours_follow_from_sizes(tmp_path):
    """Tokens x passes x 2 x parameters over the rate; DPO reads its reference, too."""
    pipeline = Pipeline(load_preset("llama2-7b"), tmp_path / "out")
    hours = {row[0]: row[2] for row in estimates.plan(pipeline).rows}
    flops = 94_145 * 1_300 * 3 * 3 * 2 * 6_738_415_616
    assert float(hours["sft-42"]) == pytest.approx(flops / (0.4 * 989e12) / 3600, abs=0.006)
    flops = 42_537 * 400 * 3 * 4 * 2 * 6_738_415_616
    assert float(hours["dpo-42"]) == pytest.approx(flops / (0.4 * 989e12) / 3600, abs=0.006)
    assert hours["stack-exchange"] == "?"


def test_hours_follow_from_a_training_that_was_measured(tmp_path):
    """SFT at 9000 tokens a second on two GPUs: DPO, with four passes for three, at 6750."""
    out = tmp_path / "out"
    (out / "adapters" / "sft-42").mkdir(parents=True)
    record = {"provenance": {"figures": {"tokens_per_s": 9000.0, "processes": 2, "resumed_at": 0}}}
    (out / "adapters" / "sft-42" / "training.json").write_text(json.dumps(record))
    (out / "steps.json").write_text(json.dumps({"sft-42": {"begun": {}, "made": {}, "read": {}}}))
    row = next(row for row in estimates.plan(Pipeline(load_preset("llama2-7b"), out)).rows if row[0] == "dpo-42")
    assert row[4] == "measured: 6750 tokens/s, by sft-42, 2 processes"
    assert float(row[2]) == pytest.approx(2 * 42_537 * 400 * 3 / 6750 / 3600, abs=0.006)  # of GPUs, not of the clock


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titel = 'x'", "there is no titel; there are extends, title"),
        ("extends = 'nothing'", "extends 'nothing', and there is no such preset"),
        ("x = [", "not a TOML file"),
        ("[config]\nmodel = 'm'", "needs either .training., or config.contrasts"),
        ("extends = 'paper'", "config.model is missing"),
        ("extends = 'demo'\nexperiments = ['curves']", "no experiment named .curves.: there are curve"),
        ("extends = 'demo'\n[training]\nseeds = [1, 1]", "training.seeds: wanted one or more, each once"),
        ("extends = 'demo'\n[training]\nobjectives = ['safety']", "training.objectives: those beside safety"),
        ("extends = 'demo'\n[training]\nsead = 1", "training: there is no sead"),
        ("extends = 'demo'\n[training.data]\nhelpfull = { source = 'x' }", "training.data: helpfull is not trained"),
        ("extends = 'demo'\n[training.settings]\nmethod = 'lora'", "method = lora: one engine runs one further set"),
        (
            "extends = 'paper'\n[config]\nmodel = 'm'\n[training]\nobjectives = ['kind']",
            "objective: expected one of safety, helpful",
        ),
        ("extends = 'demo'\n[config]\nfrom_nowhere = 1", "there is no from_nowhere"),
        ("from_config = 'moon'", "from_config: there are demo, got 'moon'"),
        ("from_config = ['a']", "from_config: there are demo"),
        ("config = 3", "config: wanted a table, got 3"),
        ("training = 1", "training: wanted a table, got 1"),
        ("extends = 'demo'\nsize = 3", "size: wanted a table, got 3"),
        ("extends = 'demo'\n[training]\nsettings = 3", "settings: wanted a table, got 3"),
        ("extends = 'demo'\n[training]\nobjectives = 'helpfull'\nwritten_by = 'x'", "written_by: there is only demo"),
        ("extends = 'demo'\n[config]\nsets = 3", "sets: wanted a table, got 3"),
        ("extends = 'demo'\n[config.judges]\ncost = 'x'", "judges.cost: wanted a table with source"),
        ("extends = 'demo'\n[config.settings]\ncurve = 3", "curve: wanted a table, got 3"),
        ("extends = 'demo'\n[config.settings.guard]\nkk = 1", "settings of guard: there is no kk"),
        ("extends = 'demo'\n[config.settings.cruve]\nk = 1", "no experiment named 'cruve'"),
        ("extends = 'demo'\n[config.adapters]\nx = 'y'", "config.adapters: follows from .training."),
        ("extends = 'demo'\n[training]\nobjectives = ['curve']", "'curve' is the name of a model or a step"),
        ("extends = 'llama2-7b'\npublished = 'llama-2'", "published: there are llama2-7b, mistral-7b, gemma-7b"),
    ],
)
def test_a_wrong_preset_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SnpatchError, match=message):
        Pipeline(load_preset(str(path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama"], "no preset 'llama': there are llama2-7b"),
        (["--model", "demo", "--use-adapter", "dpo-2=x"], "dpo-2 is not trained here; there are sft-42, dpo-42"),
        (["--model", "demo", "--use-adapter", "dpo-42=nowhere"], "nowhere: no such folder"),
        (["--model", "demo", "--use-adapter", "dpo-42"], "--use-adapter: expected name=folder"),
        (["--model", "demo", "--launcher", "acelerate launch"], "--launcher: there is no program acelerate"),
        (["--model", "demo", "--template", "tokenizer"], "template: the engine's is tokenizer, sft-42 is trained with"),
        (["--model", "demo", "--only", "curves"], "no step named 'curves': there are rows, sft-42"),
        (["--model", "demo", "--start-at", "x"], "no step named 'x'"),
        (["--model", "demo", "--only", "curve", "--start-at", "curve"], "give --only or --start-at, not both"),
        (["--model", "qwen3-4b-saferl", "--seed", "1"], "seeds are for presets that train"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, tmp_path, arguments, message):
    code, _, err = run(capsys, "reproduce", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_trainings_command_says_all_of_its_settings(capsys, tmp_path, monkeypatch):
    """Parsed again by `snpatch train`, the command gives the very settings and rows."""
    path = tmp_path / "mine.toml"
    rows = "".join(
        json.dumps({"ask": f"q{i}", "chosen": "a", "rejected": "b", "kind": "xy"[i % 2]}) + "\n" for i in range(9)
    )
    (tmp_path / "pairs.jsonl").write_text(rows)
    path.write_text(SMALL.split("[training.data]")[0] + OWN_ROWS)
    preset = load_preset(str(path))
    pipeline = Pipeline(preset, tmp_path / "out")
    seen = {}
    monkeypatch.setattr(trainer, "train_dpo", lambda *arguments, **_: seen.update(a=arguments) or {"steps": 1})
    command = shlex.split(pipeline.steps.steps["dpo-1"].command)
    code, _, err = run(capsys, *command[3:], "--json")
    assert code == 0, err
    model, sft, pairs, out, settings = seen["a"]
    assert (Path(model), Path(out)) == (DEMO_MODEL / "base", tmp_path / "out" / "adapters" / "dpo-1")
    assert sft == tmp_path / "out" / "adapters" / "sft-1"
    assert settings == pipeline.pairs["dpo-1"].settings
    assert settings.seed == 1
    assert sorted(row["prompt"][0]["content"] for row in pairs) == sorted(
        chat[0]["content"] for chat in preset.training.data["safety"].read(tmp_path).prompts
    )
    assert len(pairs) == 3


# Steps


class Kitchen:
    """Three steps: bread reads flour; soup reads water; meal reads what bread and soup made, and finds out that it
    reads salt."""

    def __init__(self, out: Path) -> None:
        self.out, self.has, self.log = out, {"flour": "1", "water": "1", "salt": "1", "pepper": "1"}, []
        out.mkdir(exist_ok=True)
        self.steps = self.opened()

    def opened(self) -> Steps:
        steps = [
            Step("bread", lambda: self.cook("bread"), "bake", ("flour",), self.out / "bread"),
            Step("soup", lambda: self.cook("soup"), "boil", ("water",), self.out / "soup"),
            Step("meal", lambda: self.cook("meal", ["salt", "bread"]), "serve"),
        ]
        return Steps(self.out, steps, self.digest)

    def digest(self, name: str) -> str:
        if name == "bread":
            return (self.out / "bread" / "it").read_text()
        return self.has[name]

    def cook(self, name: str, read=()) -> Done:
        self.log.append(name)
        (self.out / name).mkdir(exist_ok=True)
        (self.out / name / "it").write_text(f"{name} of {self.has}" if name != "meal" else "meal")
        return Done(read, [self.out / name])

    def go(self) -> list[str]:
        self.log = []
        for name in self.steps.steps:
            if self.steps.reason(name):
                self.steps.run(name)
        return self.log


def test_what_is_done_is_not_done_again(tmp_path):
    kitchen = Kitchen(tmp_path / "out")
    assert kitchen.go() == ["bread", "soup", "meal"]
    assert kitchen.go() == []
    kitchen.steps = kitchen.opened()
    assert kitchen.go() == []


def test_only_what_reads_a_changed_input_runs_again(tmp_path):
    kitchen = Kitchen(tmp_path / "out")
    kitchen.go()
    kitchen.has["pepper"] = "2"
    assert kitchen.go() == []
    kitchen.has["salt"] = "2"
    assert kitchen.steps.reason("meal") == "salt is another"
    assert kitchen.go() == ["meal"]
    kitchen.has["water"] = "2"
    assert kitchen.go() == ["soup"]  # the meal does not read the soup
    kitchen.has["flour"] = "2"
    assert kitchen.go() == ["bread", "meal"]


def test_a_step_whose_work_is_gone_or_changed_runs_again(tmp_path):
    kitchen = Kitchen(tmp_path / "out")
    kitchen.go()
    (tmp_path / "out" / "soup" / "it").write_text("cold")
    assert "soup is not what it made" in kitchen.steps.reason("soup")
    assert kitchen.go() == ["soup"]
    (tmp_path / "out" / "meal" / "it").unlink()
    assert kitchen.go() == ["meal"]


def test_what_a_changed_step_had_made_is_kept_apart(tmp_path):
    kitchen = Kitchen(tmp_path / "out")
    kitchen.go()
    before = (tmp_path / "out" / "bread" / "it").read_text()
    kitchen.has["flour"] = "2"
    kitchen.go()
    assert (tmp_path / "out" / "replaced" / "bread-1" / "bread" / "it").read_text() == before
    kitchen.has["flour"] = "3"
    kitchen.go()
    assert (tmp_path / "out" / "replaced" / "bread-2" / "bread" / "it").exists()


def test_a_killed_step_goes_on_in_its_folder_unless_its_input_changed(tmp_path):
    kitchen = Kitchen(tmp_path / "out")

    def killed():
        (tmp_path / "out" / "bread").mkdir()
        (tmp_path / "out" / "bread" / "dough").touch()
        raise KeyboardInterrupt

    kitchen.steps.steps["bread"] = Step("bread", killed, "bake", ("flour",), tmp_path / "out" / "bread")
    with pytest.raises(KeyboardInterrupt):
        kitchen.go()
    kitchen.steps = kitchen.opened()
    assert kitchen.steps.reason("bread") == "begun"
    kitchen.steps.run("bread")
    assert (tmp_path / "out" / "bread" / "dough").exists()
    assert kitchen.steps.reason("bread") is None
    (tmp_path / "out" / "steps.json").write_text(json.dumps({"bread": {"begun": {"flour": "0"}}}))
    kitchen.steps = kitchen.opened()
    kitchen.steps.run("bread")
    assert not (tmp_path / "out" / "bread" / "dough").exists()


def test_a_damaged_work_is_put_away_and_not_taken_for_made(tmp_path):
    """A training that finds its own record would take the folder for done."""
    kitchen = Kitchen(tmp_path / "out")
    kitchen.go()
    (tmp_path / "out" / "bread" / "it").unlink()
    (tmp_path / "out" / "bread" / "record").touch()
    assert kitchen.go() == ["bread"]
    assert not (tmp_path / "out" / "bread" / "record").exists()


def test_an_input_that_changes_while_it_is_read_is_not_taken_for_the_one_that_was_read(tmp_path):
    kitchen = Kitchen(tmp_path / "out")

    def meanwhile():
        done = kitchen.cook("bread")
        kitchen.has["flour"] = "2"
        return done

    kitchen.steps.steps["bread"] = Step("bread", meanwhile, "bake", ("flour",), tmp_path / "out" / "bread")
    with pytest.raises(SnpatchError, match="flour was changed while bread ran"):
        kitchen.go()
    kitchen.steps = kitchen.opened()
    assert kitchen.go() == ["bread", "soup", "meal"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "wanted steps by name"), ('{"bread": 3}', "wanted steps by name")],
)
def test_a_broken_record_of_steps_is_an_error(tmp_path, text, message):
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(SnpatchError, match=f"steps.json: {message}"):
        Steps(tmp_path, [], str)


def test_what_lies_there_of_another_input_is_stale(tmp_path):
    kitchen = Kitchen(tmp_path / "out")
    kitchen.go()
    assert kitchen.steps.stale == []
    kitchen.has["salt"] = "2"
    assert kitchen.steps.stale == ["meal"]
    kitchen.steps.put_away("meal")
    assert kitchen.steps.stale == []
    assert (tmp_path / "out" / "replaced" / "meal-1" / "meal" / "it").exists()


# The paper's numbers


def test_published_numbers_are_the_papers():
    found = paper.numbers()["transfer"]
    assert paper.models() == ["llama2-7b", "mistral-7b", "gemma-7b"]
    assert all(len(row) == len(found["columns"]) for name in paper.models() for row in found[name].values())
    assert all(list(found[name]) == ["base", "base+", "sft", "sft+", "dpo"] for name in paper.models())
    assert found["llama2-7b"]["sft+"] == [-11.9, -11.9, -7.2, -6.6, 5.4]
    assert found["mistral-7b"]["base"] == [-1.6, -4.8, -1.1, 3.2, 4.9]
    assert found["gemma-7b"]["dpo"] == [-13.6, -14.1, -11.9, -10.6, 7.9]


def measured_in(out: Path, config) -> None:
    """Tables as the experiments write them, of a few made-up figures."""
    columns = {name: 0.5 for name in config.benchmarks} | {"perplexity": 6.0}
    effects = {f"effect on {name}": 0.8 for name in config.benchmarks}
    models = ["base", "base+", "sft", "sft+", config.donor]
    point = {"ranking": "safety", "rank_lo": 0, "set": "b"}
    tables = {
        "transfer-table": [{"model": m, **columns, **(effects if m.endswith("+") else {})} for m in models],
        "curve": [
            {
                **point,
                "recipient": who,
                "judge": judge,
                "control_seed": seed,
                "neuron_fraction": share,
                "effect": effect,
            }
            for who, judge, seed, share, effect in (
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
            {"donor": "dpo", "recipient": "helpful", "set": "beavertails", "judge": "cost", "change": -5.0},
            {"donor": "dpo", "recipient": "helpful", "set": "helpful", "judge": "cost", "change": 9.0},
        ],
    }
    out.mkdir()
    for stem, rows in tables.items():
        (out / f"{stem}.json").write_text(json.dumps({"rows": rows}))


DONE = ["transfer", "curve", "stability", "guard", "alignment_tax"]


def beside(source, out: Path, **how) -> list[dict]:
    pipeline = Pipeline(load_preset(str(source)), out, **how)
    measured_in(out, pipeline.config)
    return comparison.beside(pipeline, DONE)


def test_measured_numbers_stand_beside_the_published(tmp_path):
    rows = beside("llama2-7b", tmp_path / "out")

    def row(what: str, model: str, of: str) -> dict:
        (found,) = [r for r in rows if (r["what"], r["model"]) == (what, model) and r["set"].startswith(of)]
        return found

    cost = row("mean cost", "sft+", "harmbench")
    assert (cost["published"], cost["measured"], cost["table"]) == (-7.2, 0.5, "Table 1")
    assert cost["difference"] == pytest.approx(7.7)
    assert row("mean cost", "dpo", "redteam")["measured"] == 0.5
    effect = row("effect (Eq. 4)", "base+", "beavertails")
    assert effect["published"] == pytest.approx((-5.7 - 2.2) / (-11.8 - 2.2))
    assert effect["measured"] == 0.8
    (curve,) = [r for r in rows if r["what"].startswith("share of the safety gain")]
    assert (curve["published"], curve["measured"], curve["set"], curve["model"]) == (0.9, 0.7, "b, 6.0%", "sft")
    (overlap,) = [r for r in rows if r["what"].startswith("overlap")]
    assert (overlap["bound"], overlap["published"], overlap["measured"]) == ("at least", 0.95, 0.91)
    assert {r["measured"] for r in rows if r["what"].startswith("mean accuracy")} == {0.75}
    tax = row("change of mean cost", "helpful to safe", "beavertails")
    assert (tax["published"], tax["measured"]) == (-7.3, -5.0)
    assert row("change of mean reward", "safe to helpful", "helpful")["measured"] is None
    assert {r["difference"] is None for r in rows if r["measured"] is None} == {True}
    assert {r["difference"] is None for r in rows if r["measured"] is not None} == {False}


def test_a_number_of_another_model_has_no_difference(tmp_path):
    """Mistral's Table 1 is Mistral's; what the text says of Llama2 is not."""
    rows = [row for row in beside("mistral-7b", tmp_path / "out") if row["measured"] is not None]
    assert {row["published_of"] for row in rows} == {"mistral-7b", "llama2-7b"}
    assert all((row["difference"] is None) == (row["published_of"] == "llama2-7b") for row in rows)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("", []),
        ("[training]\nseeds = [7, 8]\nobjectives = []", []),
        ("[config.sets]\nharmbench = { source = 'harmbench', first = 10 }", ["sets"]),
        ("[config.judges]\ncost = { source = 'refusal' }", ["judges"]),
        ("[config]\nmodel = 'other'", ["model"]),
        ("[config.settings.transfer]\nk = 10", ["settings"]),
        ("[training.settings]\nepochs = 1.0", ["training"]),
    ],
)
def test_a_difference_is_told_of_the_papers_own_run_alone(tmp_path, change, differs):
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = 'llama2-7b'\n{change}")
    assert comparison.differs(Pipeline(load_preset(str(path)), tmp_path / "o")) == differs
    rows = [row for row in beside(path, tmp_path / "out") if row["measured"] is not None]
    assert all((row["difference"] is None) == bool(differs) for row in rows)


@pytest.mark.parametrize(
    ("how", "differs"),
    [
        ({"limit": 6}, "limit"),
        ({"skip_invalid": True}, "skip_invalid"),
        ({"dtype": "float32"}, "engine"),
        ({"taken": {"sft-42": str(DEMO_MODEL / "sft")}}, "taken adapters"),
    ],
)
def test_other_options_are_another_run(tmp_path, how, differs):
    assert comparison.differs(Pipeline(load_preset("llama2-7b"), tmp_path / "o", **how)) == [differs]
    assert {row["difference"] for row in beside("llama2-7b", tmp_path / "out", **how)} == {None}


def test_of_full_checkpoints_others_found_what_stands_beside(tmp_path):
    pipeline = Pipeline(load_preset("tulu-2-7b"), tmp_path / "out")
    measured_in(tmp_path / "out", pipeline.config)
    rows = comparison.beside(pipeline, ["curve"])
    assert [(row["published"], row["measured"], row["difference"]) for row in rows] == [
        (0.19, 0.3, None),
        (0.88, 0.3, None),
    ]
    assert all("full fine-tune" in row["published_of"] for row in rows)


# What steps read


def digests(source, out: Path, names, **how) -> list[str]:
    pipeline = Pipeline(load_preset(str(source)), out, **how)
    return [pipeline.inputs.digest(name) for name in names]


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"template": "auto"}, {"quantization": "fp8"}])
def test_an_engine_that_computes_otherwise_is_another_input(tmp_path, how):
    assert digests("demo", tmp_path, ["engine"]) != digests("demo", tmp_path, ["engine"], **how)


@pytest.mark.parametrize("how", [{"backend": "transformers"}, {"max_num_seqs": 7}, {"gpu_memory_utilization": 0.5}])
def test_an_engine_that_computes_the_same_is_the_same_input(tmp_path, how):
    assert digests("demo", tmp_path, ["engine"]) == digests("demo", tmp_path, ["engine"], **how)


def test_inputs_are_told_by_content(tmp_path):
    """Judges, models and their tokenizers, sets, written rows: each by what changes it, and by nothing else."""
    config = tmp_path / "models"
    shutil.copytree(DEMO_MODEL, config)
    (tmp_path / "judge_of_mine.py").write_text("def by(prompts, completions): return [0.0 for _ in prompts]\n")
    path = tmp_path / "mine.toml"

    def all_of(text: str = "", **how) -> dict[str, str]:
        judges = "[config.judges]\ncost = { source = 'models/cost' }\nmine = { source = 'judge_of_mine:by' }\n"
        path.write_text(f"extends = 'demo'\n[config]\nmodel = 'models/base'\n{judges}{text}")
        pipeline = Pipeline(load_preset(str(path), trust=True), tmp_path / "out", **how)
        names = ["model/base", "judge/cost", "judge/mine", "set/contrast", "judges", "cost", "writing", "benchmarks"]
        return {name: pipeline.inputs.digest(name) for name in names}

    def changed(before: dict, after: dict) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    sys.path.insert(0, str(tmp_path))
    try:
        first = all_of()
        assert all_of() == first
        with open(config / "base" / "tokenizer_config.json", "a") as file:
            file.write(" ")
        second = all_of()
        assert changed(first, second) == {"model/base"}
        (tmp_path / "judge_of_mine.py").write_text("def by(prompts, completions): return [1.0 for _ in prompts]\n")
        third = all_of()
        assert changed(second, third) == {"judge/mine"}
        assert changed(third, all_of("more = { source = 'refusal' }")) == {"judges"}
        assert changed(third, all_of(limit=3)) == {"set/contrast"}
        assert changed(third, all_of("[training]\nobjectives = ['helpful']")) == {"writing"}
    finally:
        sys.path.remove(str(tmp_path))


def test_what_is_gone_from_a_preset_makes_its_readers_run(tmp_path):
    pipeline = Pipeline(load_preset("demo"), tmp_path / "out")
    with pytest.raises(SnpatchError, match="this version knows no input spice"):
        pipeline.inputs.digest("spice/pepper")
    for name in ("set/gone", "judge/gone", "model/gone", "training/gone", "contrast/seeds/9"):
        with pytest.raises(SnpatchError, match="there is no"):
            pipeline.inputs.digest(name)


def test_the_folder_one_stands_in_does_not_shadow_a_presets_names(tmp_path, monkeypatch):
    (tmp_path / "harmbench").mkdir()
    (tmp_path / "meta-llama" / "Llama-2-7b-hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_preset("llama2-7b").config
    assert config["sets"]["harmbench"]["source"] == "harmbench"
    assert config["model"] == "meta-llama/Llama-2-7b-hf"


def test_paths_of_a_users_preset_are_seen_from_its_folder(tmp_path):
    for name in ("ia3", "lora", "checkpoint", "m"):
        (tmp_path / "here" / name).mkdir(parents=True)
    path = tmp_path / "here" / "mine.toml"
    path.write_text(
        "extends = 'public'\n[config]\nmodel = 'm'\nadapters = { sft = ['ia3'] }\n"
        "models = { dpo = { lora = ['lora'], adapters = ['ia3'] } }\n"
        "contrasts = { safety = { recipient = 'sft', donor = 'dpo' } }\n"
    )
    engine = Pipeline(load_preset(str(path)), tmp_path / "out").config.engine
    here = tmp_path / "here"
    assert engine.model == str(here / "m")
    assert engine.adapters == {"sft": (str(here / "ia3"),)}
    assert (engine.models["dpo"].lora, engine.models["dpo"].adapters) == ((str(here / "lora"),), (str(here / "ia3"),))


def test_an_extending_preset_replaces_models_and_judges_whole(tmp_path):
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


def test_a_folder_is_not_gone_on_with_by_other_options(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "options.json").write_text(json.dumps({"model": "demo", "use_adapter": {"dpo-42": "x"}, "limit": 5}))
    code, _, err = run(capsys, "reproduce", "--model", "demo", "--out", out, "--limit", "5")
    assert code == 2
    assert "was made with use_adapter = {'dpo-42': 'x'}, now it is {}" in err
    assert not (out / "steps.json").exists()


def test_a_broken_record_of_options_is_one_line(capsys, tmp_path):
    (tmp_path / "options.json").write_text("{")
    code, _, err = run(capsys, "reproduce", "--model", "demo", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "options.json: cannot be read" in err


def test_a_dry_run_tells_what_follows_from_a_change(tmp_path):
    """A training that is to run again makes what reads its model run, too."""
    pipeline = Pipeline(load_preset("demo"), tmp_path)
    kept = {name: {"begun": {}, "made": {}, "read": {}, "seconds": 3.0} for name in pipeline.steps.steps}
    kept["dpo-42"]["read"] = {"training/dpo-42": "another"}
    kept["curve"]["read"] = {name: pipeline.inputs.digest(name) for name in ("settings/curve",)} | {"model/dpo": "x"}
    kept["neuron_tokens"]["read"] = {"settings/neuron_tokens": pipeline.inputs.digest("settings/neuron_tokens")}
    (tmp_path / "steps.json").write_text(json.dumps(kept))
    for name in ("sft-42", "dpo-42"):
        shutil.copytree(DEMO_MODEL / name.split("-")[0], tmp_path / "adapters" / name)
    pipeline = Pipeline(load_preset("demo"), tmp_path)
    states = {row[0]: row[1] for row in estimates.plan(pipeline).rows}
    assert states["dpo-42"] == "training/dpo-42 is another"
    assert states["curve"] in ("dpo-42 runs before it", "model/dpo is another")
    assert states["neuron_tokens"] == states["sft-42"] == "done"
    assert {row[1] for row in estimates.plan(pipeline, only=("neuron_tokens",)).rows[:-1]} == {
        "asked for again",
        "not asked for",
    }
    with pytest.raises(SnpatchError, match="no step named 'x'"):
        estimates.plan(pipeline, start="x")


# End to end


def test_killed_in_the_middle_it_goes_on(small, capsys):
    """SIGKILL during DPO training and again during the curve; then a changed input, --only and --start-at."""
    preset, out = small
    arguments = [sys.executable, "-m", "snpatch.cli", *command(preset, out)]

    def killed_when(condition) -> None:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        while not condition():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    killed_when(lambda: (out / "adapters" / "dpo-42" / "checkpoints" / "inputs.json").exists())
    assert "made" in steps_of(out)["sft-42"]
    assert "made" not in steps_of(out)["dpo-42"]
    killed_when(lambda: "curve" in steps_of(out))
    assert "made" not in steps_of(out)["curve"]
    code, told, err = run(capsys, *command(preset, out))
    assert code == 0, err
    assert ran(err) == ["curve", "stability", "neuron_tokens"]
    assert json.loads(told)["failed"] == []
    assert load_experiment_config(out / "experiment.toml").donor == "dpo"

    report = (out / "report.md").read_text()
    assert "| mean cost | dpo | beavertails |  | -11.80 |" in report
    assert "sft-1: taken, not trained here" in report
    assert "2 training seeds: overlap" in report
    table = (out / "reproduction.csv").read_text()
    assert table.startswith("what,model,set,published,bound,measured,published_of,table,difference\n")
    assert (out / "report.html").stat().st_size > 10_000
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("adapters/*/adapter_model.safetensors")}
    assert len(stamps) == 2

    # One setting of one experiment: it alone runs again.
    preset.write_text(SMALL.replace("k = [0.0, 0.2]", "k = [0.0, 0.3]"))
    code, _, err = run(capsys, *command(preset, out))
    assert code == 0
    assert ran(err) == ["curve"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for more, wanted in (
        (["--only", "neuron_tokens"], ["neuron_tokens"]),
        (["--start-at", "stability"], ["stability", "neuron_tokens"]),
        ([], []),
    ):
        assert ran(run(capsys, *command(preset, out, *more))[2]) == wanted
