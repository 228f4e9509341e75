"""The folder kernels/ is only snpatch.kernels: installed, from the repository root, and together with transformers."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    """Build a wheel and an sdist from a copy of the tracked files."""
    tree, out = tmp_path_factory.mktemp("tree") / "snpatch", tmp_path_factory.mktemp("dist")
    subprocess.run(["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={tree}/"], check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


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
