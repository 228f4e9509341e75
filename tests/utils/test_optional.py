"""Commands that install optional packages."""

from importlib.metadata import PackageNotFoundError

import pytest

from snpatch.utils import optional
from snpatch.utils.optional import install_hint

REQUIREMENTS = [
    "torch>=2.11",
    'vllm<0.34,>=0.24; extra == "cuda"',
    'snpatch[server]; extra == "cuda"',
    'peft>=0.20; extra == "train"',
    "trl<2,>=1.16 ; (python_version >= '3.11') and extra == 'train'",
    'datasets>=4; extra == "data"',
]


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("train", "pip install 'peft>=0.20' 'trl<2,>=1.16'"),
        ("data", "pip install 'datasets>=4'"),
        ("cuda", "pip install 'vllm<0.34,>=0.24'"),
        ("missing", "pip install --no-build-isolation '.[missing]' (in snpatch's checkout)"),
    ],
)
def test_install_hint_names_the_packages_of_an_extra(monkeypatch, extra, command):
    monkeypatch.setattr(optional, "requires", lambda name: REQUIREMENTS)
    assert install_hint(extra) == command


def test_install_hint_without_metadata_names_the_checkout(monkeypatch):
    def fail(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(optional, "requires", fail)
    assert install_hint("ray") == "pip install --no-build-isolation '.[ray]' (in snpatch's checkout)"


def test_install_hint_names_no_package_index_entry_of_snpatch():
    for extra in ("cpu", "cuda", "train", "data", "eval", "ray"):
        assert install_hint(extra).startswith("pip install '")
        assert "snpatch" not in install_hint(extra)
