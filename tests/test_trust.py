"""Values of a config file that may run code or open the host are refused unless the file is trusted."""

import json
from importlib.resources import files as package_files

import pytest
import tomli_w
from commands import run

from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.experiments.config import load_experiment_config
from snpatch.reproduce.preset import PRESET_NAMES, load_preset
from snpatch.server.config import ServeConfig
from snpatch.sweeps.eval_config import NAMED_CONFIGS
from snpatch.sweeps.sweep_file import SweepSpec

ENGINE = {
    "trust_remote_code": True, "worker_cls": "evil.Worker", "worker_extension_cls": "evil.Extension",
    "logits_processors": ["evil:Processor"], "allowed_local_media_path": "/", "allowed_media_domains": ["x"],
    "hf_overrides": {"auto_map": {"AutoModel": "evil.Model"}}, "model_loader_extra_config": {"a": 1},
    "io_processor_plugin": "evil", "reasoning_parser_plugin": "evil.py", "load_format": "tensorizer",
    "kv_transfer_config": {"kv_connector_module_path": "evil"}, "scheduler_cls": "evil.Scheduler",
    "compilation_config": {"backend": "evil.backend"}, "distributed_executor_backend": "evil.Executor",
    "otlp_traces_endpoint": "http://evil.example", "download_dir": "/etc", "tokenizer": "/elsewhere",
    "quantization": "evil.module", "hf_token": "x", "code_revision": "main", "profiler_config": {"dir": "/"},
    "speculative_config": {"model": "evil"}, "something_of_the_next_version": 1,
}  # fmt: skip
SERVER = {
    "middleware": ["evil.Middleware"], "tool_parser_plugin": "evil.py", "host": "0.0.0.0", "uds": "/tmp/socket",
    "ssl_keyfile": "/etc/key", "ssl_certfile": "/etc/cert", "ssl_ca_certs": "/etc/ca", "chat_template": "/etc/passwd",
    "lora_modules": ["a=/etc"], "root_path": "/x", "allow_credentials": True, "allowed_origins": ["*"],
    "api_server_count": 4, "tool_server": "evil.example:80", "trust_request_chat_template": True, "config": "/etc/x",
    "enable_offline_docs": True, "tool_call_parser": "/etc/evil.py",
}  # fmt: skip
HARMLESS = {
    "max_model_len": 128, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "enforce_eager": True,
    "kv_cache_dtype": "fp8_e4m3", "quantization": "compressed-tensors", "load_format": "dummy", "max_num_seqs": 4,
    "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2]}, "revision": "refs/pr/1",
    "served_model_name": "meta/Llama-2.7b",
}  # fmt: skip


def write(path, table):
    path.write_text(tomli_w.dumps(table) if path.suffix == ".toml" else json.dumps(table))
    return path


def config_table(judge="refusal", **vllm) -> dict:
    return {
        "model": "m", "adapters": {"sft": "a", "dpo": "b"}, "recipients": ["sft"], "benchmarks": ["p"],
        "sets": {"p": {"source": "p.jsonl"}}, "judges": {"cost": {"source": judge}},
        "contrasts": {"safety": {"recipient": "sft", "donor": "dpo", "prompts": "p"}}, "vllm": vllm,
    }  # fmt: skip


def sweep_table(judge="refusal", **vllm) -> dict:
    table = {name: value for name, value in config_table(judge, **vllm).items() if name in SWEPT}
    sweep = {"recipients": ["sft"], "donors": ["dpo"], "windows": [0, 4]}
    return {**table, "rankings": {"r": {"recipient": "sft", "donor": "dpo", "prompts": "p"}}, "sweep": sweep}


