"""Planted model: only four neurons decide between SAFE and HARM, and the method finds and uses exactly them."""

import oracle
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from snpatch import Constant, Engine, Patch, Ranking, Sampling, Scale, SnpatchError

K = len(tiny.PLANTED)
WORDS = Sampling(max_tokens=4)


@pytest.fixture(scope="module")
def planted_model(tmp_path_factory):
    return tiny.make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def engine(planted_model):
    return Engine(planted_model.folder, planted_model.adapters, backend="transformers")


@pytest.fixture(scope="module")
def ranking(engine):
    return engine.contrast(tiny.PROMPTS, "sft", "dpo", sampling=WORDS)


def answers(engine, patch) -> set[str]:
    return {word for c in engine.generate(tiny.PROMPTS, patch, WORDS) for word in c.text.split()}


def test_planted_model_differs_only_in_its_planted_neurons(planted_model):
    """Check with the oracle: the adapters answer differently, and the planted neurons are the whole difference."""
    sft, dpo = (oracle.model(*planted_model.checkpoints[name]) for name in ("sft", "dpo"))
    mask = oracle.build_mask(tiny.PLANTED, planted_model.shape)
    for prompt in tiny.PROMPTS:
        ids = tiny.tokenizer()(prompt)["input_ids"]
        runs = [(sft, None), (dpo, None), (sft, oracle.Patch(mask, donor=dpo)), (sft, oracle.Patch(~mask, donor=dpo))]
        texts = [oracle.generate(model, ids, 4, patch) for model, patch in runs]
        assert min(text.gap for text in texts) > 0.1
        words = [{tiny.VOCAB[i] for i in text.ids} for text in texts]
        assert words == [{tiny.HARM}, {tiny.SAFE}, {tiny.SAFE}, {tiny.HARM}]


@pytest.mark.parametrize("positions", ["completion", "completion_shifted", "prompt", "last_prompt_token"])
def test_contrast_ranks_planted_neurons_first(engine, positions):
    ranking = engine.contrast(tiny.PROMPTS, "sft", "dpo", positions=positions, sampling=WORDS)
    assert sorted(map(tuple, ranking.top(K).tolist())) == sorted(tiny.PLANTED)
    scores = ranking.scores.flatten().sort(descending=True).values
    assert scores[K - 1] > 5 * scores[K]


def test_patching_planted_neurons_flips_the_answer_and_random_ones_do_not(engine, ranking):
    assert answers(engine, "sft") == {tiny.HARM}
    assert answers(engine, "dpo") == {tiny.SAFE}
    assert answers(engine, Patch("sft", "dpo", ranking, K)) == {tiny.SAFE}
    assert answers(engine, Patch("sft", "dpo", ranking, (K, len(ranking)))) == {tiny.HARM}
    for kind in ("per_layer", "everywhere", "last_layer"):
        for seed in range(5):
            control = ranking.random_control(K, seed=seed, kind=kind)
            assert answers(engine, Patch("sft", "dpo", control, K)) == {tiny.HARM}


def test_patching_in_reverse_and_with_the_mean_flips_the_answer(engine, ranking):
    assert answers(engine, Patch("dpo", "sft", ranking, K)) == {tiny.HARM}
    assert answers(engine, Patch("sft", Constant.mean(ranking, of="donor"), ranking, K)) == {tiny.SAFE}
    assert answers(engine, Patch("dpo", Constant.zero(ranking), ranking, K)) == {tiny.HARM}


def test_last_layer_is_excluded_by_default(engine, ranking):
    assert len(ranking) == 2 * 48
    assert ranking.layer_counts(len(ranking)).tolist() == [48, 48, 0]
    full_ranking = engine.contrast(tiny.PROMPTS, "sft", "dpo", sampling=WORDS, exclude_layers=())
    assert len(full_ranking) == 3 * 48
    assert torch.equal(full_ranking.scores, ranking.scores)


def test_strength_scales_the_output_of_a_planted_neuron_exactly(engine, planted_model):
    """Read the answer's direction in the residual stream back from three logits; the last norm cancels out."""
    last = [neuron for neuron in tiny.PLANTED if neuron[0] == 1]  # after them nothing reads or writes the direction
    ranking = Ranking.from_order(torch.tensor(last), planted_model.shape)
    ids, reference_id = list(tiny.tokenizer()(tiny.PROMPTS[0])["input_ids"]), 50

    def direction(patch) -> float:
        words = [[tiny.VOCAB.index(tiny.SAFE)], [tiny.VOCAB.index(tiny.HARM)], [reference_id]]
        safe, harm, reference = (p.values.item() for p in engine.logprobs([ids] * 3, patch, completions=words))
        return (safe - harm) / (safe + harm - 2 * reference)

    unpatched = direction("sft")
    full_shift = direction(Patch("sft", "dpo", ranking, len(last))) - unpatched
    assert full_shift > 0.1
    for strength in (0.0, 0.25, 1.0, 2.0, 5.0, -1.0):
        shift = direction(Patch("sft", "dpo", ranking, len(last), strength=strength)) - unpatched
        assert shift == pytest.approx(strength * full_shift, rel=1e-4, abs=1e-5)
    scale_shift = direction(Patch("sft", Scale(2.0), ranking, len(last))) - unpatched
    assert scale_shift > 0.1
    for factor in (0.0, 0.5, 4.0, -2.0):
        shift = direction(Patch("sft", Scale(factor), ranking, len(last))) - unpatched
        assert shift == pytest.approx((factor - 1) * scale_shift, rel=1e-4, abs=1e-5)


def test_masked_adapter_has_the_donors_factors_on_the_window_alone(engine, planted_model, ranking):
    """Compare with a plain model whose output directions are multiplied by the factors."""
    engine.add_masked_adapter("sft-safe", "sft", "dpo", ranking, K)
    engine.add_masked_adapter("sft-rest", "sft", "dpo", ranking, (K, len(ranking)))
    assert answers(engine, "sft-safe") == {tiny.SAFE}
    assert answers(engine, "sft-rest") == {tiny.HARM}
    expected = AutoModelForCausalLM.from_pretrained(planted_model.folder, dtype=torch.float32)
    factors = {name: engine.requests.model(name).scales.vectors["down_proj"] for name in ("sft", "dpo")}
    is_masked = ranking.rank < K
    for layer, block in enumerate(expected.model.layers):
        block.mlp.down_proj.weight.data *= torch.where(is_masked[layer], factors["dpo"][layer], factors["sft"][layer])
    for prompt, actual in zip(tiny.PROMPTS, engine.logprobs(tiny.PROMPTS, "sft-safe"), strict=True):
        ids = torch.tensor(engine.encode([prompt], "sft"))
        logprobs = expected(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).flatten()
        assert torch.allclose(actual.values, logprobs, atol=1e-4)
    with pytest.raises(SnpatchError, match="'sft-safe' is taken"):
        engine.add_masked_adapter("sft-safe", "sft", "dpo", ranking, K)
    with pytest.raises(SnpatchError, match="expected a ranking of"):
        engine.add_masked_adapter("other", "sft", "dpo", Ranking.from_scores(torch.rand(2, 3)), 1)
