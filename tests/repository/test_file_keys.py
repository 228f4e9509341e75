"""Keys of sweep, experiment, preset and server files: each one changes what runs, or is rejected."""

import ast
import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import tomli_w

import snpatch
from snpatch import EngineConfig, SnpatchError, experiments
from snpatch.config import Capacity, ModelSource
from snpatch.data.prompt_set import PromptSet
from snpatch.experiments.config import Contrast, ExperimentConfig, build_experiment_config, load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.reproduce.ability import Ability, AbilityTask
from snpatch.reproduce.preset import Preset, Size, Training, load_preset
from snpatch.sampling import Sampling
from snpatch.server.config import FILES, ServeConfig
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep_file import RankingSource, SweepSpec
from snpatch.training.settings import DpoSettings, TrainSettings

SOURCE = Path(snpatch.__file__).parent


def names(kind: type, *without: str) -> set[str]:
    return {f.name for f in fields(kind)} - set(without)


def under(prefix: tuple[str, ...], keys) -> set[tuple[str, ...]]:
    return {(*prefix, key) for key in keys}


def set_key(table: dict, path: tuple[str, ...], value: object) -> dict:
    """Return a copy of a table with another value at a path of keys."""
    copy = json.loads(json.dumps(table))
    part = copy
    for key in path[:-1]:
        part = part.setdefault(key, {})
    part[path[-1]] = value
    return copy