SWEPT = ("model", "adapters", "sets", "judges", "vllm")
LOADERS = {
    "engine": (EngineConfig.load, lambda **vllm: {"model": "m", "vllm": vllm}),
    "server": (ServeConfig.load, lambda **vllm: {"model": "m", "vllm": vllm}),
    "config": (load_experiment_config, config_table),
    "sweep": (SweepSpec.load, sweep_table),
    "preset": (
        lambda path, trust=False: load_preset(str(path), trust=trust),
        lambda **v: {"config": config_table(**v)},
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ENGINE)
def test_engine_argument_that_may_run_code_is_refused_in_file(tmp_path, kind, name):
    load, table = LOADERS[kind]
    path = write(tmp_path / "file.toml", table(**{name: ENGINE[name]}))
    with pytest.raises(SnpatchError, match=rf"vllm\.{name}.*--trust-config") as error:
        load(path)
    assert str(path) in str(error.value)
    load(path, trust=True)


@pytest.mark.parametrize("kind", LOADERS)
def test_harmless_engine_arguments_are_accepted(tmp_path, kind):
    load, table = LOADERS[kind]
    load(write(tmp_path / "file.toml", table(**HARMLESS)))


@pytest.mark.parametrize("kind", ["config", "sweep", "preset"])
def test_function_judge_is_refused_in_file(tmp_path, kind):
    load, table = LOADERS[kind]
    path = write(tmp_path / "file.toml", table(judge="mark:go"))
    with pytest.raises(SnpatchError, match=r"judges\.cost\.source = 'mark:go': .*--trust-config"):
        load(path)
    load(path, trust=True)


def test_judge_with_engine_arguments_is_refused_in_file(tmp_path):
    table = config_table()
    table["judges"]["cost"] = {"source": "model", "format": "{prompt}: {completion}", "trust_remote_code": True}
    with pytest.raises(SnpatchError, match=r"judges\.cost\.trust_remote_code = True: .*--trust-config"):
        load_experiment_config(write(tmp_path / "experiment.toml", table))


def test_experiment_config_of_sweep_is_checked_with_sweep_file(tmp_path):
    write(tmp_path / "experiment.toml", config_table(judge="mark:go"))
    table = {name: value for name, value in sweep_table().items() if name not in SWEPT}
    path = write(tmp_path / "sweep.json", {**table, "config": "experiment.toml"})
    with pytest.raises(SnpatchError, match=r"sweep\.json: judges\.cost\.source = 'mark:go'"):
        SweepSpec.load(path)
    assert SweepSpec.load(path, trust=True).judges["cost"]["source"] == "mark:go"


@pytest.mark.parametrize("name", SERVER)
def test_server_flag_that_opens_host_is_refused_in_file(tmp_path, name):
    path = write(tmp_path / "serve.toml", {"model": "m", "vllm_server": {name: SERVER[name]}})
    with pytest.raises(SnpatchError, match=rf"serve\.toml: vllm_server\.{name} = .*--trust-config"):
        ServeConfig.load(path)
    assert ServeConfig.load(path, trust=True).vllm_server == {name: SERVER[name]}


@pytest.mark.parametrize(
    "table", [{"allow_upload": "/etc"}, {"open_route": ["/metrics"]}, {"judges": {"mine": "mark:go"}}]
)
def test_upload_folder_open_route_and_function_judge_are_refused_in_file(tmp_path, table):
    path = write(tmp_path / "serve.toml", {"model": "m", **table})
    with pytest.raises(SnpatchError, match=r"(allow_upload|open_route|judges\.mine) = .*--trust-config"):
        ServeConfig.load(path)
    ServeConfig.load(path, trust=True)


def test_harmless_server_flags_are_accepted(tmp_path):
    flags = {"port": 8000, "api_key": "secret/key", "tool_call_parser": "llama3_json", "uvicorn_log_level": "warning"}
    assert ServeConfig.load(write(tmp_path / "s.toml", {"model": "m", "vllm_server": flags})).vllm_server == flags


def test_shipped_configs_need_no_trust():
    for name in NAMED_CONFIGS:
        load_experiment_config(name)
    for name in PRESET_NAMES:
        load_preset(name)
    assert list(package_files("snpatch.reproduce").joinpath("presets").iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "FILE", "prompts.jsonl"],
        ["contrast", "FILE", "prompts.jsonl", "--recipient", "base", "-o", "r.safetensors"],
        ["serve", "FILE"],
    ],
)
def test_command_error_names_key_file_and_option(tmp_path, capsys, words):
    path = write(tmp_path / "engine.toml", {"model": "m", "vllm": {"worker_cls": "evil.Worker"}})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    paths = {"FILE": path, "prompts.jsonl": tmp_path / "prompts.jsonl"}
    code, _, err = run(capsys, *(paths.get(word, word) for word in words))
    assert (code, err.count("\n")) == (2, 1)
    assert "engine.toml: vllm.worker_cls" in err
    assert "--trust-config" in err


def test_command_line_needs_no_trust(tmp_path, capsys):
    code, out, err = run(capsys, "serve", "m", "--engine-arg", "trust_remote_code=true", "--host", "0.0.0.0",
                         "--allow-upload", tmp_path, "--judge", "mine=mark:go", "--print-config")  # fmt: skip
    assert code == 0, err
    (tmp_path / "serve.toml").write_text(out)
    assert run(capsys, "serve", tmp_path / "serve.toml", "--print-config")[0] == 2
    assert run(capsys, "serve", tmp_path / "serve.toml", "--trust-config", "--print-config")[1] == out


@pytest.mark.parametrize("extends", ["../../../../tmp/evil", 3, ["demo"]])
def test_preset_can_extend_only_shipped_presets(tmp_path, extends):
    with pytest.raises(SnpatchError, match="extends: expected a shipped preset"):
        load_preset(str(write(tmp_path / "p.toml", {"extends": extends})))
