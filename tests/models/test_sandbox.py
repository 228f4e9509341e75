"""Patterns and templates of downloaded folders end with a one-line error, however long they would run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers.utils.chat_template_utils import render_jinja_template

from snpatch.errors import SnpatchError
from snpatch.models import sandbox
from snpatch.models.adapters import load_adapters
from snpatch.models.lora import load_lora
from snpatch.models.templates import TULU, ChatTemplate, render_chat

ENDLESS = r"((\w|\.)+)+!"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
REAL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # of published models, as TRL ships them
DOUBLING = "{% set ns = namespace(x='ab') %}{% for _ in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LOOPS = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
OPTIONS = {"add_generation_prompt": True, "continue_final_message": False}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(sandbox, "MATCH_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "RENDER_SECONDS", 0.5)


def resolve_model_folder(tmp_path, config, tensors):
    (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def ia3(tmp_path, name=r"base_model.model.model.layers.0.mlp.down_proj.ia3_l", **config):
    config = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"], **config}
    return resolve_model_folder(tmp_path, config, {name: torch.ones(1, 4)})


def lora(tmp_path, **config):
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    return resolve_model_folder(tmp_path, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}, tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ENDLESS}, r"adapter_config\.json: target_modules: .*: expected an end within 0\.3 s"),
        ({"feedforward_modules": ENDLESS}, r"adapter_config\.json: feedforward_modules: .*: expected an end within"),
        ({"target_modules": "("}, r"target_modules: '\(': error: missing \)"),
        ({"target_modules": "(" * 50_000}, r"target_modules: '\(\("),
        ({"target_modules": 3}, "target_modules: expected a string or a list of strings, got 3"),
        ({"target_modules": ["down_proj", 3]}, "target_modules: expected a string or a list of strings, got"),
        ({"target_modules": {"a": 1}}, "target_modules: expected a string or a list of strings, got"),
        ({"feedforward_modules": [["down_proj"]]}, "feedforward_modules: expected a string or a list of strings, got"),
        ({"name": f"base_model.model.model.layers.{'9' * 5000}.mlp.down_proj.ia3_l"}, "unknown tensor"),
        ({"name": f"base_model.model.{'layers.1.' * 50_000}mlp.down_proj.ia3_l"}, "unknown tensor"),
        ({"name": "base_model.model.model.layers.\u0660.mlp.down_proj.ia3_l"}, "unknown tensor"),
    ],
)
def test_ia3_folder_with_bad_patterns_raises_one_line_error(tmp_path, config, message):
    with pytest.raises(SnpatchError, match=message) as error:
        load_adapters(ia3(tmp_path, **config), 1, {"down_proj": 4})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [(ENDLESS, "expected an end within 0.3 s"), ("(", "error: missing"), ("(?P<a>x)(?P<a>y)", "error: redefinition")],
)
def test_lora_folder_with_bad_patterns_raises_one_line_error(tmp_path, field, pattern, message):
    with pytest.raises(SnpatchError, match=rf"adapter_config\.json: {field}: .*{message}"):
        load_lora(lora(tmp_path, **{field: {pattern: 1}}))


def test_lora_patterns_match_as_in_peft(tmp_path):
    """The end of a name, a regular expression, and the first of several that fit."""
    lora(tmp_path, alpha_pattern={"x": 9, r"layers\.\d\..*": 3, "q_proj": 5})
    assert load_lora(tmp_path).updates["model.layers.0.self_attn.q_proj.weight"][2] == 3


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500, "9" * 5000, "{"])
def test_deeply_nested_adapter_config_raises_one_line_error(tmp_path, text):
    with pytest.raises(SnpatchError, match=r"adapter_config\.json: (not JSON|expected a JSON object)"):
        load_adapters(resolve_model_folder(tmp_path, text, {"a": torch.ones(1)}), 1, {"down_proj": 4})


# ---- templates ------------------------------------------------------------------------------------------------------


def render(template: str) -> str:
    return sandbox.render(template, CHAT, {"bos_token": "<s>"}, OPTIONS, "the template")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ none + 1 }}", "TypeError"),
        ("{{ 2.0 ** 99999 }}", "OverflowError"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError"),
        ("{{ 'a' * 20_000_000 }}", "expected at most 10000000 characters"),
        (DOUBLING, "MemoryError|end within"),
        (LOOPS, "end within 0.5 s"),
        (TREE, "end within 0.5 s"),
        ("{{ 7 ** (7 ** 9) }}", "end within 0.5 s"),
        ("{{ lipsum(n=10 ** 7) }}", "expected an end within 0.5 s"),
    ],
)
def test_failing_or_endless_template_raises_one_line_error(template, message):
    with pytest.raises(SnpatchError, match=f"the template: .*({message})") as error:
        render(template)
    assert "\n" not in str(error.value)
    assert render("{{ messages[0].content }}") == "hello"


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3", "llama3_training"])
def test_sandbox_renders_as_in_transformers(name, goes_on):
    """Both give the same string, also with continue_final_message."""
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    source, variables = (REAL / f"{name}.jinja").read_text(), {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = render_jinja_template([CHAT], chat_template=source, **options, **variables)
    assert sandbox.render(source, CHAT, variables, options, "t") == expected


def test_threads_share_the_sandbox():
    texts = [None] * 8

    def ask(i):
        texts[i] = render(f"{{{{ {i} }}}}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == list("01234567")


def test_forked_process_has_own_sandbox():
    assert render("{{ 1 }}") == "1"
    child = os.fork()
    if not child:
        os._exit(0 if render("{{ 2 }}") == "2" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ 3 }}") == "3"


def test_killed_sandbox_is_restarted():
    assert render("{{ 1 }}") == "1"
    os.kill(sandbox._sandbox._process.pid, signal.SIGKILL)
    sandbox._sandbox._process.wait()
    assert render("{{ 2 }}") == "2"


def test_sandbox_ends_with_parent_process():
    code = (
        "from snpatch.models import sandbox; import os\n"
        "sandbox.match(['a'], ['a'], 's')\n"
        "print(sandbox._sandbox._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(completed.stdout)
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().split()[2] == "Z":
                return
        threading.Event().wait(0.01)
    pytest.fail("the sandbox is still there")


def test_tokenizer_template_runs_in_sandbox_and_tulu_does_not(monkeypatch):
    sources = []
    monkeypatch.setattr(sandbox, "render", lambda source, *arguments: sources.append(source) or "text")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ 1 }}"
    assert ChatTemplate("tokenizer", tokenizer).render(CHAT[:1]) == "text"
    tokenizer.chat_template = TULU
    assert render_chat(CHAT[:1], tokenizer, add_generation_prompt=True).endswith("<|assistant|>\n")
    assert sources == ["{{ 1 }}"]
