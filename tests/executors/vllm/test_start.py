"""Start and end of vLLM: errors before it starts, its messages, and what it leaves."""

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
from left_behind import SHARED, leave_files, shared_memory_files
from processes import command_line, descendants, is_running
from safetensors.torch import load_file, save_file

from snpatch import Engine, Sampling, SnpatchError
from snpatch.executors.vllm import launch, log, processes, quantization

pytest.importorskip("vllm", reason="vLLM is not installed")

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def temporary(tmp_path, monkeypatch):  # tmp_path: pytest creates its folder before the temporary folder changes
    """Temporary folder of this process with a path short enough for sockets; it must be empty at the end."""
    folder = Path(tempfile.mkdtemp())
    with log.redirect_output():  # creates the log of this process outside of the folder
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    remaining = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not remaining


@pytest.mark.engine
def test_start_with_nan_in_a_weight_raises_one_line(forked, zoo, tmp_path, temporary):
    """On a CPU vLLM packs a linear layer's weight and empties it, so NaN could not be found afterwards."""
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
def test_killed_engine_leaves_only_its_log(zoo, temporary):
    with Engine(zoo("llama").folder, backend="vllm", **SMALL) as engine:
        (core,) = (pid for pid in descendants(os.getpid()) if b"EngineCore" in command_line(pid))
        shared = shared_memory_files(os.getpid())
        assert shared
        # A slow worker would write its last messages into the log of the next engine.
        workers = descendants(core)
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (core, signal.SIGKILL)).start()
        with pytest.raises(SnpatchError, match=r"vLLM's engine has ended; its log: \S+\.log$") as error:
            while True:
                engine.generate([[1, 5, 6]] * 64, sampling=Sampling(max_tokens=100, ignore_eos=True))
    assert "vllm" in Path(str(error.value).rpartition(" ")[2]).read_text()
    assert not [path for path in shared if path.exists()]
    assert not any(map(is_running, workers))


@pytest.mark.engine
def test_failed_start_reports_vllms_error_and_log(forked, zoo, temporary):
    cause = "ValueError: (No available memory for the cache blocks|To serve at least one request)"  # before 0.29
    with pytest.raises(SnpatchError, match=rf"^vLLM does not start: {cause}.+ \(its log: \S+\.log\)$") as error:
        Engine(zoo("llama").folder, backend="vllm", max_num_seqs=16, kv_cache_memory_bytes=1)
    assert "when initializing the engine" in Path(re.search(r"its log: (\S+)\)", str(error.value))[1]).read_text()


def test_removing_vllms_shared_memory_prints_nothing():
    """A name of vLLM's on a CPU holds an address; Python's resource tracker splits its messages at colons."""
    path = SHARED / f"127.0.0.1:{os.getpid()}-cpushm"
    path.touch()
    program = f"from snpatch.executors.vllm import child_processes as c; c._remove_shared({path.name!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr, path.exists()) == (0, "", False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SnpatchError, RuntimeError])
def test_failed_start_ends_processes_and_removes_their_files(temporary, error):
    from snpatch.executors.vllm.engine_lifecycle import engine_startup

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        model_config=SimpleNamespace(use_mla=True, hf_config=None),
    )
    arguments = SimpleNamespace(create_engine_config=lambda usage: config, additional_config=None)
    context = get_context("spawn")
    queue = context.Queue()
    with (
        pytest.raises(SnpatchError if error is RuntimeError else error),
        engine_startup(arguments, lambda config: None),
    ):
        process = context.Process(target=leave_files, args=(queue,), daemon=True)
        process.start()
        pid, block, folder = queue.get(timeout=60)
        shared = shared_memory_files(os.getpid())
        assert SHARED / block in shared
        assert (Path(folder) / "rendezvous").exists()
        raise error("ends")
    assert not is_running(pid)
    assert not Path(folder).exists()
    assert sorted({path.name[:4] for path in shared if not path.exists()}) == ["psm_", "sem."]
    queue.put("it can be used")  # shared memory of this process is not removed
    assert queue.get(timeout=10) == "it can be used"


def test_start_with_unsupported_head_size_raises(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU's attention has code for them")
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", NARROW)
    tiny_model = tiny.make("llama", tmp_path)
    with pytest.raises(
        SnpatchError, match=r"its heads have 16 values, .* takes 32, 64, .*; use backend=\"transformers\""
    ):
        Engine(tiny_model.folder, backend="vllm", **SMALL)


def test_plugin_registers_all_untested_architectures(monkeypatch):
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
def test_workers_share_all_cores_unless_the_user_has_bound_them(monkeypatch, workers, bound):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 0, 2})
    monkeypatch.delenv(launch.BIND_VARIABLE)
    monkeypatch.delenv(launch.OWN_BIND_VARIABLE, raising=False)
    for _ in range(2):  # a binding by an earlier engine of this process is not the user's
        launch._use_all_cores(workers)
        assert os.environ[launch.BIND_VARIABLE] == bound
    monkeypatch.setenv(launch.BIND_VARIABLE, "nobind")
    launch._use_all_cores(workers)
    assert os.environ[launch.BIND_VARIABLE] == "nobind"


