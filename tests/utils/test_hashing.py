"""Keys of stored work: they do not contain the package version, and a change of their content is deliberate."""

from types import SimpleNamespace

import pytest
import torch

import snpatch
from snpatch import Constant, Intervention, Noise, Patch, Ranking, Sampling
from snpatch.experiments.config import Contrast
from snpatch.experiments.context import ExperimentContext
from snpatch.sweeps import generation
from snpatch.utils.hashing import REQUEST_DIGITS, hash_json, hash_tensor

RANKING = Ranking.from_order(torch.tensor([[1, 2], [0, 1], [1, 0], [0, 3]]), (2, 4))
ENGINE = SimpleNamespace(
    fingerprint=lambda name: f"content of {name}",
    encode=lambda prompts, model: [[1, 5, 7], [1, 9]],
    requests=SimpleNamespace(model=lambda name: SimpleNamespace(weights=SimpleNamespace(eos_ids={2, 0}))),
)
PATCHES = {
    "unpatched": "sft",
    "donor": Patch("sft", "dpo", RANKING, 3, "completion", 1.5),
    "constants": Patch(
        "sft",
        interventions=[
            Intervention(Constant.zero(RANKING), RANKING, (1, 3)),
            Intervention(Noise(torch.ones(2, 4), seed=3), RANKING, 2, "prompt"),
        ],
    ),
}


def ranking_key() -> str:
    context = ExperimentContext.__new__(ExperimentContext)
    context.__dict__.update(engine=ENGINE, prompts=lambda name: [], config=SimpleNamespace(contrast_tokens=64))
    return context._ranking_key(Contrast("sft", "dpo", "harmful"), "completion")


def keys() -> dict[str, str]:
    hashes = {name: hash_json(generation._describe_patch(ENGINE, patch)) for name, patch in PATCHES.items()}
    hashes |= {
        "patch": hash_json(PATCHES["donor"].content(ENGINE.fingerprint), REQUEST_DIGITS),
        "ranking": RANKING.fingerprint,
    }
    hashes |= {"window": RANKING.window_fingerprint(PATCHES["donor"].window), "contrast": ranking_key()}
    return hashes | {
        "sampling": hash_json(vars(Sampling(max_tokens=7, seed=1))),
        "tensor": hash_tensor(torch.arange(3)),
    }


GOLDEN = {
    "unpatched": "c8a0847075b3c8d7",
    "donor": "220e7a6c0ec1c8bc",
    "constants": "798a69131a2b512c",
    "patch": "34a61df1fb208a71302d608c62bdc125",
    "ranking": "681a8184c8549d21",
    "window": "ff43c83a2f280875",
    "contrast": "3d3a1fc8c8317cba",
    "sampling": "1cbf6cf9afb1ee25",
    "tensor": "ab25350e3e65efeb",
}


def test_keys_are_the_recorded_ones():
    """Raise a version in utils/hashing.py, or keep the key: stored work of another key is computed again."""
    assert keys() == GOLDEN


def test_keys_do_not_depend_on_the_package_version(monkeypatch):
    monkeypatch.setattr(snpatch, "__version__", "99.0")
    assert keys() == GOLDEN


def test_hash_json_refuses_what_json_has_no_form_for():
    assert hash_json({"a": 1, "b": [2, None]}) == hash_json({"b": [2, None], "a": 1})
    with pytest.raises(TypeError):
        hash_json({"a": object()})
