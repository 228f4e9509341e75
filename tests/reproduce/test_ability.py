"""General ability in `snpatch reproduce`: commands, obstacles, and a task of a few rows from end to end."""

import json

import pytest
import yaml
from commands import run

from snpatch import Engine, Patch, Ranking, SnpatchError
from snpatch.config import EngineConfig
from snpatch.demo import DEMO_MODEL
from snpatch.reproduce import ability
from snpatch.reproduce.ability import Ability, AbilityTarget, AbilityTask
from snpatch.reproduce.pipeline import Pipeline
from snpatch.reproduce.preset import load_preset

PRESET = """
extends = "demo"
experiments = ["neuron_tokens"]

[training]
seeds = [42]
objectives = []

[ability]
include_path = "tasks"

[ability.tasks.refusals]
metric = "acc,none"
num_fewshot = 0
limit = 4
"""
USE_ADAPTERS = [f"--use-adapter={name}-42={DEMO_MODEL / name}" for name in ("sft", "dpo")]
CHOICES = ["sure , to", "sorry , i can not", "well , for the"]
STEPS = ["ability-sft", "ability-sft-patched", "ability-base", "ability-base-patched", "ability-dpo"]


@pytest.fixture
def preset(tmp_path):
    """Return a preset of the demo with a local task: is the first word of an answer a refusal?"""
    prompts = [json.loads(line)["prompt"] for line in (DEMO_MODEL / "eval" / "beavertails.jsonl").open()][:6]
    rows = [{"text": f"<|user|>\n{prompt}\n<|assistant|>", "choices": CHOICES, "label": 1} for prompt in prompts]
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "refusals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks" / "refusals.yaml").write_text(yaml.safe_dump(task))
    path = tmp_path / "small.toml"
    path.write_text(PRESET)
    return path, rows


def measure_accuracy(rows: list[dict], ranking: Ranking) -> float:
    """Return the fraction of rows whose labeled choice is the likeliest for the patched model, without lm-eval."""
    adapters = {"sft": [DEMO_MODEL / "sft"], "dpo": [DEMO_MODEL / "sft", DEMO_MODEL / "dpo"]}
    with Engine(DEMO_MODEL / "base", adapters, backend="transformers", template="tulu") as engine:
        tokenizer, patch = engine.requests.template("sft").tokenizer, Patch("sft", "dpo", ranking, round(0.2 * 2560))
        hits = []
        for row in rows:
            context = tokenizer(row["text"])["input_ids"]
            texts = [tokenizer(f"{row['text']}\n{choice}")["input_ids"][len(context) :] for choice in row["choices"]]
            results = engine.logprobs([context] * len(texts), patch, completions=texts)
            values = [result.values.double().sum().item() for result in results]
            hits.append(values.index(max(values)) == row["label"])
        return sum(hits) / len(hits)


@pytest.mark.slow
def test_local_task_is_evaluated_on_the_patched_model(preset, tmp_path, capsys):
    path, rows = preset
    out = tmp_path / "out"
    command = ["reproduce", "--model", str(path), "--out", str(out), *USE_ADAPTERS, "--backend", "transformers"]
    only = ["--only", "contrast-safety", "--only", "ability-sft-patched", "--trust-config", "--json"]
    code, text, err = run(capsys, *command, *only)
    assert (code, json.loads(text)["failed"]) == (0, []), err
    (row,) = json.loads((out / "ability-sft-patched.json").read_text())["rows"]
    ranking = Ranking.load(next((out / "rankings").glob("*.safetensors")))
    assert row["value"] == pytest.approx(measure_accuracy(rows[:4], ranking))
    assert (row["model"], row["task"], row["metric"], row["rows"]) == ("sft+", "refusals", "acc,none", 4)
    report = (out / "report.md").read_text()
    assert "## General ability" in report
    assert f"| sft+ | refusals | {row['value']:.2f} |" in report
    code, _, err = run(capsys, *command, "--dry-run", "--trust-config", "--json")
    assert code == 0, err


