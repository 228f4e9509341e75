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
    made = zoo("llama")
    ranking = Ranking.from_scores(torch.rand(made.shape, generator=torch.Generator().manual_seed(1)))
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64, "max_captured": 8}
    adapters = {name: list(folders) for name, folders in made.adapters.items()}
    labels = np.arange(8) % 2 == 0

    def fitted(engine, k=8):
        x = engine.capture(tiny.PROMPTS, "sft", ranking, k)
        config = GuardConfig(folds=2)
        return Guard.fit(x, labels, ranking, model="sft", fingerprint=engine.fingerprint("sft"), config=config)

    oracle = Engine(made.folder, adapters, backend="transformers")
    gc.collect()
    with Engine(made.folder, adapters, backend="vllm", **small) as engine:
        guard = fitted(engine)
        plain = engine.generate(tiny.PROMPTS, Patch("sft", "dpo", ranking, 50), SHORT)
        guarded = engine.generate(tiny.PROMPTS, Patch("sft", "dpo", ranking, 50), SHORT, guard=guard)
        other = fitted(oracle)
        assert [c.harm for c in guarded] == pytest.approx(other.predict(oracle, tiny.PROMPTS).tolist(), abs=1e-3)
        refused = [c.finish_reason == "guard" for c in guarded]
        assert refused == [c.harm > 0.5 for c in guarded]
        assert 0 < sum(refused) < 8
        assert [c.text for c, no in zip(guarded, refused, strict=True) if not no] == [
            c.text for c, no in zip(plain, refused, strict=True) if not no
        ]
        with pytest.raises(SnpatchError, match="larger max_captured"):
            engine.generate(tiny.PROMPTS, "sft", guard=fitted(oracle, 9))
        # A guard belongs to a model's fingerprint, with either backend; other models are rejected.
        assert other.predict(engine, tiny.PROMPTS) == pytest.approx([c.harm for c in guarded], abs=1e-3)
        with pytest.raises(SnpatchError, match="expected the model 'sft' that it was fitted on"):
            engine.generate(tiny.PROMPTS, "sft", guard=replace(other, fingerprint=engine.fingerprint("dpo")))
