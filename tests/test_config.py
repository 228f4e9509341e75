"""EngineConfig: fields, files, errors, and options of the command line."""

import dataclasses
import inspect
import json
import pickle

import pytest
import typer

from snpatch import EngineConfig, Sampling, SnpatchError
from snpatch.cli.dataclass_options import EngineOptions, FieldOptions, Fields, with_options
from snpatch.config import Capacity
from snpatch.experiments.config import load_experiment_config
from snpatch.reproduce.preset import load_preset
from snpatch.server.config import ServeConfig
from snpatch.sweeps.sweep_file import SweepSpec

WHOLE = EngineConfig.of(
    "model", {"sft": "a", "dpo": ["a", "b"]}, backend="vllm", dtype="bfloat16", batch_size=4, max_rankings=3,
    tensor_parallel_size=2,
)  # fmt: skip


def test_config_arguments_are_sorted_to_fields():
    assert WHOLE.adapters == {"sft": ("a",), "dpo": ("a", "b")}
    assert WHOLE.capacity == Capacity(max_rankings=3)
    assert WHOLE.vllm == {"tensor_parallel_size": 2}
    assert WHOLE.changed(max_model_len=9).vllm == {"tensor_parallel_size": 2, "max_model_len": 9}
    assert WHOLE.changed(max_rankings=5, dtype="auto").capacity.max_rankings == 5


