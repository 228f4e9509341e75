"""The example scripts and the notebook run on the demo model."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import snpatch

EXAMPLES = Path(snpatch.__file__).parent / "examples"
SERVER_EXAMPLES = Path(snpatch.__file__).parent / "server/examples"
PRINTED = {  # script -> part of its output, and files that it writes
    "rank_and_patch": ("overwrites)", "safety.safetensors"),
    "sweep_and_plot": ("mean cost", "curve.png", "sweep/sweep.sqlite"),
    "custom_judge": ("words    sft, k = 256",),
    "two_checkpoints": (" 20%  ", "second-checkpoint/model.safetensors"),
}


def run(code: Path | str, folder: Path) -> str:
    """Return what a script, or code, prints when it runs in a folder where vLLM is not installed."""
    if isinstance(code, Path):
        code = f"import runpy\nrunpy.run_path({str(code)!r}, run_name='__main__')"
    command = [sys.executable, "-c", f"import sys\nsys.modules['vllm'] = None\n{code}"]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_example_runs_on_the_demo_model(tmp_path, name):
    printed, *files = PRINTED[name]
    assert printed in run(EXAMPLES / f"{name}.py", tmp_path)
    assert all((tmp_path / file).is_file() for file in files)


@pytest.mark.slow
def test_notebook_runs_on_the_demo_model(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert "overwrites" in run("\n".join(code), tmp_path)


def test_every_example_is_tested_and_listed_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert scripts == {*(f"{name}.py" for name in PRINTED), "quickstart.ipynb"}
    assert all(f"({name})" in readme for name in scripts)


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.py"), *SERVER_EXAMPLES.glob("*.py")], ids=lambda path: path.stem)
def test_import_of_an_example_runs_nothing(path):
    declarations = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
    docstring, guard = (node for node in ast.parse(path.read_text()).body if not isinstance(node, declarations))
    assert isinstance(docstring, ast.Expr)
    assert isinstance(guard, ast.If)
    assert ast.unparse(guard.test) == "__name__ == '__main__'"