# A value for each key of an engine, other than the one that the tables below have.
ENGINE = {
    "backend": "transformers", "dtype": "bfloat16", "device": "cpu", "batch_size": 7, "token_budget": 99,
    "allow_untested": True, "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
SIZES = {f.name: 9 for f in fields(Capacity)} | {"streams": 1, "scales_kv": True}
MODELS = {"checkpoint": "w2", "lora": ["l2"], "adapters": ["a2"]}
PROMPTS = {
    "source": "other.jsonl", "format": "harmbench", "split": "test", "column": "text", "revision": "main",
    "filter": ["kind", "bad"], "first": 3, "last": 4, "sample": 2, "seed": 5, "distinct": True,
}  # fmt: skip
SAMPLING = {
    "temperature": 1.0, "top_p": 0.5, "top_k": 5, "max_tokens": 9, "min_tokens": 1, "stop": ["x"], "ignore_eos": True,
    "seed": 3, "logprobs": True, "n": 2, "vllm": {"min_p": 0.1},
}  # fmt: skip
SWEEP = {
    "recipients": ["base"], "donors": ["base"], "windows": [5], "strengths": [2.0], "controls": 1, "disjoint": False,
    "control_kind": "everywhere", "positions": "prompt", "samples": 2, "resamples": 9, "confidence": 0.5,
    "extra_controls": ["matched"], "coherence": False, "report_k": 3, "cluster_by": "kind", "harmless": "more",
    "refusal_judge": "second", "sets": ["more"], "judges": ["second"],
}  # fmt: skip
TOP = {"model": "m2", "template": "tulu"}
MODEL = {"model": "m", "adapters": {"sft": ["a"]}, "models": {"dpo": {"checkpoint": "w"}}}

SWEEP_FILE = {
    **MODEL,
    "sets": {"few": {"source": "p.jsonl"}, "more": {"source": "q.jsonl"}},
    "judges": {"cost": {"source": "c"}, "second": {"source": "d"}, "refusal": {"source": "refusal"}},
    "rankings": {"fresh": {"recipient": "sft", "donor": "dpo", "prompts": "few"}},
    "sweep": {"recipients": ["sft"], "donors": ["dpo"], "windows": [0, 1]},
    "sampling": {"temperature": 0.5},
}
SWEEP_KEYS = {
    **{(key,): value for key, value in TOP.items()},
    ("contrast_tokens",): 7,
    ("seen_sets",): ["more"],
    ("exclude_seen",): True,
    ("adapters", "sft"): ["b"],
    ("vllm", "max_model_len"): 9,
    ("judges", "cost", "source"): "other",
    ("judges", "cost", "format"): "tulu",
    **{("engine", key): value for key, value in (ENGINE | SIZES).items()},
    **{("models", "dpo", key): value for key, value in MODELS.items()},
    **{("sets", "few", key): value for key, value in PROMPTS.items()},
    **{("sampling", key): value for key, value in SAMPLING.items()},
    **{("sweep", key): value for key, value in SWEEP.items()},
    ("rankings", "fresh", "recipient"): "base",
    ("rankings", "fresh", "donor"): "base",
    ("rankings", "fresh", "prompts"): "more",
    ("rankings", "fresh", "positions"): "prompt",
    ("rankings", "fresh", "generate_with"): "donor",
}
REFUSED = {
    ("sets", "few", "seed"): "expected seed with sample",
    ("sampling", "logprobs"): "logprobs: expected false",
    ("sampling", "n"): "n: expected 1, got 2",
}
CONTRAST = {"recipient": "base", "donor": "sft", "prompts": "more", "generate_with": "donor"}
CONFIG_FILE = {
    **MODEL,
    "recipients": ["base"],
    "benchmarks": ["few"],
    "sets": SWEEP_FILE["sets"],
    "judges": SWEEP_FILE["judges"],
    "contrasts": {"safety": {"recipient": "sft", "donor": "dpo", "prompts": "few"}},
}
EXPERIMENT_KEYS = {
    path: value for path, value in SWEEP_KEYS.items() if path[0] not in ("sweep", "sampling", "rankings")
} | {
    ("max_tokens",): 7,
    ("harmless",): "more",
    ("recipients",): ["sft"],
    ("benchmarks",): ["more"],
    ("seeds", "1"): {"recipient": "sft", "donor": "dpo", "prompts": "few"},
    ("settings", "neuron_tokens"): {"tokens": 2},
    **{("contrasts", "safety", key): value for key, value in CONTRAST.items()},
}


def load_sweep_content(table: dict, folder: Path) -> tuple:
    """Return everything in a sweep file that a run reads."""
    spec = SweepSpec.from_dict(table, folder)
    engine = [spec.engine_config(backend) for backend in ("vllm", "transformers")] + [spec.engine.backend]
    return (
        *engine,
        spec.sweep,
        spec.sets,
        spec.judges,
        spec.rankings,
        spec.set_names,
        spec.judge_names,
        spec.contrast_tokens,
        spec.seen_sets,
        spec.exclude_seen,
    )


def experiment_parts(table: dict, folder: Path) -> tuple:
    """Return everything in an experiment config that a run reads."""
    config = build_experiment_config(table, folder)
    engine = [config.engine_config(backend) for backend in ("vllm", "transformers")] + [config.engine.backend]
    return (*engine, *(getattr(config, name) for name in sorted(names(ExperimentConfig, "engine", "folder"))))


def test_sweep_file_example_covers_its_schema():
    engine = names(EngineConfig, "model", "adapters", "models", "template", "capacity", "vllm") | names(Capacity)
    keys = under(("engine",), engine) | under(("sampling",), names(Sampling))
    keys |= under(("sweep",), {*names(SweepConfig, "sampling"), "sets", "judges"})
    keys |= under(("models", "dpo"), names(ModelSource)) | under(("sets", "few"), names(PromptSet))
    keys |= under(("rankings", "fresh"), names(RankingSource))
    keys |= {
        ("model",),
        ("template",),
        ("contrast_tokens",),
        ("seen_sets",),
        ("exclude_seen",),
        ("adapters", "sft"),
        ("vllm", "max_model_len"),
    }
    keys |= {("judges", "cost", "source"), ("judges", "cost", "format")}
    assert keys == SWEEP_KEYS.keys()
    top = {path[0] for path in EXPERIMENT_KEYS}
    assert top == names(ExperimentConfig, "folder") | {"model", "adapters", "models", "template", "vllm"}
    assert under(("contrasts", "safety"), names(Contrast)) <= EXPERIMENT_KEYS.keys()


@pytest.mark.parametrize("path", SWEEP_KEYS, ids=".".join)
def test_sweep_key_with_another_value_changes_the_run(path, tmp_path):
    table = set_key(SWEEP_FILE, path, SWEEP_KEYS[path])
    if path in REFUSED:
        with pytest.raises(SnpatchError, match=REFUSED[path]):
            load_sweep_content(table, tmp_path)
        return
    assert load_sweep_content(table, tmp_path) != load_sweep_content(SWEEP_FILE, tmp_path)


@pytest.mark.parametrize("path", EXPERIMENT_KEYS, ids=".".join)
def test_experiment_key_with_another_value_changes_the_run(path, tmp_path):
    table = set_key(CONFIG_FILE, path, EXPERIMENT_KEYS[path])
    if path in REFUSED:
        with pytest.raises(SnpatchError, match=REFUSED[path]):
            experiment_parts(table, tmp_path)
        return
    assert experiment_parts(table, tmp_path) != experiment_parts(CONFIG_FILE, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("max_tokens",), 9, "max_tokens: expected under sampling, got it at the top. Move it there."),
        (("contrast_tokens",), "9", "contrast_tokens: expected int, got '9'"),
        (("engine", "dtpe"), "bfloat16", "engine: dtpe: expected one of backend, chat_template_kwargs, dtype"),
        (("engine", "max_model_len"), 9, "engine: max_model_len: .* Arguments of vLLM's own are under vllm."),
        (("engine", "template"), "tulu", "engine: template: expected at the top of the file"),
        (("engine", "batch_size"), "9", "batch_size: expected int"),
        (("vllm", "dtype"), "bfloat16", "vllm: dtype: expected under engine. Move it there."),
        (("vllm", "template"), "tulu", "vllm: template: expected at the top of the file. Move it there."),
    ],
)
def test_misplaced_key_of_sweep_file_raises(path, value, message, tmp_path):
    with pytest.raises(SnpatchError, match=message):
        SweepSpec.from_dict(set_key(SWEEP_FILE, path, value), tmp_path)


