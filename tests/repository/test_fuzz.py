"""Files with one random fault raise a one-line SnpatchError.

Why values are small: a size that is large and right would only take its time and memory.
"""

import copy
import json
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from snpatch import Engine, Sampling, SnpatchError
from snpatch.config import EngineConfig
from snpatch.data import load_dataset, read_completions
from snpatch.experiments.config import load_experiment_config
from snpatch.guard.guard import Guard
from snpatch.models.templates import TEMPLATE_FILE, TULU
from snpatch.patching.patch import Constant
from snpatch.ranking.ranking import Ranking
from snpatch.server.config import ServeConfig
from snpatch.sweeps.store import STORE_FILE, Store
from snpatch.sweeps.sweep_file import SweepSpec

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 1.5, -0.5, 64.0, float("nan"), float("inf")]),
    st.sampled_from(
        ["", "x", "1e-05", "float17", "[", "{{", "\u2019", "down_proj", ".*", "IA3", "LORA", "all-linear", "C"]
    ),
    st.sampled_from([[], [1], ["x"], [[]], {}, {"x": 1}, {"type": "x"}, {"": None}, [None], ["down_proj", "up_proj"]]),
)
CHAT = [[{"role": "user", "content": "bala bale"}]]


def limit_examples(examples):
    """Return settings for a test whose inputs are files: this many examples, no shrinking."""
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def leaves(table, path=()):
    """Yield the paths of all values of a JSON table."""
    if path:
        yield path
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in list(items)[:40]:
        yield from leaves(value, (*path, key))


def change_one_value(draw, table):
    """Return a copy of a table with one random value replaced or removed."""
    table = copy.deepcopy(table)
    path = draw(st.sampled_from(list(leaves(table))))
    parent = table
    for key in path[:-1]:
        parent = parent[key]
    if draw(st.integers(0, 4)):
        parent[path[-1]] = draw(VALUES)
    else:
        del parent[path[-1]]
    return table


def damage(draw, content):
    """Return a copy of bytes with some replaced, or the end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, min(len(content) - 1, 400)))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content) // 2, 3, 0]))])


def allow_snpatch_error(act):
    """Call a function that may raise a SnpatchError; any other error fails the test."""
    with warnings.catch_warnings(), suppress(SnpatchError):
        warnings.simplefilter("ignore")
        act()


def generate_text(folder, **arguments):
    """Start an engine and write a text."""
    with Engine(folder, backend="transformers", device="cpu", **arguments) as engine:
        return engine.generate(CHAT, "x" if "x" in engine.models else "base", Sampling(max_tokens=2))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder that examples overwrite."""
    return tmp_path_factory.mktemp("ground")


def copy_folder(source: Path, workspace: Path) -> Path:
    target = workspace / source.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def copy_changed(tiny_model, workspace: Path, name: str, change) -> Path:
    """Copy a model, with the content of one of its files changed."""
    folder = copy_folder(tiny_model.folder, workspace)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_models_with_one_wrong_value_raise_one_line_error(tiny_model, workspace, name):
    @limit_examples(60)
    @given(st.data())
    def check(data):
        def change(content):
            return json.dumps(change_one_value(data.draw, json.loads(content))).encode()

        folder = copy_changed(tiny_model, workspace, name, change)
        allow_snpatch_error(lambda: generate_text(folder, allow_untested=data.draw(st.booleans())))

    check()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_models_with_damaged_bytes_raise_one_line_error(tiny_model, workspace, name):
    @limit_examples(25)
    @given(st.data())
    def check(data):
        folder = copy_changed(tiny_model, workspace, name, lambda content: damage(data.draw, content))
        allow_snpatch_error(lambda: generate_text(folder))

    check()


TEMPLATES = st.one_of(
    st.sampled_from([
        "{{", "{% if %}", "{{ messages[9].content }}", "{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ none.x.y }}", "", " ",
        "{{ raise_exception('no') }}", "{% for m in 3 %}{% endfor %}", "{{ 'a' | nofilter }}", "{% include 'x' %}",
        "{{ messages | first | last }}", "{{ ''.__class__.__mro__ }}", "{{ strftime_now(3) }}", "{{ strftime_now() }}",
        "{% set x = x.y %}", "\ud7ff", "{{ range(10**9) | list }}", "{{ messages | tojson }}", TULU,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ]),
    st.text(alphabet="{}%|()[]'\" abmessages.0\n", max_size=30),
)  # fmt: skip


def test_arbitrary_chat_templates_raise_one_line_error(tiny_model, workspace):
    @limit_examples(60)
    @given(st.data())
    def check(data):
        folder = copy_folder(tiny_model.folder, workspace)
        (folder / TEMPLATE_FILE).write_text(data.draw(TEMPLATES), encoding="utf-8")
        allow_snpatch_error(lambda: generate_text(folder, template=data.draw(st.sampled_from(["auto", "tokenizer"]))))

    check()


