"""CONTRIBUTING.md's table of packages: each with its docstring's first sentence, in the layers' order."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHER_FOLDERS = {
    "kernels/": "the op for GPUs, in Triton; kernels/README.md has its formula and its predicted cost",
    "csrc/": "the op for CPUs, in C++",
    "bench/": "benchmarks, their records, the check of a GPU, and the generator of the tables in README and guides",
    "tests/": "tests, in the same folders as the packages; repository/ tests the repository itself, support/ has "
    "helpers, goldens/ golden outputs",
}


def build_table() -> str:
    """Build the table: package, first sentence, files."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    lines = ["| package | purpose | files |", "|---|---|---|"]
    for name in (name for layer in layers for name in layer.split(" | ")):
        path = ROOT / "snpatch" / name
        if path.is_dir():
            lines.append(f"| `{name}/` | {_first_sentence(path / '__init__.py')} | {_list_files(path)} |")
        else:
            lines.append(f"| `{name}` | {_first_sentence(path.with_suffix('.py'))} | |")
    lines += [f"| `{name}` | {purpose} | |" for name, purpose in OTHER_FOLDERS.items()]
    return "\n".join(lines)


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a file's docstring."""
    paragraph = " ".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].split())
    return re.split(r"(?<!Eq\.)(?<=[.?])\s", paragraph)[0].rstrip(".").replace("|", "\\|")


def _list_files(folder: Path) -> str:
    """Return the names of a package's modules, with those of its subpackages in brackets."""
    files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    subpackages = sorted(path.parent for path in folder.glob("*/__init__.py"))
    return ", ".join([*files, *(f"{package.name}/ ({_list_files(package)})" for package in subpackages)])
