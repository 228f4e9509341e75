"""Structure of the repository: what an import loads, the files of each op, and what tests import."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import snpatch
from snpatch import experiments
from snpatch.op import ops

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("sklearn", "matplotlib", "vllm", "trl", "scipy", "datasets")


def loaded_packages(code: str) -> set[str]:
    """Return the packages that a fresh interpreter has loaded after running some code."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps([m.split('.')[0] for m in sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import snpatch", {*HEAVY, "torch", "transformers"}),
        ("from snpatch import Engine, AsyncEngine", HEAVY),
        ("from snpatch import EngineConfig, Sampling, Window", {*HEAVY, "torch", "transformers"}),
        ("from snpatch import Patch, Ranking, Constant, Noise", HEAVY),
        ("import snpatch.cli", {*HEAVY, "torch", "transformers"}),
    ],
)
def test_import_loads_no_heavy_package(code, without):
    packages = loaded_packages(code)
    assert "snpatch" in packages
    assert packages & set(without) == set()


def test_op_has_its_six_places():
    """Each op has one name in its definition, dispatch, C++, Triton, tests and bench."""
    names = {name.split(" ")[0] for name in ops.implementations()}
    assert names == set(re.findall(r'"(\w+)\(Tensor', (ROOT / "snpatch/op/ops.py").read_text()))
    assert names
    for name in names:
        for pattern in ("csrc/{}.cpp", "kernels/{}.py", "tests/op/test_{}.py", "bench/bench_{}.py"):
            assert (ROOT / pattern.format(name)).is_file(), pattern.format(name)
        for module in ("reference", "ops"):
            assert re.search(rf"^def {name}\(", (ROOT / f"snpatch/op/{module}.py").read_text(), re.M), module
    kinds = ("csrc", "cpp"), ("kernels", "py")
    sources = {path.stem for folder, kind in kinds for path in (ROOT / folder).glob(f"*.{kind}")}
    assert sources - {"module"} == names, "a kernel without an op"


def test_tests_import_no_tests():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert len(files) > 40
    for file in files:
        assert not re.search(r"^\s*(from|import) test_", file.read_text(), re.M), file


def test_independence_contract_names_every_experiment():
    text = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r'"snpatch\.experiments\.(\w+)"', text)) == set(experiments.NAMES)


def test_engine_module_without_docstrings_is_short():
    text = (ROOT / "snpatch/engine/engine.py").read_text()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [n.body[0] for n in nodes if ast.get_docstring(n)]
    assert len(text.splitlines()) - sum(d.end_lineno - d.lineno + 1 for d in docstrings) <= 220


def test_public_names_are_the_same_for_users_and_type_checkers():
    (block,) = [node for node in ast.parse((ROOT / "snpatch/__init__.py").read_text()).body if isinstance(node, ast.If)]
    declared = {node.names[0].asname: node.module for node in block.body}
    assert declared == {name: f"snpatch.{module}" for name, module in snpatch._MODULES.items()}
    assert {*snpatch.__all__} <= {*dir(snpatch)}
    for name in snpatch.__all__:
        assert getattr(snpatch, name).__name__ == name


def test_readme_api_table_names_are_public():
    section = (ROOT / "README.md").read_text().split("## Python API")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.+?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert len(names) > 20
    assert names <= {*snpatch.__all__}


def test_promise_table_names_every_file_that_tests_a_promise():
    """None of these tests is left to `make test-full`."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Promises")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d)\. .+ \| (.+) \|", section, re.M)
    table = {number: {*re.findall(r"`(\S+\.py)`", tests)} for number, tests in rows}
    files_by_promise = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        for marks, number in re.findall(r"((?:^@.+\n)*)^def test_promise_(\d)_", file.read_text(), re.M):
            assert "mark.full" not in marks, file
            files_by_promise.setdefault(number, set()).add(file.relative_to(ROOT / "tests").as_posix())
    assert files_by_promise == table
    assert sorted(files_by_promise) == list("12345678")


def test_version_is_written_once():
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"\nversion: {snpatch.__version__}\n" in (ROOT / "CITATION.cff").read_text()


BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def nesting(node: ast.AST) -> int:
    """Return how many blocks are nested in each other below a node; `elif` adds none."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_functions_nest_at_most_four_blocks():
    deep = []
    for path in (ROOT / "snpatch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and nesting(node) > 4:
                deep.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {nesting(node)}")
    assert not deep, "\n".join(deep)


def test_each_class_name_is_one_class():
    for folder in ("snpatch", "bench"):
        places: dict[str, list[str]] = {}
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
        assert not {name: found for name, found in places.items() if len(found) > 1}


# Modules of one name in several packages have the same subject there (a config, errors, a base class), or a command or
# experiment has the name of what it runs.
SHARED_MODULE_NAMES = {
    "__init__", "base", "config", "contrast", "curve", "errors", "executor", "files", "guard", "perplexity", "report",
    "surgery", "sweep",
}  # fmt: skip


def test_modules_of_one_name_have_one_subject():
    names = [path.stem for path in (ROOT / "snpatch").rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} == SHARED_MODULE_NAMES
