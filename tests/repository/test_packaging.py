"""The distributions that `make wheel` builds: their contents, and the demo in an environment that holds nothing else.

The folder kernels/ is only snpatch.kernels: installed, from the repository root, and together with transformers.
"""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def execute(*command: object, cwd: Path) -> str:
    """Run a command without this checkout on its path; return its stdout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_kernels_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "breaks `import transformers` from the repository root"
    assert (ROOT / "snpatch" / "kernels").is_symlink()
    assert (ROOT / "snpatch" / "kernels").resolve() == ROOT / "kernels"


def test_transformers_imports_from_the_root_next_to_kernels():
    code = "import transformers.integrations.hub_kernels, snpatch.kernels; print(*snpatch.kernels.__path__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert any(Path(path).resolve() == ROOT / "kernels" for path in run.stdout.split())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Run `make wheel` in a copy of the tracked files; return wheel and sdist."""
    tree = tmp_path_factory.mktemp("tree") / "snpatch"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={tree}/"], check=True)
    execute("make", "wheel", f"BIN={BIN}", "READY=", cwd=tree)  # without the set-up of a .venv
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_contain_kernels_as_a_subpackage(distributions):
    wheel, sdist = distributions
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "kernels"], capture_output=True, text=True, check=True)
    modules = [Path(line).name for line in tracked.stdout.split() if line.endswith(".py")]
    names = zipfile.ZipFile(wheel).namelist()
    assert "snpatch/engine/engine.py" in names
    assert not [name for name in names if name.startswith("kernels/")]
    assert {f"snpatch/kernels/{module}" for module in modules} <= set(names)
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"kernels/{module}" for module in modules} <= in_sdist
    assert {"csrc/patched_glu.cpp", "csrc/elementwise.h", "csrc/module.cpp"} <= in_sdist


def test_wheel_contains_the_demo_model_and_the_page_assets(distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assets = (ROOT / "snpatch" / "report" / "assets").iterdir()
    assert {f"snpatch/report/assets/{path.name}" for path in assets} <= names
    assert {f"snpatch/server/examples/{name}" for name in ("five_lines.py", "curl.sh", "curve.py")} <= names
    for part in ("base/model.safetensors", "sft/adapter_config.json", "cost/config.json", "contrast.jsonl"):
        assert f"snpatch/demo/model/{part}" in names


@pytest.fixture
def empty_environment(tmp_path):
    """Yield the bin/ of a new environment that holds pip and PyTorch's CPU build, as .ci/setup_env.py installs it."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / ".ci" / "setup_env.py")
    setup_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_env)
    execute(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    bin = tmp_path / "venv" / "bin"
    torch = ["--no-deps", "--retries", "0", setup_env.TORCH["cpu"], "--extra-index-url", setup_env.CPU_INDEX]
    execute(bin / "python", "-m", "pip", "install", "--quiet", *torch, cwd=tmp_path)
    yield bin
    shutil.rmtree(bin.parent)  # a gigabyte


@pytest.mark.full
@pytest.mark.parametrize(("kind", "op"), [("wheel", "C++"), ("sdist", "reference (PyTorch)")])
def test_demo_runs_in_an_empty_environment(distributions, empty_environment, tmp_path, kind, op):
    """An sdist is built in isolation, without PyTorch, so that its op is the one in PyTorch."""
    archive = dict(zip(("wheel", "sdist"), distributions, strict=True))[kind]
    python, elsewhere = empty_environment / "python", tmp_path / "elsewhere"
    elsewhere.mkdir()
    execute(BIN / "uv", "pip", "install", "--python", python, archive, cwd=elsewhere)
    execute(BIN / "uv", "pip", "check", "--python", python, cwd=elsewhere)
    environment = json.loads(execute(empty_environment / "snpatch", "env", "--json", cwd=elsewhere))
    assert environment["versions"]["vllm"] == "not installed"
    assert environment["ops"]["patched_glu (cpu)"] == op
    output = execute(empty_environment / "snpatch", "demo", cwd=elsewhere)
    assert "Patching 256 neurons (8.3%) of dpo into sft recovers" in output
    out = elsewhere / "snpatch-demo"
    assert (out / "report.html").is_file()
    with (out / "curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["recipient"] == "sft" and row["ranking"]]
    effects = {row["rank_hi"]: float(row["effect"]) for row in rows if not row["control"]}
    assert effects["0"] == 0
    assert effects["256"] > 0.5
    assert effects["2560"] > 0.9
