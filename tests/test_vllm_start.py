"""Where vLLM starts and ends: what is refused before it starts, what its messages become, and what is left of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from left_behind import SHARED, shared_below, untidy
from processes import command_line, descendants, is_running
from safetensors.torch import load_file, save_file

from snpatch import Engine, Sampling, SnpatchError
from snpatch.executors.vllm import launch, log, processes, quantization

pytest.importorskip("vllm", reason="vLLM is not installed")

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def temporary(tmp_path, monkeypatch):  # pytest has its own folder by now
    """This process's temporary folder, whose path has room for a socket; empty at the end."""
    folder = Path(tempfile.mkdtemp())
    with log.redirect_output():  # the one log of this process is elsewhere
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not left


@pytest.mark.engine
def test_nan_in_a_weight_that_vllm_packs_ends_the_start_in_one_line(zoo, tmp_path, temporary):
    """On a CPU vLLM empties a linear layer's weight once it has packed it: afterwards nobody would see it."""
    shutil.copytree(zoo("llama").folder, tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(path)
    weights[name][5, 7] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SnpatchError) as error:
        Engine(tmp_path / "model", backend="vllm", **SMALL)
    assert str(error.value) == f"{tmp_path / 'model'}: weight {name} holds NaN or infinity"
    assert not [pid for pid in descendants(os.getpid()) if b"VLLM" in command_line(pid)]


@pytest.mark.engine
def test_a_killed_engine_leaves_its_log_and_nothing_else(zoo, temporary):
    with Engine(zoo("llama").folder, backend="vllm", **SMALL) as engine:
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        shared = shared_below(os.getpid())
        assert shared
        threading.Timer(0.5, os.kill, (core, signal.SIGKILL)).start()
        with pytest.raises(SnpatchError, match=r"vLLM's engine has ended; its log: \S+\.log$") as error:
            while True:
                engine.generate([[1, 5, 6]] * 64, sampling=Sampling(max_tokens=100, ignore_eos=True))
    assert "vllm" in Path(str(error.value).rpartition(" ")[2]).read_text()
    assert not [path for path in shared if path.exists()]


@pytest.mark.engine
def test_what_vllm_says_when_it_does_not_start_is_in_the_error_and_the_log(zoo, temporary):
    cause = "ValueError: No available memory for the cache blocks"
    with pytest.raises(SnpatchError, match=rf"^vLLM does not start: {cause}.+ \(its log: \S+\.log\)$") as error:
        Engine(zoo("llama").folder, backend="vllm", max_num_seqs=16, kv_cache_memory_bytes=1)
    assert "when initializing the engine" in Path(re.search(r"its log: (\S+)\)", str(error.value))[1]).read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SnpatchError, RuntimeError])
def test_what_was_started_before_a_start_fails_is_ended_and_removed(temporary, error):
    from snpatch.executors.vllm.engine_lifecycle import engine_startup

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        model_config=SimpleNamespace(use_mla=True, hf_config=None),
    )
    arguments = SimpleNamespace(create_engine_config=lambda usage: config, additional_config=None)
    context = get_context("spawn")
    told = context.Queue()
    with (
        pytest.raises(SnpatchError if error is RuntimeError else error),
        engine_startup(arguments, lambda config: None),
    ):
        process = context.Process(target=untidy, args=(told,), daemon=True)
        process.start()
        pid, block, folder = told.get(timeout=60)
        shared = shared_below(os.getpid())
        assert SHARED / block in shared
        assert (Path(folder) / "rendezvous").exists()
        raise error("ends")
    assert not is_running(pid)
    assert not Path(folder).exists()
    assert sorted({path.name[:4] for path in shared if not path.exists()}) == ["psm_", "sem."]
    told.put("it can be used")  # what this process holds, too, is not removed
    assert told.get(timeout=10) == "it can be used"


