"""Make .venv: pick the CPU or the CUDA stack, install, build. One clear line for whatever stops it.

Kept to syntax that Python 3.6 reads, so that an old interpreter gets the message and not a SyntaxError.
PyTorch is installed by pip before uv sees the rest: pip takes PyTorch's own CPU build where its index or
a local wheel offers one, and uv then finds the requirement met instead of fetching the CUDA build.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
TORCH = {"cpu": "torch==2.13.0", "cuda": "torch==2.14.0"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FREE_GB = {"cpu": 6, "cuda": 20}


def stop(message):
    sys.exit("snpatch setup: " + message)


def check_machine(stack):
    if sys.version_info < (3, 11):
        stop(
            "needs Python 3.11 or newer, and %s is %d.%d: run `make PYTHON=/path/to/python3.11`"
            % (sys.executable, sys.version_info[0], sys.version_info[1])
        )
    wanted = os.environ.get("CXX", "c++")
    found = [name for name in (wanted, "g++", "clang++") if shutil.which(name.split()[0])]
    if not found:
        stop("needs a C++ compiler, and neither %s, g++ nor clang++ is on PATH: install g++" % wanted)
    os.environ["CXX"] = found[0]
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        stop("needs Python's headers, and %s has none: install python3-dev" % sys.executable)
    if importlib.util.find_spec("ensurepip") is None:
        stop("needs Python's venv, and %s has none: install python3-venv" % sys.executable)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB[stack]:
        stop("needs %d GB of free disk for the %s stack, and %s has %.1f GB" % (FREE_GB[stack], stack, ROOT, free))


def run(step, *command):
    """Run a step; on failure say which step failed and keep the tool's own output above that line."""
    print("snpatch setup: " + step, flush=True)
    if subprocess.run(list(command), cwd=ROOT).returncode:
        full = shutil.disk_usage(ROOT).free < 2e8
        stop(step + " failed" + (": the disk is full" if full else ", see the lines above"))


def quietly(*command):
    """Whether a command succeeds."""
    done = subprocess.run(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def chosen_stack():
    stack = os.environ.get("SNPATCH_STACK", "")
    if stack not in ("", "cpu", "cuda"):
        stop("SNPATCH_STACK must be cpu or cuda, got %r" % stack)
    if stack:
        return stack
    smi = shutil.which("nvidia-smi")
    return "cuda" if smi and quietly(smi, "-L") else "cpu"


def main():
    stack = chosen_stack()
    check_machine(stack)
    python = os.path.join(VENV, "bin", "python")
    has_pip = os.path.exists(python) and quietly(python, "-m", "pip", "--version")
    if not has_pip:  # also what an interrupted first try leaves behind
        run("making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run("installing uv", *(pip + ["uv", "setuptools>=77"]))
    torch = pip + ["--no-deps", "--retries", "0", TORCH[stack]]
    run("installing " + TORCH[stack], *(torch + (["--extra-index-url", CPU_INDEX] if stack == "cpu" else [])))
    uv = [os.path.join(VENV, "bin", "uv"), "pip", "install", "--quiet", "--compile-bytecode"]
    uv += ["--python", python, "--no-build-isolation"]
    run("installing the %s stack and building" % stack, *(uv + [TORCH[stack], "-e", ".[%s,train,eval,dev]" % stack]))
    print("snpatch setup: done (%s)" % stack)


if __name__ == "__main__":
    main()
