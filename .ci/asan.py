"""Run the tests of the CPU kernels with the address-sanitizer build of csrc/ made by `make asan`."""

import importlib.util
import sys
from pathlib import Path

import pytest

(library,) = Path("build/asan/snpatch").glob("_C*.so")
spec = importlib.util.spec_from_file_location("snpatch._C", library)
import torch  # noqa: E402, F401  the extension's symbols

module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["snpatch._C"] = module
tests = ["tests/op/test_patched_glu_native.py", "-k", "cpp and not missing"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