def test_heads_that_vllms_attention_has_no_code_for_are_refused_at_once(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU's attention has code for them")
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", NARROW)
    made = tiny.make("llama", tmp_path)
    with pytest.raises(
        SnpatchError, match=r"its heads have 16 values, .* takes 32, 64, .*; use backend=\"transformers\""
    ):
        Engine(made.folder, backend="vllm", **SMALL)


def test_two_architectures_that_are_tried_are_both_registered(monkeypatch):
    from vllm import ModelRegistry

    from snpatch.executors.vllm.worker import plugin

    monkeypatch.setenv(plugin.UNTESTED_VARIABLE, "")
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    for name in ("OlmoForCausalLM", "GraniteForCausalLM", "OlmoForCausalLM"):
        plugin.add_untested(name)
    plugin.register()
    assert {"SnpatchOlmoForCausalLM", "SnpatchGraniteForCausalLM"} <= set(ModelRegistry.get_supported_archs())
    assert os.environ[plugin.UNTESTED_VARIABLE] == "GraniteForCausalLM,OlmoForCausalLM"


@pytest.mark.parametrize(("workers", "bound"), [(1, "0,2,3"), (2, "0|2"), (4, "0|2|3|3")])
def test_workers_share_all_cores_unless_a_user_bound_them(monkeypatch, workers, bound):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 0, 2})
    monkeypatch.delenv(launch.BIND_VARIABLE)
    monkeypatch.delenv(launch.OWN_BIND_VARIABLE, raising=False)
    for _ in range(2):  # what the first engine of a process bound is no user's wish
        launch._use_all_cores(workers)
        assert os.environ[launch.BIND_VARIABLE] == bound
    monkeypatch.setenv(launch.BIND_VARIABLE, "nobind")
    launch._use_all_cores(workers)
    assert os.environ[launch.BIND_VARIABLE] == "nobind"


def test_what_is_written_in_a_quiet_block_is_in_the_log(capfd, monkeypatch):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    with log.redirect_output(), log.redirect_output():
        os.write(1, b"from C\n")
        subprocess.run(["sh", "-c", "echo from a process >&2"], check=True)
    os.write(2, b"the user's\n")
    assert capfd.readouterr() == ("", "the user's\n")
    text = Path(log.keep_log().removeprefix("its log: ")).read_text()
    assert text.endswith("from C\nfrom a process\n")


def test_what_an_import_of_trl_sets_asks_for_no_messages(capfd, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    with log.redirect_output():
        os.write(2, b"from C\n")
    assert capfd.readouterr().err == ""
    assert log.keep_log().startswith("its log: ")


def test_a_user_who_asks_for_vllms_messages_has_them(capfd, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with log.redirect_output():
        os.write(2, b"from C\n")
    assert capfd.readouterr().err == "from C\n"
    assert log.keep_log() == "see vLLM's messages above"


@pytest.mark.engine
def test_a_command_has_its_own_lines_on_stderr_and_leaves_nothing(zoo, tmp_path, temporary):
    """The first screen: nothing of vLLM, torch or transformers on it, nor of shared memory that nobody removed."""
    made = zoo("llama")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": tiny.PROMPTS[0]}) + "\n")
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "snpatch.cli", "generate", made.folder, tmp_path / "prompts.jsonl",
               "--max-tokens", "4", "--backend", "vllm", "--engine-arg", "kv_cache_memory_bytes=67108864"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # A CUDA build of PyTorch where there is no card says so at once.
    lines = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (done.returncode, lines) == (0, ["generate: 1/1"])
    assert done.stdout.startswith("> ")
    assert not list(temporary.iterdir())


LOG = """(EngineCore pid=1) WARNING 11-29 21:18:08 [model.py:2660] ValueError: of no traceback
Exception ignored in: <finalize object>
Traceback (most recent call last):
  File "a.py", line 1, in b
OSError: of a finalizer
(MainProcess pid=3) ERROR 11-29 21:19:46 [serving.py:500] Traceback (most recent call last):
(MainProcess pid=3) ERROR 11-29 21:19:46 [serving.py:500]   File "a.py", line 2, in c
(MainProcess pid=3) ERROR 11-29 21:19:46 [serving.py:500] KeyError: of a request
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510]   File "a.py", line 1, in b
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510]     raise ValueError(
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510]           ^^^^^^^^^^
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] a.b.RootError: the root
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] 
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] The above exception was the direct cause of the following:
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-29 21:19:46 [core.py:1510] RuntimeError: what came of it
"""


@pytest.mark.parametrize(("of_engine", "cause"), [(False, "KeyError: of a request"), (True, "a.b.RootError: the root")])
def test_the_cause_is_the_first_error_since_an_engine_started(monkeypatch, of_engine, cause):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    with log.redirect_output():
        os.write(1, LOG.replace("the root", "of an engine before").encode())
        log.mark_start()
        assert log.first_error(of_engine=of_engine) == ""
        os.write(1, LOG.encode())
    assert log.first_error(of_engine=of_engine) == cause
    log.keep_log()  # which moves the log
    assert log.first_error(of_engine=of_engine) == cause


class Config:
    """A config of vLLM's that fails while it is made."""

    additional_config = None

    def __init__(self, error):
        self.error = error

    def create_engine_config(self, usage):
        raise self.error


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError, OSError, ImportError, AssertionError])
def test_a_start_that_fails_with_any_error_is_one_line(kind, monkeypatch):
    from snpatch.executors.vllm.engine_lifecycle import engine_startup

    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    wanted = rf"^vLLM does not start: {kind.__name__}: '?broken'? \(its log: \S+\)$"
    with pytest.raises(SnpatchError, match=wanted), engine_startup(Config(kind("broken"))):
        pass


