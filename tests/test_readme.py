"""The README's tables are the records' and its Python names exist."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_made_from_the_records():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.filled(readme) == readme


def test_the_kernels_expected_times_are_the_ones_computed():
    import predict

    readme = (ROOT / "kernels" / "README.md").read_text()
    assert "| 64 x 11008 |" in readme
    assert predict.filled(readme) == readme


def test_linked_files_and_imported_names_exist():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", readme):
        assert (ROOT / target).exists(), target
    for imported in re.findall(r"from snpatch import (.+)", readme):
        for name in imported.split(", "):
            exec(f"from snpatch import {name}")
