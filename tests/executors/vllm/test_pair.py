"""Secondary weights in a vLLM engine, compared with the oracle's two hooked models."""

import os
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from graph_safety import assert_reads_nothing_on_the_host
from in_process import architectures
from jobs import (
    COMPLETIONS,
    EXTENDED_JOBS,
    IDS,
    INTERVENTION_JOBS,
    JOBS,
    MIN_LOGIT_GAP,
    RANKINGS,
    SAME_WEIGHTS_JOBS,
    Job,
    assert_batch_equals_single,
    assert_equals_oracle,
    assert_logprobs_equal_generation,
    assert_ranking,
    assert_self_patch_changes_nothing,
    forced_sequences,
    generate,
    oracle_completion,
)

from snpatch import Engine, Patch, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}  # for an engine in its own processes
PLAIN_JOBS = [Job(i, name) for i in range(8) for name in ("base", "dpo", "tuned")]


def assert_matches_two_models(engine, tiny_pair, is_across: bool = False) -> None:
    """Compare completions, statistics, captures and log-probabilities.

    is_across: donor and recipient of every request are on different weights.
    """
    jobs = [
        *JOBS,
        *EXTENDED_JOBS,
        *INTERVENTION_JOBS,
        *(job for job in PLAIN_JOBS if oracle_completion(tiny_pair, job).gap > MIN_LOGIT_GAP),
        *([] if is_across else SAME_WEIGHTS_JOBS),
    ]
    assert_equals_oracle(tiny_pair, jobs, generate(engine, jobs))
    for pair in (("base", "dpo"), ("dpo", "sft"), *([] if is_across else [("dpo", "tuned")])):
        models = [oracle.model(*tiny_pair.checkpoints[name]) for name in pair]
        ranking = engine.contrast(IDS, *pair, completions=COMPLETIONS)
        assert_ranking(ranking, oracle.contrast(*models, forced_sequences("completion")))
    captured = engine.capture(IDS, "dpo", RANKINGS[0], 40)
    activations = [oracle.model(*tiny_pair.checkpoints["dpo"]).activations(ids)[-1] for ids in IDS]
    want = torch.stack([a[tuple(RANKINGS[0].top(40).T)] for a in activations])
    assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
    assert_logprobs_equal_generation(engine, tiny_pair, [*JOBS, *EXTENDED_JOBS])


@pytest.mark.parametrize("architecture", architectures())
def test_mixed_batch_matches_two_hooked_models(pairs, start, architecture):
    tiny_pair = pairs(architecture)
    assert_matches_two_models(start(tiny_pair, max_interventions=3), tiny_pair)


def test_step_with_secondary_weights_reads_nothing_on_the_host(pairs, start, monkeypatch):
    """Except for requests with both models on one set of weights, which only an engine without graphs can route."""
    engine = start(pairs("llama"))
    assert_reads_nothing_on_the_host(engine, monkeypatch, JOBS[:6])
    with pytest.raises(AssertionError, match=r"aten::\w+ reads the device"):
        assert_reads_nothing_on_the_host(engine, monkeypatch, SAME_WEIGHTS_JOBS[:1])


def test_compiled_engine_matches_two_models_and_rejects_one_set_of_weights(compilation, pairs, start):
    tiny_pair = pairs("qwen3")
    engine = start(tiny_pair, enforce_eager=False, max_interventions=3)
    assert_matches_two_models(engine, tiny_pair, is_across=True)
    with pytest.raises(
        SnpatchError, match=r"recipient and donor .* both use the weights of .* start it with enforce_eager=True"
    ):
        engine.generate([IDS[0]], Patch("dpo", "tuned", RANKINGS[0], 5))


def test_promises_1_2_3_and_5_hold_with_secondary_weights(pairs, start):
    """1: k = 0 is the recipient; 2: a model patched into itself; 3: together as alone; 5: chunked prefill."""
    engine = start(pairs("llama"), max_num_batched_tokens=64)
    jobs = [*JOBS, *EXTENDED_JOBS, *SAME_WEIGHTS_JOBS]
    batch, singles = generate(engine, jobs), [generate(engine, [job])[0] for job in jobs]
    assert_batch_equals_single(batch, singles, 1e-5)
    for model in ("base", "dpo", "tuned"):
        assert_self_patch_changes_nothing(engine, model)
    for recipient, donor in (("base", "dpo"), ("dpo", "sft")):
        zero_patches = generate(engine, [Job(i, recipient, donor, (0, 0)) for i in range(8)])
        unpatched = generate(engine, [Job(i, recipient) for i in range(8)])
        assert [c.token_ids for c in zero_patches] == [c.token_ids for c in unpatched]