def test_what_vllms_own_checks_refuse_is_told_by_its_reason():
    from pydantic import BaseModel, field_validator

    from snpatch.executors.vllm.engine_lifecycle import engine_startup

    class Sizes(BaseModel):
        length: int

        @field_validator("length")
        @classmethod
        def check(cls, value):
            raise ValueError("the length is too long\nand more")

    with pytest.raises(ValueError, match="1 validation error") as caught:
        Sizes(length=1)
    with (
        pytest.raises(SnpatchError, match="vLLM does not start: Value error, the length is too long"),
        engine_startup(Config(caught.value)),
    ):
        pass


UNGUARDED = """
from snpatch.executors.vllm.engine_lifecycle import engine_startup
from multiprocessing import get_context
import os, sys
if os.environ.get("IS_CHILD"):
    with engine_startup(None):
        pass
os.environ["IS_CHILD"] = "1"
get_context("spawn").Process(target=print).start()
"""


def test_a_program_without_a_guard_is_told_to_have_one(tmp_path):
    (tmp_path / "program.py").write_text(UNGUARDED)
    reason = tmp_path / "reason"
    environment = {**os.environ, processes.ERROR_FILE_VARIABLE: str(reason), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert 'put the code under if __name__ == "__main__":' in done.stderr
    assert 'put the code under if __name__ == "__main__":' in reason.read_text()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("is_stdin", "message"),
    [(False, 'put the code under if __name__ == "__main__":'), (True, "Save the program as a file")],
)
def test_an_engine_without_a_guard_is_one_line(zoo, tmp_path, is_stdin, message):
    program = tmp_path / "program.py"
    arguments = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    program.write_text(
        f"from snpatch import Engine\nEngine({str(zoo('llama').folder)!r}, backend='vllm', {arguments})\n"
    )
    command = [sys.executable, "-"] if is_stdin else [sys.executable, program]
    given = program.read_text() if is_stdin else None
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_plugins_of_vllm_without_snpatch_are_refused(zoo, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,snpatch2")
    with pytest.raises(SnpatchError, match=r"^VLLM_PLUGINS=other,snpatch2: expected snpatch in the list.*unset"):
        Engine(zoo("llama").folder, backend="vllm", **SMALL)


@pytest.mark.parametrize(
    "table",
    [{"bits": 4}, {"w_bit": 4}, {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, {"bits": 8}, {}, None,
     {"config_groups": {"a": {"weights": None}}}],
)  # fmt: skip
@pytest.mark.parametrize("has_kernel", [True, False])
def test_weights_of_4_bits_need_a_cpu_with_kernels(table, has_kernel, monkeypatch):
    from vllm.platforms import current_platform

    config = SimpleNamespace(
        model_config=SimpleNamespace(model="m", hf_config=SimpleNamespace(quantization_config=table))
    )
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    operators = SimpleNamespace(**{quantization.CPU_4_BIT_OPERATOR: 1} if has_kernel else {})
    monkeypatch.setattr(quantization.torch.ops, "_C", operators)
    if has_kernel or not table or "4" not in str(table):
        quantization.check_kernels(config)
    else:
        with pytest.raises(SnpatchError, match=r"m: its weights have 4 bits, .* needs AVX-512"):
            quantization.check_kernels(config)