def test_config_is_frozen_and_serializable(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        WHOLE.dtype = "auto"
    assert pickle.loads(pickle.dumps(WHOLE)) == WHOLE
    assert EngineConfig.from_dict(json.loads(json.dumps(WHOLE.to_dict()))) == WHOLE
    WHOLE.save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json") == WHOLE
    assert EngineConfig("m").to_dict() == {"model": "m"}


def test_config_file_paths_are_relative_to_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "sft").mkdir()
    (tmp_path / "engine.toml").write_text('model = "model"\n[adapters]\nsft = "sft"\ndpo = ["sft", "hub/name"]\n')
    config = EngineConfig.load(tmp_path / "engine.toml")
    assert config.model == str(tmp_path / "model")
    assert config.adapters == {"sft": (str(tmp_path / "sft"),), "dpo": (str(tmp_path / "sft"), "hub/name")}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "engine: model is missing"),
        ({"model": "m", "nonsense": 1}, "unknown key nonsense; expected one of model, adapters"),
        ({"model": 3}, "model: expected str, got 3"),
        ({"model": "m", "adapters": ["a"]}, "adapters: expected a table"),
        ({"model": "m", "adapters": {"sft": 3}}, "adapters.sft: expected str, got 3"),
        ({"model": "m", "capacity": {"max_rankings": "3"}}, "capacity: max_rankings: expected int"),
        ({"model": "m", "capacity": {"max_rankings": 0}}, "max_rankings: expected at least 1, got 0"),
        ({"model": "m", "dtype": "float99"}, "dtype: expected one of auto, float32"),
        ({"model": "m", "backend": "jax"}, "backend: expected one of"),
        ({"model": "m", "batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_config_invalid_table_is_one_line(table, message):
    with pytest.raises(SnpatchError, match=message):
        EngineConfig.from_dict(table)


@pytest.mark.parametrize("content", ["model = ", "{", ""])
def test_config_unreadable_file_is_one_line(tmp_path, content):
    path = tmp_path / ("engine.json" if content == "{" else "engine.toml")
    path.write_text(content)
    with pytest.raises(SnpatchError, match=r"engine\.\w+: "):
        EngineConfig.load(path)
    with pytest.raises(SnpatchError, match="cannot be read"):
        EngineConfig.load(tmp_path / "none.toml")


def test_config_option_of_other_backend_is_refused():
    for options, message in (
        ({"backend": "transformers", "tensor_parallel_size": 2}, "unknown argument tensor_parallel_size"),
        ({"backend": "transformers", "streams": 1}, "unknown argument streams"),
    ):
        with pytest.raises(SnpatchError, match=message):
            EngineConfig.of("m", **options).checked_backend()
    assert EngineConfig.of("m", backend="transformers", token_budget=None).checked_backend() == "transformers"
    for options in ({"device": "cpu"}, {"token_budget": 9}):
        with pytest.raises(SnpatchError, match="with backend vllm"):
            EngineConfig.of("m", backend="vllm", **options).checked_backend()


def parse_command(command, arguments: list[str]):
    """Return the arguments that a command with these options received."""
    app, calls = typer.Typer(), []
    app.command()(with_options(**command)(_record_values(list(command), calls)))
    app(arguments, standalone_mode=False)
    return calls[0]


def _record_values(names: list[str], calls: list):
    def command(**values):
        calls.append(values)

    kind = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature([inspect.Parameter(n, kind, annotation=Fields) for n in names])
    return command


def test_options_have_dataclass_defaults():
    """Commands without options get the dataclass's defaults; no default is written twice."""
    names = tuple(f.name for f in dataclasses.fields(Sampling) if "help" in f.metadata)
    assert {"max_tokens", "temperature", "stop"} <= set(names)
    values = parse_command({"config": EngineOptions(), "sampling": FieldOptions(Sampling(), names)}, ["m"])
    assert values["config"] == EngineConfig("m")
    assert Sampling(**values["sampling"]) == Sampling()
    assert parse_command({"sampling": FieldOptions(Sampling(max_tokens=7), ("max_tokens",))}, []) == {
        "sampling": {"max_tokens": 7}
    }


def test_options_override_config_file(tmp_path):
    (tmp_path / "engine.toml").write_text('model = "m"\ndtype = "bfloat16"\n[capacity]\nmax_rankings = 3\n')
    arguments = [str(tmp_path / "engine.toml"), "-a", "sft=a,b", "--engine-arg", "max_model_len=9", "--backend", "vllm"]
    config = parse_command({"config": EngineOptions()}, arguments)["config"]
    assert config == EngineConfig.of(
        "m", {"sft": ["a", "b"]}, dtype="bfloat16", max_rankings=3, max_model_len=9, backend="vllm"
    )
    assert parse_command({"config": EngineOptions()}, [*arguments, "--dtype", "auto"])["config"].dtype == "auto"
    assert parse_command({"config": EngineOptions(has_model=False)}, ["--dtype", "float32"])["config"] == {
        "dtype": "float32"
    }


@pytest.mark.parametrize("option", ["sft", "=a", "sft="])
def test_adapter_option_invalid_is_one_line(option):
    with pytest.raises(SnpatchError, match="--adapter: expected name=folder"):
        parse_command({"config": EngineOptions()}, ["m", "-a", option])


@pytest.mark.parametrize("depth", [101, 500, 100_000])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", lambda n: "[" * n + "]" * n),
        ("a.json", lambda n: '{"a":' * n + "1" + "}" * n),
        ("a.toml", lambda n: "a = " + "[" * n + "]" * n),
        ("a.toml", lambda n: ".".join("a" * n) + " = 1"),
        ("a.toml", lambda n: "[" + ".".join("a" * n) + "]"),
        ("a.toml", lambda n: "a = {" + ".".join("a" * n) + " = 1}"),
    ],
)
def test_config_deeply_nested_file_is_one_line(tmp_path, name, content, depth):
    (tmp_path / name).write_text(content(depth))
    for load in (
        EngineConfig.load,
        ServeConfig.load,
        SweepSpec.load,
        load_experiment_config,
        lambda path: load_preset(str(path)),
    ):
        with pytest.raises(SnpatchError) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_error_long_value_is_shortened(tmp_path):
    (tmp_path / "a.toml").write_text(f"model = {['m' * 10_000]}")
    with pytest.raises(SnpatchError, match="expected str") as error:
        EngineConfig.load(tmp_path / "a.toml")
    assert len(str(error.value)) < 500
