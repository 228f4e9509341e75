"""The house: what an import loads, where each op stands, and that tests stand on support alone."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snpatch
from snpatch import experiments
from snpatch.op import ops

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("sklearn", "matplotlib", "vllm", "trl", "scipy", "datasets")


def loaded(code: str) -> set[str]:
    """Packages that a fresh interpreter has loaded after some code."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps([m.split('.')[0] for m in sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(told.stdout.splitlines()[-1]))


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
def test_an_import_loads_no_more_than_it_needs(code, without):
    found = loaded(code)
    assert "snpatch" in found
    assert found & set(without) == set()


def test_every_op_stands_in_its_six_places():
    """One op, one name: definition, dispatch, C++, Triton, tests, bench."""
    names = {name.split(" ")[0] for name in ops.implementations()}
    assert names == set(re.findall(r'"(\w+)\(Tensor', (ROOT / "snpatch/op/ops.py").read_text()))
    assert names
    for name in names:
        for place in ("csrc/{}.cpp", "kernels/{}.py", "tests/test_ops_{}.py", "bench/bench_{}.py"):
            assert (ROOT / place.format(name)).is_file(), place.format(name)
        for module in ("reference", "ops"):
            assert re.search(rf"^def {name}\(", (ROOT / f"snpatch/op/{module}.py").read_text(), re.M), module
    kinds = ("csrc", "cpp"), ("kernels", "py")
    built = {path.stem for folder, kind in kinds for path in (ROOT / folder).glob(f"*.{kind}")}
    assert built - {"module"} == names, "an op that nothing serves"


def test_tests_import_no_tests():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert len(files) > 40
    for file in files:
        assert not re.search(r"^\s*(from|import) test_", file.read_text(), re.M), file


def test_the_contract_of_independence_names_every_experiment():
    text = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r'"snpatch\.experiments\.(\w+)"', text)) == set(experiments.NAMES)


def test_engine_facade_is_thin_without_docstrings():
    text = (ROOT / "snpatch/engine/engine.py").read_text()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [n.body[0] for n in nodes if ast.get_docstring(n)]
    assert len(text.splitlines()) - sum(d.end_lineno - d.lineno + 1 for d in docstrings) <= 210


def test_public_names_are_the_same_for_users_and_type_checkers():
    (block,) = [node for node in ast.parse((ROOT / "snpatch/__init__.py").read_text()).body if isinstance(node, ast.If)]
    declared = {node.names[0].asname: node.module for node in block.body}
    assert declared == {name: f"snpatch.{module}" for name, module in snpatch._MODULES.items()}
    assert {*snpatch.__all__} <= {*dir(snpatch)}
    for name in snpatch.__all__:
        assert getattr(snpatch, name).__name__ == name


def test_names_of_the_readmes_api_table_are_public():
    table = re.findall(r"^\| `(\w+)[^|]*\|", (ROOT / "README.md").read_text(), re.M)
    functions = {name for name in table if name in ("sweep", "load_dataset", "open_judge", "train_sft", "train_dpo")}
    assert len(functions) >= 3
    assert {*functions, "Patch", "AsyncEngine", "EngineConfig", "Ranking", "Guard"} <= {*snpatch.__all__}
