"""The README's plan of the house: each room with what its own docstring says, in the order of the layers' contract."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {
    "kernels/": "the op for GPUs, in Triton; kernels/README.md has its formula and what it should cost",
    "csrc/": "the op for CPUs, in C++",
    "bench/": "benchmarks, their records, the check of a GPU, and what makes this README's tables",
    "tests/": "tests; what they share is in support/, outputs of the published code in goldens/",
}


def plan() -> str:
    """A table: room, its first sentence, its files."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    lines = ["| room | what it is | files |", "|---|---|---|"]
    for name in (name for layer in layers for name in layer.split(" | ")):
        place = ROOT / "snpatch" / name
        if place.is_dir():
            lines.append(f"| `{name}/` | {_said(place / '__init__.py')} | {_files(place)} |")
        else:
            lines.append(f"| `{name}` | {_said(place.with_suffix('.py'))} | |")
    lines += [f"| `{name}` | {what} | |" for name, what in BESIDE.items()]
    return "\n".join(lines)


def _said(path: Path) -> str:
    """The first sentence of a file's docstring."""
    whole = " ".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].split())
    return re.split(r"(?<!Eq\.)(?<=[.?])\s", whole)[0].rstrip(".").replace("|", "\\|")


def _files(folder: Path) -> str:
    """Names of a package's files, those of its packages in brackets."""
    files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    inner = sorted(path.parent for path in folder.glob("*/__init__.py"))
    return ", ".join([*files, *(f"{one.name}/ ({_files(one)})" for one in inner)])