@pytest.mark.parametrize("name", ["adapters", "models", "template", "engine", "vllm"])
def test_engine_key_with_config_and_without_model_raises(name, tmp_path):
    """Reject it, because the config's engine runs and the file's would be ignored."""
    table = {key: part for key, part in SWEEP_FILE.items() if key not in MODEL}
    part = {"template": "tulu", "engine": {"dtype": "bfloat16"}, "vllm": {"max_model_len": 9}}
    with pytest.raises(SnpatchError, match=f"{name}: expected model with it"):
        SweepSpec.from_dict({**table, "config": "demo", name: part.get(name, MODEL.get(name))}, tmp_path)


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_backend_of_experiment_config_is_the_contexts(backend, tmp_path):
    config = build_experiment_config(set_key(CONFIG_FILE, ("engine", "backend"), backend), tmp_path)
    assert config.engine_config().backend == backend
    assert ExperimentContext(config, tmp_path)._backend == backend
    assert config.engine_config("transformers").backend == "transformers", "an option goes before the file"


OTHER = {  # values of settings that not every value of their type is valid for
    "positions": "prompt", "control_kind": "everywhere", "class_weight": "balanced", "bos_each_window": True,
    "confidence": 0.5, "threshold": 0.25, "activations": "fitted", "extra_controls": ["matched"],
}  # fmt: skip


