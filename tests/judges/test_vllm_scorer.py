"""Score models in vLLM's pooling runner: same scores as transformers, in any batch, together with an engine."""

import gc
import os
import signal
import threading

import pytest
import torch
from judged import BROKEN, COMPLETIONS, PROMPTS, all_by_hand, open_score_model, write, write_classifier
from processes import command_line, descendants, wait_for

from snpatch import Engine, Sampling
from snpatch.demo import DEMO_MODEL
from snpatch.errors import SnpatchError
from snpatch.judges.score_model import ScoreModel

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

# Prompts that share a block of vLLM's prefix cache.
SHARED_PREFIX_PROMPTS = [" ".join(["a b c d e"] * 8)] * 6
ENDINGS = ["a", "b c", "", "d d e", "a", "e e e e e e e"]


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    gc.collect()


def test_scores_in_any_batch_match_transformers(tmp_path, in_process):
    """A checkpoint with a bias and a normalizer: all at once, reversed, one by one, from the prefix cache."""
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors = write(tmp_path, bias=True, normalize=True, files="sharded bin", **buffers)
    prompts, completions = PROMPTS + SHARED_PREFIX_PROMPTS, COMPLETIONS + ENDINGS
    expected = open_score_model(tmp_path)(prompts, completions)
    assert expected[: len(PROMPTS)] == pytest.approx(all_by_hand(tensors, normalize=True), abs=1e-4)
    with ScoreModel(tmp_path, batch_size=4, max_num_batched_tokens=48, block_size=32) as judge:
        assert judge.backend == "vllm", "the default for the Beavertails layout"
        scores = judge(prompts, completions)
        assert scores == pytest.approx(expected, abs=1e-3)
        assert judge(prompts[::-1], completions[::-1])[::-1] == pytest.approx(scores, abs=1e-4)
        single_scores = [judge([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
        assert single_scores == pytest.approx(scores, abs=1e-4)
        assert all(type(value) is float for value in scores)
        assert judge([], []) == []
        with pytest.raises(SnpatchError, match="expected a text of 1 to 64 tokens, got 109"):
            judge(["a b"], ["c " * 100])
    with pytest.raises(SnpatchError, match="expected an open judge, got a closed one"):
        judge(["a"], ["b"])


def test_bfloat16_scores_are_near_float32(in_process):
    """The demo model's cost model with the paper's format; its scores span a range of 15."""
    prompts, completions = PROMPTS * 4, [*COMPLETIONS, *ENDINGS, *COMPLETIONS, "a", "b"]
    float32_scores = open_score_model(DEMO_MODEL / "cost", format="tulu")(prompts, completions)
    with ScoreModel(DEMO_MODEL / "cost", format="tulu", dtype="bfloat16", max_model_len=128) as judge:
        scores = judge(prompts, completions)
        assert scores == pytest.approx(float32_scores, abs=0.05)
        single_scores = [judge([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
        assert single_scores == pytest.approx(scores, abs=0.05)


def test_classifier_supported_by_vllm_matches_transformers(tmp_path, in_process):
    """Its sequences end in the padding token, before which transformers reads the score."""
    write_classifier(tmp_path, id2label={0: "safe", 1: "harm", 2: "odd"}, pad_token_id=2)
    arguments = {"format": "<|user|> {prompt} <|assistant|> {completion} </s>", "label": "harm"}
    expected = open_score_model(tmp_path, **arguments)(PROMPTS, COMPLETIONS)
    with ScoreModel(tmp_path, backend="vllm", **arguments) as judge:
        assert judge(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-3)
        with pytest.raises(SnpatchError, match="needs token types"):
            judge._scorer.score([{"input_ids": [5, 6], "token_type_ids": [0, 1]}])


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_bad_checkpoint_raises_before_vllm_starts(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(SnpatchError, match=message):
        ScoreModel(tmp_path, backend="vllm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu"}, "neither snpatch nor vLLM has an argument device"),
        ({"batch_size": 2, "max_num_seqs": 2}, "batch_size: expected no max_num_seqs with it"),
        ({"runner": "generate"}, "runner cannot be set"),
        ({"pooler_config": None}, "pooler_config cannot be set"),
    ],
)
def test_bad_engine_arguments_raise(tmp_path, arguments, message):
    write(tmp_path)
    with pytest.raises(SnpatchError, match=message):
        ScoreModel(tmp_path, backend="vllm", **arguments)


def test_judge_next_to_an_engine_crashes_without_ending_the_engine(forked):
    """Both run in their own processes; calls of a killed judge raise, and the other engine continues."""
    prompts = PROMPTS * 3
    options = {"backend": "vllm", "enforce_eager": True}  # compiling both takes half a minute, and is tested elsewhere
    with Engine(DEMO_MODEL / "base", template="tulu", kv_cache_memory_bytes=64 << 20, **options) as engine:
        engine_processes = descendants(os.getpid())
        with ScoreModel(DEMO_MODEL / "cost", **options) as judge:
            completions = [c.text for c in engine.generate(prompts, sampling=Sampling(max_tokens=8))]
            expected = open_score_model(DEMO_MODEL / "cost")(prompts, completions)
            assert judge(prompts, completions) == pytest.approx(expected, abs=1e-3)
            judge_processes = descendants(os.getpid()) - engine_processes
            (core,) = (pid for pid in judge_processes if b"EngineCore" in command_line(pid))
            threading.Timer(0.5, os.kill, (core, signal.SIGKILL)).start()
            with pytest.raises(SnpatchError, match="vLLM's engine has ended"):
                while True:
                    judge(prompts * 20, completions * 20)
        wait_for(lambda: not any(b"VLLM" in command_line(pid) for pid in judge_processes), 10)
        assert [c.text for c in engine.generate(prompts, sampling=Sampling(max_tokens=8))] == completions