def test_redirect_output_writes_to_the_log(capfd, monkeypatch):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    with log.redirect_output(), log.redirect_output():
        os.write(1, b"from C\n")
        subprocess.run(["sh", "-c", "echo from a process >&2"], check=True)
    os.write(2, b"the user's\n")
    assert capfd.readouterr() == ("", "the user's\n")
    text = Path(log.keep_log().removeprefix("its log: ")).read_text()
    assert text.endswith("from C\nfrom a process\n")


def test_redirect_output_after_importing_trl_writes_to_the_log(capfd, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    with log.redirect_output():
        os.write(2, b"from C\n")
    assert capfd.readouterr().err == ""
    assert log.keep_log().startswith("its log: ")


def test_redirect_output_with_a_logging_level_prints_to_stderr(capfd, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with log.redirect_output():
        os.write(2, b"from C\n")
    assert capfd.readouterr().err == "from C\n"
    assert log.keep_log() == "see vLLM's messages above"


@pytest.mark.engine
def test_command_prints_only_its_own_lines_and_leaves_no_files(zoo, tmp_path, temporary):
    """stderr has no messages of vLLM, torch, transformers or the resource tracker."""
    tiny_model = zoo("llama")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": tiny.PROMPTS[0]}) + "\n")
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "snpatch.cli", "generate", tiny_model.folder, tmp_path / "prompts.jsonl",
               "--max-tokens", "4", "--backend", "vllm", "--engine-arg", "kv_cache_memory_bytes=67108864"]  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    # A CUDA build of PyTorch without a GPU prints this.
    lines = [line for line in result.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (result.returncode, lines) == (0, ["generate: 1/1"])
    assert result.stdout.startswith("> ")
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
def test_first_error_is_the_first_since_mark_start(monkeypatch, of_engine, cause):
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    with log.redirect_output():
        os.write(1, LOG.replace("the root", "of an engine before").encode())
        log.mark_start()
        assert log.first_error(of_engine=of_engine) == ""
        os.write(1, LOG.encode())
    assert log.first_error(of_engine=of_engine) == cause
    log.keep_log()  # moves the log
    assert log.first_error(of_engine=of_engine) == cause


class FailingArguments:
    """Engine arguments whose config raises an error."""

    additional_config = None

    def __init__(self, error):
        self.error = error

    def create_engine_config(self, usage):
        raise self.error


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError, OSError, ImportError, AssertionError])
def test_failed_start_with_any_error_raises_one_line(kind, monkeypatch):
    from snpatch.executors.vllm.engine_lifecycle import engine_startup

    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    reason = "unknown or missing key 'broken'" if kind is KeyError else "broken"
    message = rf"^vLLM does not start: {kind.__name__}: {reason} \(its log: \S+\)$"
    with pytest.raises(SnpatchError, match=message), engine_startup(FailingArguments(kind("broken"))):
        pass


def test_failed_start_with_a_validation_error_reports_its_reason():
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
        engine_startup(FailingArguments(caught.value)),
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


def test_program_without_main_guard_gets_the_fix_in_its_error(tmp_path):
    (tmp_path / "program.py").write_text(UNGUARDED)
    reason = tmp_path / "reason"
    environment = {**os.environ, processes.ERROR_FILE_VARIABLE: str(reason), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    assert 'put the code under if __name__ == "__main__":' in result.stderr
    assert 'put the code under if __name__ == "__main__":' in reason.read_text()


@pytest.mark.full
@pytest.mark.engine
@pytest.mark.parametrize(
    ("is_stdin", "message"),
    [(False, 'put the code under if __name__ == "__main__":'), (True, "Save the program as a file")],
)
def test_engine_in_a_program_without_main_guard_raises_one_line(zoo, tmp_path, is_stdin, message):
    program = tmp_path / "program.py"
    arguments = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    program.write_text(
        f"from snpatch import Engine\nEngine({str(zoo('llama').folder)!r}, backend='vllm', {arguments})\n"
    )
    command = [sys.executable, "-"] if is_stdin else [sys.executable, program]
    source = program.read_text() if is_stdin else None
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]


def test_vllm_plugins_without_snpatch_raises(zoo, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,snpatch2")
    with pytest.raises(SnpatchError, match=r"^VLLM_PLUGINS=other,snpatch2: expected snpatch in the list.*unset"):
        Engine(zoo("llama").folder, backend="vllm", **SMALL)


@pytest.mark.parametrize(
    "table",
    [{"bits": 4}, {"w_bit": 4}, {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, {"bits": 8}, {}, None,
     {"config_groups": {"a": {"weights": None}}}],
)  # fmt: skip
@pytest.mark.parametrize("has_kernel", [True, False])
def test_check_kernels_with_4_bit_weights_and_no_kernel_raises(table, has_kernel, monkeypatch):
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