def change_value(name: str, value: object) -> object:
    """Return another valid value of a setting."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return [change_value("", element) for element in value]


@pytest.mark.parametrize("name", experiments.NAMES)
def test_settings_of_an_experiment_change_and_are_read(name):
    default, attributes = experiments.parse_settings(name, {}), _attributes_of_experiment(name)
    for field in fields(default):
        value = getattr(default, field.name)
        new_value = change_value(field.name, value) if value != () or field.name in OTHER else ["few"]
        assert experiments.parse_settings(name, {field.name: new_value}) != default, field.name
        assert field.name in attributes, f"{name} does not read {field.name}"


@cache
def _attributes(path: Path, objects: tuple[str, ...] | None = None) -> set[str]:
    """Return the attributes that a file reads; only of these names if there are any."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {
        node.attr
        for node in nodes
        if isinstance(node.ctx, ast.Load)
        and (objects is None or (isinstance(node.value, ast.Name) and node.value.id in objects))
    }


def _attributes_of_experiment(name: str) -> set[str]:
    """Return the settings that an experiment and the modules of `experiments/common` that it imports read."""
    path = SOURCE / "experiments" / f"{name}.py"
    attributes = _attributes(path, ("settings", "self"))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("snpatch.experiments.common"):
            modules = node.module.split(".")[3:] or [alias.name for alias in node.names]
            attributes |= set().union(*(_attributes_of_experiment(f"common/{module}") for module in modules))
    return attributes


@pytest.mark.parametrize(
    "kind",
    [
        EngineConfig,
        Capacity,
        ModelSource,
        Sampling,
        SweepConfig,
        RankingSource,
        Contrast,
        ExperimentConfig,
        Preset,
        Training,
        Size,
        Ability,
        TrainSettings,
        DpoSettings,
        ServeConfig,
    ],  # a PromptSet and an AbilityTask are read in their own files
    ids=lambda kind: kind.__name__,
)
def test_fields_of_file_schemas_are_read_elsewhere(kind):
    schema_file = SOURCE.joinpath(*kind.__module__.split(".")[1:]).with_suffix(".py")
    attributes = set().union(*(_attributes(path) for path in SOURCE.rglob("*.py") if path != schema_file))
    assert names(kind) - attributes <= {"folder"}


PRESET_FILE = {
    "config": {name: part for name, part in CONFIG_FILE.items() if name not in ("adapters", "models", "contrasts")},
    "training": {"seeds": [1, 2], "objectives": ["helpful"], "data": {"sft": {"source": "p.jsonl"}}},
    "size": {"parameters": 3, "kv_bytes": 4},
    "ability": {"tasks": {"mmlu": {"metric": "acc,none", "num_fewshot": 0}}},
}
TRAINING = {
    "learning_rate": 0.5, "epochs": 1.0, "batch_size": 8, "micro_batch_size": 2, "max_length": 9, "weight_decay": 0.5,
    "weight_decay_target": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 3, "dtype": "float32",
    "gradient_checkpointing": False, "template": "tokenizer", "lora_rank": 3, "lora_targets": ["o_proj"],
    "max_dropped": 0.5, "seed": 3,
}  # fmt: skip
DPO = {**TRAINING, "beta": 0.5, "max_prompt_length": 5, "as_published": True}
PRESET_KEYS = {
    ("title",): "other",
    ("published",): "gemma-7b",
    ("experiments",): ["neuron_tokens"],
    ("extends",): "demo",
    ("from_config",): "demo",
    ("config", "max_tokens"): 9,
    ("size", "parameters"): 9,
    ("size", "kv_bytes"): 9,
    ("ability", "tasks", "mmlu", "metric"): "acc_norm,none",
    ("ability", "tasks", "mmlu", "num_fewshot"): 5,
    ("ability", "tasks", "mmlu", "limit"): 3,
    ("ability", "include_path"): "tasks",
    ("training", "seeds"): [3],
    ("training", "objectives"): [],
    ("training", "generated_by"): "demo",
    ("training", "data", "sft", "source"): "q.jsonl",
    **{("training", "settings", name): value for name, value in TRAINING.items()},
    **{("training", "dpo", name): value for name, value in DPO.items()},
}


