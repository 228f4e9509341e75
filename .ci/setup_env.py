"""Setup of .venv: select the CPU or the CUDA stack, install, build. Any failure ends with one clear line.

Why Python 3.6 syntax: an old interpreter then prints that line and not a SyntaxError. Why pip installs
PyTorch before uv installs the rest: pip takes PyTorch's CPU build if its index or a local wheel has one,
and uv then finds the requirement met instead of downloading the CUDA build.
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
MIN_FREE_GB = {"cpu": 6, "cuda": 20}


def stop(message):
    sys.exit("snpatch setup: " + message)


def check_machine(stack):
    if sys.version_info < (3, 11):
        stop(
            "expected Python 3.11 or newer, %s is %d.%d. Run `make PYTHON=/path/to/python3.11`"
            % (sys.executable, sys.version_info[0], sys.version_info[1])
        )
    preferred = os.environ.get("CXX", "c++")
    compilers = [name for name in (preferred, "g++", "clang++") if shutil.which(name.split()[0])]
    if not compilers:
        stop("expected a C++ compiler, neither %s, g++ nor clang++ is on PATH. Install g++" % preferred)
    os.environ["CXX"] = compilers[0]
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        stop("expected Python's headers, %s has none. Install python3-dev" % sys.executable)
    if importlib.util.find_spec("ensurepip") is None:
        stop("expected Python's venv module, %s has none. Install python3-venv" % sys.executable)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < MIN_FREE_GB[stack]:
        stop("expected %d GB of free disk for the %s stack, %s has %.1f GB" % (MIN_FREE_GB[stack], stack, ROOT, free))


def run(step, *command):
    """Run a step; if it fails, stop with its name below the tool's output."""
    print("snpatch setup: " + step, flush=True)
    if subprocess.run(list(command), cwd=ROOT).returncode:
        is_full = shutil.disk_usage(ROOT).free < 2e8
        stop(step + " failed" + (": the disk is full" if is_full else ", see the lines above"))


def succeeds(*command):
    """Return whether a command succeeds, without its output."""
    result = subprocess.run(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return result.returncode == 0


def select_stack():
    stack = os.environ.get("SNPATCH_STACK", "")
    if stack not in ("", "cpu", "cuda"):
        stop("SNPATCH_STACK: expected cpu or cuda, got %r" % stack)
    if stack:
        return stack
    smi = shutil.which("nvidia-smi")
    return "cuda" if smi and succeeds(smi, "-L") else "cpu"


def main():
    stack = select_stack()
    check_machine(stack)
    python = os.path.join(VENV, "bin", "python")
    has_pip = os.path.exists(python) and succeeds(python, "-m", "pip", "--version")
    if not has_pip:  # also true after an interrupted first try
        run("creating .venv", sys.executable, "-m", "venv", "--clear", VENV)
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]  # -qq: no warnings
    run("installing uv", *(pip + ["uv", "setuptools>=77"]))
    torch = pip + ["--no-deps", "--retries", "0", TORCH[stack]]
    run("installing " + TORCH[stack], *(torch + (["--extra-index-url", CPU_INDEX] if stack == "cpu" else [])))
    uv = [os.path.join(VENV, "bin", "uv"), "pip", "install", "--quiet", "--compile-bytecode"]
    uv += ["--python", python, "--no-build-isolation", "--constraint", os.path.join(ROOT, ".ci", "constraints.txt")]
    run("installing the %s stack and building" % stack, *(uv + [TORCH[stack], "-e", ".[%s,train,eval,dev]" % stack]))
    print("snpatch setup: done (%s)" % stack)


if __name__ == "__main__":
    main()
