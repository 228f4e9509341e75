"""Halves of a contrast's prompts: their sums are those of contrasts of these prompts alone."""

import pytest
import tiny
import torch

from snpatch import Engine, Sampling
from snpatch.engine.contrast import split_prompts

WRITE = Sampling(max_tokens=4)


@pytest.fixture(scope="module")
def engine(zoo):
    model = zoo("llama")
    return Engine(model.folder, model.adapters, backend="transformers", dtype="float32")


def test_split_prompts_halves_distinct_prompts():
    prompts = [[index % 20] for index in range(30)]
    halves = split_prompts(prompts)
    assert sum(halves[:20]) == 10
    assert halves[:10] == halves[20:], "equal prompts are in one half"
    assert halves == split_prompts(prompts)
    assert 0 < sum(halves[:10]) < 10, "random, not the first ten"
    assert sorted(split_prompts([[1], [2], [3]])) == [0, 0, 1]
    assert split_prompts([[1], [1]]) == [0, 0]


@pytest.mark.parametrize("positions", ["completion", "completion_shifted", "prompt"])
def test_half_has_the_sums_of_its_prompts(engine, positions):
    ids = [list(tiny.tokenizer()(prompt)["input_ids"]) for prompt in tiny.PROMPTS]
    options = {"positions": positions, "sampling": WRITE}
    ranking = engine.contrast(ids, "sft", "dpo", **options)
    second = [prompt for prompt, half in zip(ids, split_prompts(ids), strict=True) if half]
    assert 0 < len(second) < len(ids)
    expected = engine.contrast(second, "sft", "dpo", **options)
    assert torch.equal(ranking.half.count, expected.statistics.count)
    torch.testing.assert_close(ranking.half.sums, expected.statistics.sums, rtol=1e-4, atol=1e-5)
    assert ranking.statistics.count[0] == ranking.meta["tokens"]


def test_contrast_of_one_prompt_has_no_half(engine):
    assert engine.contrast(tiny.PROMPTS[:1], "sft", "dpo", sampling=WRITE).half is None


def test_half_of_one_model_has_no_donor(engine):
    ranking = engine.contrast(tiny.PROMPTS, "sft", sampling=WRITE)
    assert not ranking.half.is_pair
    assert torch.equal(ranking.half.sums[:, 4], ranking.half.sums[:, 1])
