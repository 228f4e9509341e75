"""Two sets of weights in one vLLM twin: against the oracle's two hooked models."""

from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from jobs import (
    CLEAR,
    COMPLETIONS,
    IDS,
    JOBS,
    RANKINGS,
    RICHER,
    Job,
    assert_as_the_oracle,
    assert_ranking,
    assert_read_as_written,
    assert_together_as_alone,
    forced,
    generate,
    told,
)

from snpatch import Patch, SnpatchError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

PLAIN = [Job(i, name) for i in range(8) for name in ("base", "dpo", "tuned")]


def assert_is_the_pair(engine, made) -> None:
    """One mixed batch, then what is observed and read."""
    jobs = [*JOBS, *RICHER, *(job for job in PLAIN if told(made, job).gap > CLEAR)]
    assert_as_the_oracle(made, jobs, generate(engine, jobs))
    for pair in (("base", "dpo"), ("dpo", "sft")):
        models = [oracle.model(*made.of[name]) for name in pair]
        ranking = engine.contrast(IDS, *pair, completions=COMPLETIONS)
        assert_ranking(ranking, oracle.contrast(*models, forced("emitted")))
    captured = engine.capture(IDS, "dpo", RANKINGS[0], 40)
    activations = [oracle.model(*made.of["dpo"]).activations(ids)[-1] for ids in IDS]
    want = torch.stack([a[tuple(RANKINGS[0].top(40).T)] for a in activations])
    assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
    assert_read_as_written(engine, made, [*JOBS, *RICHER])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_mixed_batch_is_what_two_hooked_models_write(pairs, start, architecture):
    made = pairs(architecture)
    assert_is_the_pair(start(made), made)


def test_compiled(pairs, start):
    made = pairs("qwen3")
    assert_is_the_pair(start(made, enforce_eager=False), made)


def test_a_crowded_batch_is_its_requests_alone(pairs, start):
    engine, jobs = start(pairs("llama")), [*JOBS, *RICHER]
    together, alone = generate(engine, jobs), [generate(engine, [job])[0] for job in jobs]
    assert_together_as_alone(together, alone, 1e-5)


def test_what_is_equal_is_held_once(start, tmp_path_factory):
    """Two of three layers are the first model's: the third's bytes, and those of the head and the last norm, twice."""

    def is_equal(name: str) -> bool:
        return name.startswith(("model.layers.0.", "model.layers.2.", "model.embed"))

    made = tiny.make_pair("llama", tmp_path_factory.mktemp("part"), same=is_equal)
    model = oracle.model(*made.of["dpo"]).model
    bytes_apart = sum(4 * p.numel() for name, p in model.named_parameters() if not is_equal(name))
    engine = start(made)
    assert engine.executor.memory.second == bytes_apart
    jobs = [*JOBS, *RICHER]
    assert_as_the_oracle(made, jobs, generate(engine, jobs))


def test_vocabularies_of_other_padding_are_one(start, tmp_path_factory):
    made = tiny.make_pair("llama", tmp_path_factory.mktemp("narrow"), vocab_size=len(tiny.VOCAB) - 8)
    jobs = [job for job in (*JOBS, *RICHER) if told(made, job).gap > CLEAR]
    assert len(jobs) > 20
    assert_as_the_oracle(made, jobs, generate(start(made), jobs))


def test_two_models_of_one_set_are_refused_with_the_way_out(pairs, start):
    engine = start(pairs("llama"))
    with pytest.raises(
        SnpatchError, match=r"both models .* are on the weights of .*: start an engine of these weights"
    ):
        engine.generate([IDS[0]], Patch("dpo", "tuned", RANKINGS[0], 5))


def test_too_little_memory_is_an_error_that_says_how_much_is_missing(monkeypatch):
    from snpatch.executors.vllm.worker import pairing

    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=3 * 10**9))
    monkeypatch.setattr(pairing, "free_bytes", lambda: 10 * 10**9)
    pairing.check_room(7 * 10**9, config)
    with pytest.raises(SnpatchError, match=r"9.00 GB, .* 3.00 GB .* 10.00 GB are free, so that 2.00 GB are"):
        pairing.check_room(9 * 10**9, config)