def test_preset_file_example_covers_its_schema():
    assert TRAINING.keys() == names(TrainSettings, "method")
    assert DPO.keys() == names(DpoSettings, "method")
    training = {path[1] for path in PRESET_KEYS if path[0] == "training"}
    assert training == {*names(Training, "sft"), "settings"}
    assert under(("size",), names(Size)) <= PRESET_KEYS.keys()
    assert under(("ability", "tasks", "mmlu"), names(AbilityTask)) <= PRESET_KEYS.keys()
    assert {path[1] for path in PRESET_KEYS if path[0] == "ability"} == names(Ability)


@pytest.mark.parametrize("path", PRESET_KEYS, ids=".".join)
def test_preset_key_with_another_value_changes_the_preset(path, tmp_path):
    file = tmp_path / "one.toml"
    file.write_text(tomli_w.dumps(PRESET_FILE))
    before = load_preset(str(file), trust=True)
    file.write_text(tomli_w.dumps(set_key(PRESET_FILE, path, PRESET_KEYS[path])))
    assert load_preset(str(file), trust=True) != before


@pytest.mark.parametrize("group", ["settings", "dpo"])
def test_preset_with_another_method_raises(group, tmp_path):
    file = tmp_path / "one.toml"
    file.write_text(tomli_w.dumps(set_key(PRESET_FILE, ("training", group, "method"), "lora")))
    with pytest.raises(SnpatchError, match="expected method = ia3, got lora"):
        load_preset(str(file))


def _server_keys() -> dict[tuple[str, ...], object]:
    """Return another value of each key of a server file."""
    values = {
        (f.name,): change_value(f.name, f.default) for f in fields(ServeConfig) if isinstance(f.default, int | float)
    }
    values |= {(name, "one"): "file" for name in (*FILES, "judges")}
    values |= {("patches", "one"): {"recipient": "sft"}, ("vllm_server", "port"): 9, ("vllm", "max_model_len"): 9}
    for name, default in _defaults(ServeConfig).items():
        if default is None:
            values[(name,)] = 2 if name.startswith("max_") else f"{name}-2"
    values[("open_route",)] = ["/metrics"]
    values |= {("capacity", name): value for name, value in SIZES.items()} | {("adapters", "sft"): ["b"]}
    values |= {("models", "dpo", name): value for name, value in MODELS.items()}
    return values | {(name,): value for name, value in (ENGINE | TOP).items()}


def _defaults(kind: type) -> dict[str, object]:
    return {f.name: f.default for f in fields(kind)}


def test_server_file_example_covers_its_schema():
    assert {path[0] for path in _server_keys()} == names(ServeConfig, "engine") | names(EngineConfig)


@pytest.mark.parametrize("path", _server_keys(), ids=".".join)
def test_server_key_with_another_value_changes_the_config(path):
    assert ServeConfig.from_dict(set_key(MODEL, path, _server_keys()[path])) != ServeConfig.from_dict(MODEL)


@pytest.mark.parametrize("load", [SweepSpec.load, load_experiment_config], ids=["sweep", "config"])
def test_unknown_key_of_a_file_raises_one_line(load, tmp_path):
    file = tmp_path / "one.toml"
    file.write_text(tomli_w.dumps({**(SWEEP_FILE if load == SweepSpec.load else CONFIG_FILE), "nonsense": 1}))
    with pytest.raises(SnpatchError, match="unknown key nonsense") as caught:
        load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("e.toml", 'model = "m"\n'), ("e.json", '{"model": "m"}')])
def test_byte_order_mark_before_config_is_ignored(tmp_path, name, text):
    (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8")
    assert EngineConfig.load(tmp_path / name).model == "m"


def test_byte_order_mark_before_adapter_config_is_ignored(tmp_path):
    from snpatch.models.peft_files import read_adapter_config

    (tmp_path / "adapter_config.json").write_text('\ufeff{"peft_type": "LORA"}', encoding="utf-8")
    assert read_adapter_config(tmp_path, "LORA") == {"peft_type": "LORA"}