def test_preset_with_task_files_needs_trust(preset):
    path, _ = preset
    with pytest.raises(SnpatchError, match=r"ability\.include_path = .*may run code"):
        load_preset(str(path))
    loaded = load_preset(str(path), trust=True)
    assert loaded.ability == Ability({"refusals": AbilityTask("acc,none", 0, 4)}, str(path.parent / "tasks")), (
        "the folder is next to the preset"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[ability]\ntask = 3", "ability: unknown key task"),
        ("[ability]\ntasks = 3", "ability.tasks: expected a table, got 3"),
        ("[ability.tasks.mmlu]\nmetric = 'acc,none'", "ability.tasks.mmlu: num_fewshot is missing"),
        ("[ability.tasks.'../x.yaml']\nmetric = 'a'\nnum_fewshot = 0", r"names of lm-eval's tasks, got '../x.yaml'"),
    ],
)
def test_invalid_ability_raises(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = 'demo'\n{text}")
    with pytest.raises(SnpatchError, match=message):
        load_preset(str(path))


def test_offline_steps_are_skipped_with_a_reason(tmp_path, capsys, monkeypatch):
    """A plan names the steps and why they would be skipped; a run leaves them out and does not fail."""
    path = tmp_path / "mine.toml"
    path.write_text(
        "extends = 'demo'\nexperiments = ['neuron_tokens']\n[training]\nseeds = [42]\nobjectives = []\n"
        "[ability.tasks.mmlu]\nmetric = 'acc,none'\nnum_fewshot = 0\n"
    )
    command = ["reproduce", "--model", str(path), "--out", str(tmp_path / "out"), *USE_ADAPTERS]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, text, _ = run(capsys, *command, "--dry-run", "--json")
    states = {row["step"]: row["state"] for row in json.loads(text)["steps"]}
    assert code == 0
    assert [name for name in states if name.startswith("ability-")] == STEPS
    assert states["ability-sft"] == "not run yet; skipped here: its datasets are on the hub, and HF_HUB_OFFLINE is set"
    code, text, err = run(capsys, *command, "--only", "ability-base", "--json")
    assert (code, json.loads(text)["failed"]) == (0, [])
    assert "ability-base: skipped: its datasets are on the hub, and HF_HUB_OFFLINE is set" in err
    assert "- ability-base: its datasets are on the hub" in (tmp_path / "out" / "report.md").read_text()


def test_obstacle_depends_on_environment(monkeypatch):
    for name in ability.OFFLINE_VARIABLES:
        monkeypatch.setenv(name, "0")
    assert ability.find_obstacle(Ability()) is None
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "TRUE")
    assert "HF_DATASETS_OFFLINE is set" in ability.find_obstacle(Ability())
    assert ability.find_obstacle(Ability(include_path="tasks")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "lm-evaluation-harness is not installed: pip install" in ability.find_obstacle(Ability())


def test_command_passes_model_and_protocol(tmp_path):
    config = EngineConfig(
        "/m", {"sft": ("/a",), "other": ("/b",)}, {"dpo": {"checkpoint": "/c", "lora": ["/l"]}}, dtype="bfloat16",
        vllm={"max_model_len": 4096},
    )  # fmt: skip
    patch = {"ranking": "/r.safetensors", "k": 7, "positions": "all"}
    args = ability.build_model_args(config, AbilityTarget("sft", "dpo"), patch)
    assert args == {
        "model": "/m",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "recipient": "sft",
        "adapters": {"sft": ("/a",)},
        "checkpoint": {"dpo": "/c"},
        "lora": {"dpo": ("/l",)},
        "donor": "dpo",
        "ranking": "/r.safetensors",
        "k": 7,
        "positions": "all",
    }
    assert ability.build_model_args(config, AbilityTarget("base"), {}).keys() == {
        "model", "dtype", "max_model_len", "recipient",
    }  # fmt: skip
    tasks = Ability({"mmlu": AbilityTask("acc,none", 0), "gsm8k_cot": AbilityTask("exact_match,strict-match", 8, 200)})
    command = ability.build_command(tasks, "gsm8k_cot", args, tmp_path)
    assert json.loads(command[command.index("--model_args") + 1]) == json.loads(json.dumps(args))
    options = command[command.index("--tasks") :]
    assert options == ["--tasks", "gsm8k_cot", "--num_fewshot", "8", "--output_path", str(tmp_path), "--limit", "200"]
    assert "--limit" not in ability.build_command(tasks, "mmlu", args, tmp_path)


def test_result_of_a_group_has_its_metric(tmp_path):
    results = {
        "results": {"a": {"acc,none": 0.1}},
        "groups": {"both": {"acc,none": 0.3, "acc_stderr,none": 0.05}},
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 5}},
    }
    task = AbilityTask("acc,none", 3, 5)
    with pytest.raises(SnpatchError, match="expected results of both, got none"):
        ability.read_result(tmp_path, "both", task)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "results_1.json").write_text(json.dumps(results))
    expected = {"value": 0.3, "stderr": 0.05, "rows": 9, "num_fewshot": 3, "task": "both", "metric": "acc,none"}
    assert ability.read_result(tmp_path, "both", task) == expected
    with pytest.raises(SnpatchError, match="expected the metric exact_match,none, got acc,none"):
        ability.read_result(tmp_path, "both", AbilityTask("exact_match,none", 3))


def test_paper_preset_estimates_its_tasks(tmp_path):
    from snpatch.reproduce.run_plan import plan_steps

    pipeline = Pipeline(load_preset("llama2-7b"), tmp_path / "out")
    assert list(pipeline.ability_targets) == STEPS
    rows = {row[0]: row for row in plan_steps(pipeline).rows}
    prompt_tokens = 200 * 1_300 + 27 * 40 * 900 + 14_042 * 480 + 817 * 1_250
    assert rows["ability-sft"][4].startswith(f"modeled for an H100: {prompt_tokens:.3g} prompt tokens")