@pytest.mark.parametrize("kind", ["ia3", "lora"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_with_one_wrong_value_raise_one_line_error(tiny_model, workspace, kind, name, tmp_path):
    source = tiny_model.adapters["sft"][0] if kind == "ia3" else tiny.write_lora(tiny_model.folder, tmp_path / "l")

    @limit_examples(60)
    @given(st.data())
    def check(data):
        folder = copy_folder(source, workspace)
        path = folder / name
        if name.endswith("json"):
            path.write_text(json.dumps(change_one_value(data.draw, json.loads(path.read_text()))))
        else:
            path.write_bytes(damage(data.draw, path.read_bytes()))
        arguments = {"adapters": {"x": folder}} if kind == "ia3" else {"models": {"x": {"lora": [str(folder)]}}}
        allow_snpatch_error(lambda: generate_text(tiny_model.folder, **arguments))

    check()


ROWS = [
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": []},
]


def read_all(path):
    """Read everything that a file of data can be read for."""
    data = load_dataset(path)
    return data.prompts, data.pairs(), data.conversations()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_arbitrary_data_files_raise_one_line_error(workspace, kind):
    import gzip

    import pyarrow
    import pyarrow.parquet

    @limit_examples(80)
    @given(st.data())
    def check(data):
        draw, path = data.draw, workspace / f"data.{kind}"
        rows = [draw(st.sampled_from(ROWS)) for _ in range(draw(st.integers(1, 3)))]
        rows = [change_one_value(draw, row) if draw(st.booleans()) else row for row in rows]
        content = "\n".join(map(json.dumps, rows)).encode()
        if kind == "json":
            content = json.dumps(rows).encode()
        elif kind == "csv":
            content = ("prompt,completion\n" + "\n".join(str(row.get("prompt")) + ",b" for row in rows)).encode()
        elif kind == "parquet":
            column = [draw(st.one_of(st.text(max_size=3), st.none())) for _ in range(3)]
            column_type = draw(st.sampled_from([pyarrow.string(), pyarrow.binary(), pyarrow.large_string()]))
            pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array(column, column_type)}), path)
            content = path.read_bytes()
        elif kind == "jsonl.gz":
            content = gzip.compress(content)
        if draw(st.integers(0, 2)) == 0:
            content = damage(draw, content)
        path.write_bytes(content)
        allow_snpatch_error(lambda: read_all(path))
        if kind == "jsonl":
            allow_snpatch_error(lambda: read_completions(path, None))

    check()


ENGINE = {"model": "m", "adapters": {"a": ["x"]}, "models": {"b": {"checkpoint": "w", "lora": ["l"]}},
          "dtype": "float32", "template": "tulu", "batch_size": 3, "capacity": {"streams": 2},
          "vllm": {"max_model_len": 64}}  # fmt: skip
SPEC = {"model": "m", "adapters": {"sft": "x", "dpo": "y"}, "sets": {"p": {"source": "p.jsonl", "first": 3}},
        "judges": {"cost": {"source": "refusal"}}, "rankings": {"r": "r.safetensors"}, "sampling": {"max_tokens": 3},
        "sweep": {"recipients": ["sft"], "donors": ["dpo"], "windows": [0, "1:2"], "strengths": [1.0]}}  # fmt: skip
SERVER = {**ENGINE, "rankings": {"r": "r.safetensors"}, "judges": {"c": "refusal"}, "drain_s": 3.0,
          "patches": {"p": {"recipient": "a", "donor": "b", "ranking": "r", "window": 3}},
          "open_route": ["/metrics"]}  # fmt: skip


@pytest.mark.parametrize(
    ("load", "table"), [(EngineConfig.load, ENGINE), (SweepSpec.load, SPEC), (ServeConfig.load, SERVER)]
)
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_config_files_with_one_wrong_value_raise_one_line_error(workspace, load, table, suffix):
    tomli_w = pytest.importorskip("tomli_w")

    @limit_examples(100)
    @given(st.data())
    def check(data):
        path, changed_table = workspace / f"config.{suffix}", change_one_value(data.draw, table)
        if suffix == "json":
            content = json.dumps(changed_table).encode()
        else:
            content = tomli_w.dumps(json.loads(json.dumps(changed_table).replace("null", '"null"'))).encode()
        path.write_bytes(damage(data.draw, content) if data.draw(st.integers(0, 3)) == 0 else content)
        allow_snpatch_error(lambda: load(path, trust=True))
        allow_snpatch_error(lambda: load_experiment_config(path, trust=True))

    check()


@pytest.mark.parametrize("kind", ["ranking", "constant", "guard", "store"])
def test_result_files_with_damaged_bytes_raise_one_line_error(workspace, kind):
    path = workspace / ("store" if kind == "store" else f"{kind}.safetensors")
    order = Ranking.from_scores(torch.arange(16.0).reshape(2, 8))
    if kind == "store":
        shutil.rmtree(path, ignore_errors=True)
        with Store(path) as store:
            store.finish_run(store.start_run("x"), "done")
        path = path / STORE_FILE
    elif kind == "ranking":
        order.save(path)
    elif kind == "constant":
        Constant.zero(order).save(path)
    else:
        features, labels = torch.arange(40.0).reshape(20, 2), [i % 2 == 0 for i in range(20)]
        prompts = [f"prompt {i}" for i in range(20)]
        Guard.fit(features, labels, order, prompts=prompts, model="m", fingerprint="d").save(path)
    content = path.read_bytes()

    @limit_examples(60)
    @given(st.data())
    def check(data):
        path.write_bytes(damage(data.draw, content))
        if kind == "store":
            for side_file in path.parent.glob(f"{STORE_FILE}-*"):
                side_file.unlink()
            allow_snpatch_error(lambda: _status(path.parent))
        else:
            allow_snpatch_error(lambda: {"ranking": Ranking, "constant": Constant, "guard": Guard}[kind].load(path))

    check()


def _status(folder):
    with Store(folder, must_exist=True) as store:
        return store.status(), list(store.records())