def test_statistics_and_captures_in_a_full_batch_are_per_request(pairs, start):
    """Compared with the oracle's single requests, with reused slots; then with a prefix cache."""
    engine, tiny_pair = start(pairs("llama"), max_num_seqs=6, enable_prefix_caching=True), pairs("llama")
    pair_of = [("base", "dpo"), ("dpo", "base"), ("sft", "dpo"), ("dpo", "tuned")]
    texts = [[*ids, *range(20, 60)] for ids in IDS]
    models = {name: oracle.model(*tiny_pair.checkpoints[name]) for name in ("base", "sft", "dpo", "tuned")}
    rankings = [engine.contrast(texts, *pair, positions="prompt", exclude_layers=()) for pair in pair_of * 2]
    for pair, ranking in zip(pair_of * 2, rankings, strict=True):
        expected = oracle.contrast(*(models[name] for name in pair), [(ids, list(range(len(ids)))) for ids in texts])
        assert_ranking(ranking, expected)
    for name in models:
        features = engine.capture(texts, name, RANKINGS[0], 60)
        expected = [models[name].activations(ids)[-1] for ids in texts]
        top = tuple(RANKINGS[0].top(60).T)
        assert (features - torch.stack([activations[top] for activations in expected])).abs().max() < 1e-4
    jobs = [*JOBS, *EXTENDED_JOBS, *SAME_WEIGHTS_JOBS]
    first, cached = generate(engine, jobs), generate(engine, jobs)
    assert_batch_equals_single(cached, first, 1e-5)
    assert_equals_oracle(tiny_pair, jobs, cached)


def test_two_workers_match_two_hooked_models(forked, pairs):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    tiny_pair = pairs("gemma2")
    with Engine(
        tiny_pair.folder, **tiny_pair.engine_arguments, backend="vllm",
        tensor_parallel_size=2, max_interventions=3, **SMALL,
    ) as engine:  # fmt: skip
        assert_matches_two_models(engine, tiny_pair)


def test_equal_weights_are_stored_once(start, tmp_path_factory):
    """Two of three layers are equal: only the third, the head and the last norm are stored twice."""

    def is_equal(name: str) -> bool:
        return name.startswith(("model.layers.0.", "model.layers.2.", "model.embed"))

    tiny_pair = tiny.make_pair("llama", tmp_path_factory.mktemp("part"), is_shared=is_equal)
    model = oracle.model(*tiny_pair.checkpoints["dpo"]).model
    bytes_apart = sum(4 * p.numel() for name, p in model.named_parameters() if not is_equal(name))
    engine = start(tiny_pair)
    assert engine.executor.memory.secondary == bytes_apart
    jobs = [*JOBS, *EXTENDED_JOBS]
    assert_equals_oracle(tiny_pair, jobs, generate(engine, jobs))


def test_vocabularies_with_different_padding_match_two_models(start, tmp_path_factory):
    tiny_pair = tiny.make_pair("llama", tmp_path_factory.mktemp("narrow"), vocab_size=len(tiny.VOCAB) - 8)
    jobs = [job for job in (*JOBS, *EXTENDED_JOBS) if oracle_completion(tiny_pair, job).gap > MIN_LOGIT_GAP]
    assert len(jobs) > 20
    assert_equals_oracle(tiny_pair, jobs, generate(start(tiny_pair), jobs))


def test_lora_as_secondary_weights_matches_merged_model(zoo, start, tmp_path):
    folder = zoo("qwen2").folder
    merged_model = tiny.TinyModel(folder, {}, models={"dpo": (tmp_path / "merged", ())})
    lora_model = tiny.TinyModel(folder, {}, models={"dpo": {"lora": str(tiny.write_lora(folder, tmp_path))}})
    jobs = [job for job in (*JOBS, *EXTENDED_JOBS) if "sft" not in (job.recipient, job.donor)]
    assert_equals_oracle(merged_model, jobs, generate(start(lora_model), jobs))


def test_too_little_memory_raises_with_missing_bytes(monkeypatch):
    from snpatch.executors.vllm.worker import secondary_weights

    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=3 * 10**9))
    monkeypatch.setattr(secondary_weights, "free_bytes", lambda: 10 * 10**9)
    secondary_weights.check_free_memory(7 * 10**9, config)
    with pytest.raises(SnpatchError, match=r"9.00 GB, .* 3.00 GB .* 10.00 GB are free, so 2.00 GB are missing"):
        secondary_weights.check_free_memory(9 * 10**9, config)
