"""A guard refuses the same prompts with vLLM as with transformers."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from snpatch import Engine, Patch, Ranking, Sampling, SnpatchError
from snpatch.guard.config import GuardConfig
from snpatch.guard.guard import Guard

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SHORT = Sampling(max_tokens=8)


def test_guard_on_vllm_refuses_the_prompts_refused_on_transformers(zoo, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    tiny_model = zoo("llama")
    ranking = Ranking.from_scores(torch.rand(tiny_model.shape, generator=torch.Generator().manual_seed(1)))
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "max_captured": 8}
    adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
    labels = np.arange(8) % 2 == 0

    def fit_guard(engine, k=8):
        x = engine.capture(tiny.PROMPTS, "sft", ranking, k)
        identity = {"prompts": tiny.PROMPTS, "model": "sft", "fingerprint": engine.fingerprint("sft")}
        return Guard.fit(x, labels, ranking, **identity, config=GuardConfig(folds=2))

    oracle = Engine(tiny_model.folder, adapters, backend="transformers")
    gc.collect()
    with Engine(tiny_model.folder, adapters, backend="vllm", **options) as engine:
        guard = fit_guard(engine)
        unguarded = engine.generate(tiny.PROMPTS, Patch("sft", "dpo", ranking, 50), SHORT)
        guarded = engine.generate(tiny.PROMPTS, Patch("sft", "dpo", ranking, 50), SHORT, guard=guard)
        transformers_guard = fit_guard(oracle)
        assert [c.harm for c in guarded] == pytest.approx(
            transformers_guard.predict(oracle, tiny.PROMPTS).tolist(), abs=1e-3
        )
        refused = [c.finish_reason == "guard" for c in guarded]
        assert refused == [c.harm > 0.5 for c in guarded]
        assert 0 < sum(refused) < 8
        assert [c.text for c, is_refused in zip(guarded, refused, strict=True) if not is_refused] == [
            c.text for c, is_refused in zip(unguarded, refused, strict=True) if not is_refused
        ]
        with pytest.raises(SnpatchError, match="larger max_captured"):
            engine.generate(tiny.PROMPTS, "sft", guard=fit_guard(oracle, 9))
        # A guard belongs to a model's fingerprint, with either backend; other models are rejected.
        assert transformers_guard.predict(engine, tiny.PROMPTS) == pytest.approx([c.harm for c in guarded], abs=1e-3)
        with pytest.raises(SnpatchError, match="expected the model 'sft' that it was fitted on"):
            engine.generate(
                tiny.PROMPTS, "sft", guard=replace(transformers_guard, fingerprint=engine.fingerprint("dpo"))
            )
