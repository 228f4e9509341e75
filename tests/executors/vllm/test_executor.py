"""The engine on vLLM compared with the oracle, and the promises to users by number.

Engines run in the test process, so that tests can inject faults; test_processes.py has vLLM's own processes.
"""

import gc
import math
import random
import tracemalloc
from dataclasses import replace

import oracle
import pytest
import tiny
import torch
from graph_safety import assert_reads_nothing_on_the_host
from in_process import architectures
from jobs import (
    ALL,
    COMPLETIONS,
    EXTENDED_JOBS,
    IDS,
    INTERVENTION_JOBS,
    JOBS,
    MIN_LOGIT_GAP,
    PATCHED_JOB,
    RANKINGS,
    VALUES,
    Job,
    assert_batch_equals_single,
    assert_equals_oracle,
    assert_k_zero_and_all_give_pure_completions,
    assert_logprobs_equal_generation,
    assert_ranked_by_one_model,
    assert_ranking,
    assert_self_patch_changes_nothing,
    completion_data,
    forced_sequences,
    generate,
    oracle_completion,
)
from spoiled import TOO_LARGE, build_overflow_request, fill_with_nan, huge_patch
from transformers import AutoConfig, AutoModelForCausalLM

from snpatch import Constant, Engine, Noise, Patch, ReceiptError, Sampling, SnpatchError
from snpatch.errors import OverflowedError, SpoiledEngineError
from snpatch.executors.base import Observation
from snpatch.executors.vllm import versions
from snpatch.executors.vllm.codec import cache_salt
from snpatch.op.plan import PlanColumn, RequestColumn
from snpatch.ranking.contrast_statistics import Statistics

platforms = pytest.importorskip("vllm.platforms", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

KV_JOBS = [Job(j.prompt, j.recipient, j.donor, j.window, j.positions, j.order, j.seed, suffix="_kv") for j in JOBS[:11]]
PAIR = "sft", "dpo"
PLAIN_JOBS = [Job(i, name) for i in range(8) for name in ("base", "sft", "dpo")]
VERSION = tuple(map(int, versions.check().split(".")[:2]))
DROPS_SEEDS = platforms.current_platform.is_cpu() and VERSION < (0, 29)  # by vLLM's sampler, see versions.py


@pytest.mark.parametrize("architecture", architectures())
def test_mixed_batch_matches_the_oracle(zoo, start, architecture):
    """Completions, log-probabilities and receipts of a batch; then statistics, captures and prompt logprobs."""
    engine, tiny_model = start(architecture), zoo(architecture)
    jobs = [*JOBS, *EXTENDED_JOBS, *(KV_JOBS if architecture in tiny.KV_ARCHITECTURES else ())]
    jobs += [job for job in PLAIN_JOBS if oracle_completion(tiny_model, job).gap > MIN_LOGIT_GAP]
    assert len(jobs) >= 32
    fill_with_nan(engine)  # the worst case for promise 4, for every layout and kind of attention
    assert_equals_oracle(tiny_model, jobs, generate(engine, jobs))

    models = {name: oracle.model(*tiny_model.checkpoints[name]) for name in ("base", "sft", "dpo")}
    ranking = engine.contrast(IDS, "base", "dpo", completions=COMPLETIONS)
    assert_ranking(ranking, oracle.contrast(models["base"], models["dpo"], forced_sequences("completion")))
    captured = engine.capture(IDS, "sft", RANKINGS[0], 40)
    activations = [models["sft"].activations(ids)[-1] for ids in IDS]
    want = torch.stack([a[tuple(RANKINGS[0].top(40).T)] for a in activations])
    assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
    for job, logprobs in zip(JOBS[:8], engine.logprobs(IDS, [job.patch for job in JOBS[:8]]), strict=True):
        recipient, patch = job.oracle(tiny_model)
        want = oracle.logprobs(recipient, IDS[JOBS.index(job)], patch)
        torch.testing.assert_close(logprobs.values, want, rtol=0, atol=1e-4)
    assert_logprobs_equal_generation(engine, tiny_model, JOBS)


@pytest.fixture(scope="module")
def llama(zoo):
    return zoo("llama")


@pytest.fixture(scope="module")
def engine(start):
    """Return the engine of every test below that does not need its own."""
    return start("llama", max_num_batched_tokens=512, max_num_seqs=48)


def get_dual_stream(engine):
    """Return the surgery's additions to the model of an engine in this process."""
    worker = engine.executor.engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.get_model().snpatch


def test_promise_1_k_0_gives_the_unpatched_and_all_the_donors_completion(engine):
    assert_k_zero_and_all_give_pure_completions(engine)


@pytest.mark.parametrize("model", ["base", "sft", "dpo_kv"])
def test_promise_2_model_patched_into_itself_gives_its_own_completion(engine, model):
    assert_self_patch_changes_nothing(engine, model)


@pytest.mark.parametrize(
    "sampled",
    [(), pytest.param((3, 8), marks=pytest.mark.xfail(DROPS_SEEDS, reason="vLLM drops seeds", strict=True))],
    ids=["greedy", "two sampled with a seed"],
)
def test_promise_3_mixed_batch_equals_single_requests(engine, sampled):
    jobs = [*JOBS, *KV_JOBS]
    samplings = [Sampling(max_tokens=3 + i % 9, logprobs=i % 2 == 0) for i in range(len(jobs))]
    for i in sampled:
        samplings[i] = Sampling(temperature=1.0, seed=11, max_tokens=9)
    singles = [generate(engine, [job], s)[0] for job, s in zip(jobs, samplings, strict=True)]
    batch = generate(engine, jobs, samplings)
    assert_batch_equals_single(batch, singles, 1e-4)


LONG_PROMPTS = [
    [tiny.BOS, *(6 + (11 * i + 5 * j) % 96 for j in range(100))] for i in range(3)
]  # three blocks of 32 and more


def complete_long_prompts(engine, patches) -> list[list[int]]:
    return [c.token_ids for c in engine.generate(LONG_PROMPTS, patches, Sampling(max_tokens=10))]


PATCHES = [Patch("base", "dpo", RANKINGS[0], 200), Patch("sft", "dpo", RANKINGS[1], 150), "sft"]


@pytest.mark.parametrize("first", ["patched", "plain"])
def test_promise_4_patched_request_never_changes_a_later_plain_one(engine, first):
    """Prompts have several blocks, so that the cache could hold a block of the other kind."""

    def reset_cache():
        engine.executor.engine.reset_prefix_cache()

    want = {}
    for name, patches in (("plain", "base"), ("patched", PATCHES)):
        reset_cache()
        want[name] = complete_long_prompts(engine, patches)
    assert all(a != b for a, b in zip(want["plain"], want["patched"], strict=True))
    reset_cache()
    order = ["patched", "plain"] if first == "patched" else ["plain", "patched"]
    for name in (*order, *order):
        assert complete_long_prompts(engine, "base" if name == "plain" else PATCHES) == want[name]


@pytest.mark.parametrize("source", TOO_LARGE, ids=lambda source: type(source).__name__)
def test_promise_4_overflowing_patch_raises_and_changes_no_other_completion(engine, source):
    """Neither in its own batch, nor in later ones, nor on the blocks that it used."""
    jobs = [Job(i, "sft", "dpo", (0, 60)) for i in range(4)] + [Job(i, "base") for i in range(4)]
    sampling = Sampling(max_tokens=25, ignore_eos=True)
    requests = [engine.requests.patched(job.ids, job.patch, sampling=sampling) for job in jobs]
    want = [output.token_ids for output in engine.execute(requests)]
    mixed = [*requests[:4], *(build_overflow_request(engine, [40 + i, 41], source) for i in range(8)), *requests[4:]]
    for _ in range(3):
        outputs = [output for _, output in sorted(engine.run(mixed), key=lambda pair: pair[0])]
        errors = [output.error for output in outputs]
        assert errors[:4] == errors[12:] == [None] * 4
        assert [output.token_ids for output in outputs[:4] + outputs[12:]] == want
        for error in errors[4:12]:
            assert type(error) is OverflowedError
            assert "overflowed in float32 at layer 0 under its patch" in str(error)
        # All free blocks are spoiled now; none may reach a completion.
        fill_with_nan(engine)
        assert [output.token_ids for output in engine.execute(requests)] == want
    with pytest.raises(OverflowedError, match="at layer 0 under its patch"):
        engine.execute(mixed)
    assert [output.token_ids for output in engine.execute(requests)] == want


@pytest.mark.parametrize("positions", ["all", "prompt", "completion"])
def test_generate_with_overflowing_logits_raises(engine, positions):
    huge = huge_patch()
    patch = Patch(huge.recipient, huge.donor, huge.ranking, huge.window, positions)
    want = complete_long_prompts(engine, "base")
    with pytest.raises(OverflowedError, match="overflowed in float32 in the logits under its patch"):
        engine.generate(LONG_PROMPTS, patch, Sampling(max_tokens=4, ignore_eos=True))
    assert complete_long_prompts(engine, "base") == want


def test_unpatched_overflow_restarts_the_engine(engine):
    want, executor = complete_long_prompts(engine, "base"), engine.executor
    get_dual_stream(engine).tables.layers[1].scale[0] = torch.inf
    with pytest.raises(SpoiledEngineError, match=r"the engine is spoiled: .* in float32 at layer 1 without a patch"):
        engine.generate(LONG_PROMPTS, "base", Sampling(max_tokens=10))
    assert engine.executor is not executor
    assert complete_long_prompts(engine, "base") == want


def test_cache_salt_differs_between_patches_and_is_reproducible(engine):
    """A different window, ranking, recipient, donor, source, seed or position changes the salt."""

    def salt(patch, ids=LONG_PROMPTS[0]):
        return cache_salt(engine.requests.patched(ids, patch, sampling=Sampling()), recipient_stream=0)

    ranking, other_ranking = RANKINGS
    patches = [
        "sft",
        Patch("sft", "dpo", ranking, 0),
        Patch("sft", "dpo", ranking, 5),
        Patch("sft", "dpo", ranking, (1, 6)),
        Patch("sft", "dpo", other_ranking, 5),
        Patch("base", "dpo", ranking, 5),
        Patch("sft", "base", ranking, 5),
        Patch("sft", "dpo_kv", ranking, 5),
        Patch("sft", "dpo", ranking, 5, "completion"),
        Patch("sft", Constant(VALUES), ranking, 5),
        Patch("sft", Constant(VALUES + 1), ranking, 5),
        Patch("sft", Noise(VALUES.abs()), ranking, 5),
        Patch("sft", Noise(VALUES.abs(), seed=1), ranking, 5),
    ]
    salts = [salt(patch) for patch in patches]
    assert len({*salts, None}) == len(patches) + 1
    assert salt("base") is None
    assert [salt(patch) for patch in patches] == salts
    assert salt(Patch("sft", "sft", ranking, 0)) == salt("sft")


def test_cached_prefix_is_patched_but_not_in_the_receipt(engine):
    """The receipt counts the positions that this request ran."""
    patch = Patch("base", "dpo", RANKINGS[0], 77)
    engine.executor.engine.reset_prefix_cache()
    first, second = (engine.generate([LONG_PROMPTS[1]], patch, Sampling(max_tokens=5))[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.overwrites == 77 * (len(LONG_PROMPTS[1]) + 4)
    assert second.overwrites == 77 * (len(LONG_PROMPTS[1]) + 4 - 96)


@pytest.mark.parametrize("positions", ["completion", "completion_shifted", "prompt", "last_prompt_token"])
def test_contrast_of_given_completions_matches_the_oracle(llama, engine, positions):
    for first, second in (("sft", "dpo"), ("base", "sft_kv")):
        models = [oracle.model(*llama.checkpoints[name]) for name in (first, second)]
        for _ in range(2):  # the second time from the prefix cache
            options = {"positions": positions, "completions": COMPLETIONS, "exclude_layers": ()}
            ranking = engine.contrast(IDS, first, second, **options)
            assert_ranking(ranking, oracle.contrast(*models, forced_sequences(positions)))


def test_statistics_of_one_run_are_separate(llama, engine):
    """Requests of several statistics are interleaved; each statistics has the sums of its own requests."""
    texts = [ids + text for ids, text in zip(IDS, COMPLETIONS, strict=True)]

    def observing(n: int) -> list[Statistics]:
        targets = [Statistics.zeros(tiny.LAYERS, tiny.NEURONS) for _ in range(n)]
        observations = [Observation(targets[i % n], 0, len(text)) for i, text in enumerate(texts)]
        engine.execute([engine.requests.observing(text, PAIR, o) for text, o in zip(texts, observations, strict=True)])
        return targets

    statistics = observing(3)
    models = [oracle.model(*llama.checkpoints[name]) for name in ("sft", "dpo")]
    for group, observed in enumerate(statistics):
        positions = [(text, list(range(len(text)))) for i, text in enumerate(texts) if i % 3 == group]
        want = oracle.contrast(*models, positions)
        n = want["tokens"].item()
        assert observed.count.tolist() == [n] * tiny.LAYERS
        scores = (observed.sums[:, 4] / n).sqrt()
        assert (scores - want["scores"]).abs().max() <= 1e-5 * want["scores"].abs().max()
    with pytest.raises(SnpatchError, match="all statistics groups are in use: start the engine with a larger max_gr"):
        observing(5)
    assert not any(engine.executor.slots.num_in_use.values())


def test_capture_is_in_rank_order(llama, engine):
    for model, at, k in (("sft", "last_prompt_token", 40), ("dpo", 1, 288), ("base", -2, 1)):
        features = engine.capture(IDS, model, RANKINGS[0], k, positions=at)
        position = -1 if at == "last_prompt_token" else at
        activations = [oracle.model(*llama.checkpoints[model]).activations(ids)[position] for ids in IDS]
        want = torch.stack([a[tuple(RANKINGS[0].top(k).T)] for a in activations])
        assert (features - want).abs().max() <= 1e-5 * want.abs().max()


def remove_rank(dual_stream):
    dual_stream.tables.layers[1].rank[:, 5] = 2**31 - 1


def bypass_op(dual_stream):
    dual_stream.glus[2].run = lambda gate_up: torch.nn.functional.silu(gate_up.chunk(2, 1)[0]) * gate_up.chunk(2, 1)[1]


def clear_receipts(dual_stream):
    dual_stream.tables.receipt.zero_()


@pytest.mark.parametrize("fault", [remove_rank, bypass_op, clear_receipts])
def test_promise_6_patch_not_applied_in_full_raises(engine, fault):
    """Less is done than planned: a ranking lacks a rank, a layer bypasses the op, or receipts are cleared."""
    dual_stream, job = get_dual_stream(engine), Job(2, "sft", "dpo", (0, ALL))
    assert generate(engine, [job])[0].overwrites == ALL * (len(job.ids) + 9)
    tables, tracker, glu = dual_stream.tables, dual_stream.tracker, dual_stream.glus[2]
    ranks, run, fetch = [layer.rank.clone() for layer in tables.layers], glu.run, tracker.fetch
    if fault is clear_receipts:
        tracker.fetch = lambda tickets: (clear_receipts(dual_stream), fetch(tickets))[1]
    else:
        fault(dual_stream)
    with pytest.raises(ReceiptError, match=r"expected \d+ overwrites, the device did \d+"):
        generate(engine, [job, Job(1, "sft")])
    for layer, rank in zip(tables.layers, ranks, strict=True):
        layer.rank.copy_(rank)
    glu.run, tracker.fetch = run, fetch
    assert generate(engine, [job])[0].overwrites == ALL * (len(job.ids) + 9)


def test_promise_6_step_without_a_plan_raises(engine, monkeypatch):
    """The host's own counts are compared with the text, too: one step is not planned."""
    planner = get_dual_stream(engine).planner
    plan_step, calls = planner.plan_step, []

    def skip_third_plan(request_ids, start, count):
        calls.append(1)
        if len(calls) != 3:
            plan_step(request_ids, start, count)
        else:
            planner.clear()

    monkeypatch.setattr(planner, "plan_step", skip_third_plan)
    with pytest.raises(ReceiptError, match="expected 23 positions and 6624 overwrites, got 23 and 6336"):
        generate(engine, [Job(2, "sft", "dpo", (0, ALL))])


def test_promise_6_holds_for_statistics_and_captures(engine, monkeypatch):
    """A layer patches, but adds statistics and captures to copies."""
    glu = get_dual_stream(engine).glus[1]
    stats, count, capture, receipt = glu.outputs
    monkeypatch.setattr(glu, "outputs", (stats.clone(), count.clone(), capture.clone(), receipt))
    with pytest.raises(ReceiptError, match="counted tokens per layer"):
        engine.contrast(IDS, "sft", "dpo", positions="prompt")
    with pytest.raises(ReceiptError, match="capture is incomplete"):
        engine.capture(IDS, "sft", RANKINGS[0], ALL)


def test_op_with_nan_in_padded_rows_changes_nothing(engine):
    """Rows past the last token of a step are the padding of a captured graph."""
    dual_stream, draw = get_dual_stream(engine), torch.Generator().manual_seed(0)
    request_ids, tables = ["padded"], dual_stream.tables
    row = [0] * len(RequestColumn)
    for column, value in {
        RequestColumn.HI: ALL, RequestColumn.PATCH_STOP: 100, RequestColumn.OBSERVE_STOP: 100,
        RequestColumn.CAPTURE: -1, RequestColumn.CAPTURE_STOP: 2,
        RequestColumn.RECEIPT: -1,
    }.items():  # fmt: skip
        row[column] = value
    dual_stream.tracker.add("padded", {"snpatch": [10**6, *row]})
    tables.clear_statistics([0])
    dual_stream.planner.plan_step(["unknown", "padded"], [0, 0], [5, 3])  # more rows than the next step
    dual_stream.planner.plan_step(request_ids, [3], [2])
    gate_up = torch.randn(2 * 8, 2 * tiny.NEURONS, generator=draw)
    gate_up[4:] = math.nan
    out = dual_stream.glus[0].run(gate_up.to(tables.device))
    assert torch.isfinite(out[:4]).all()
    assert torch.isfinite(tables.layers[0].stats).all()
    assert tables.layers[0].count.tolist()[0] == 2
    (records,) = dual_stream.tracker.fetch([10**6])
    assert records[0]["planned"] == 5 * ALL
    dual_stream.planner.clear()
    assert not tables.plan[:, : PlanColumn.GROUP].any()
    assert (tables.plan[:, PlanColumn.GROUP :] == -1).all()


def test_settle_excludes_positions_that_end_a_text(engine):
    """With asynchronous scheduling a step is planned before its token is known to end the text."""
    from snpatch.op.plan import SKIP_EOS_OFFSET

    dual_stream = get_dual_stream(engine)
    for ticket, group in ((1, 2), (2, SKIP_EOS_OFFSET + 2)):
        row = [0] * len(RequestColumn)
        row[RequestColumn.GROUP], row[RequestColumn.OBSERVE_START], row[RequestColumn.OBSERVE_STOP] = group, 1, 9
        dual_stream.tracker.add(f"ahead {ticket}", {"snpatch": [10**6 + ticket, *row]})
    dual_stream.planner.plan_step(["ahead 1", "ahead 2"], [0, 0], [4, 4])
    ids = torch.tensor([9, 9, tiny.EOS, 9, tiny.EOS, 9, tiny.EOS, 9, tiny.EOS], dtype=torch.int32)
    ids = ids.to(dual_stream.tables.device)
    with torch.inference_mode():
        dual_stream.planner.settle(ids)
    assert dual_stream.tables.plan[:9, PlanColumn.GROUP].tolist() == [-1, 2, 2, 2, -1, 2, -1, 2, -1]
    dual_stream.planner.plan_step(["ahead 1"], [4], [4])
    before = dual_stream.tables.plan.clone()
    dual_stream.planner.settle(ids)
    assert torch.equal(dual_stream.tables.plan, before), "settle changed a step in which no request excludes them"
    dual_stream.tracker.remove("ahead 1")
    dual_stream.tracker.remove("ahead 2")
    dual_stream.planner.clear()


def test_step_reads_nothing_on_the_host(engine, monkeypatch):
    """A value read on the host would end a graph capture; the count of overflows after the graph is included."""
    assert_reads_nothing_on_the_host(engine, monkeypatch, [*JOBS[:6], Job(0, "sft")])


def test_stream_yields_completions_as_they_finish(engine):
    """Short completions come before long ones of earlier requests, each once and equal to that of `generate`."""
    lengths = [40, 3, 20, 1, 40, 2, 30, 5]
    samplings = [Sampling(max_tokens=n, ignore_eos=True) for n in lengths]
    patches = ["sft", *[Patch("sft", "dpo", RANKINGS[i % 2], 20 * i) for i in range(1, 8)]]
    want = engine.generate(IDS, patches, samplings)
    order, completions = zip(*engine.stream(IDS, patches, samplings), strict=True)
    assert sorted(order) == list(range(8))
    assert [completions[order.index(i)] for i in range(8)] == want
    assert order.index(3) < order.index(0)


def test_nested_streams_keep_their_completions_and_closed_ones_leave_nothing(engine):
    """A caller may generate while it reads a stream; a closed stream leaves nothing running."""
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    want = [c.token_ids for c in engine.generate(IDS, "sft", sampling)]
    inner, outer = [], [None] * 8
    for index, completion in engine.stream(IDS, "sft", sampling):
        outer[index] = completion.token_ids
        inner.append([c.token_ids for c in engine.generate(IDS, "sft", sampling)])
    assert outer == want
    assert inner == [want] * 8
    stream = engine.stream(IDS, "sft", replace(sampling, max_tokens=100))
    stream.close()
    samplings = [Sampling(max_tokens=n, ignore_eos=True) for n in (1, *[100] * 7)]
    next(stream := engine.stream(IDS, "sft", samplings))
    stream.close()
    assert not engine.executor.owners
    assert not any(engine.executor.slots.num_in_use.values())
    assert not engine.executor.engine.has_unfinished_requests()


def test_slots_are_reused_when_no_request_uses_them(llama, start):
    """More rankings, adapters and constants than slots, one after the other and then at once."""
    engine = start("llama", max_rankings=2, max_adapters=3, max_constants=1, max_receipts=4, max_num_seqs=4)
    rankings = [RANKINGS[0].random_control(40, seed=seed) for seed in range(5)]
    reference = {}
    for _ in range(2):
        for number, ranking in enumerate(rankings):
            patches = [Patch("sft", "dpo", ranking, 40), Patch("sft", Constant(VALUES + number), ranking, 40)]
            texts = [c.token_ids for c in engine.generate(IDS * 2, patches * 8, Sampling(max_tokens=6))]
            assert reference.setdefault(number, texts) == texts
    together = [
        *(Patch("sft", "dpo", ranking, 40) for ranking in rankings),
        *("sft", "dpo", "sft_kv", "base"),
        *(Patch("sft", Constant(VALUES + i), rankings[0], 40) for i in range(3)),
    ]
    expected = [engine.generate([IDS[i % 8]], patch)[0].token_ids for i, patch in enumerate(together)]
    queued = engine.generate([IDS[i % 8] for i in range(len(together))], together)
    assert [c.token_ids for c in queued] == expected
    assert not any(engine.executor.slots.num_in_use.values())


def test_request_that_can_never_fit_raises_before_any_runs(start):
    engine = start("llama", max_adapters=2, max_captured=30)
    progress = []
    for call, message in (
        (lambda: engine.generate(IDS[:2], ["sft", Patch("sft", "dpo", RANKINGS[0], 40)], progress=progress.append),
         "a request needs 2 adapters at once, and the engine has slots for 1: "
         "start the engine with a larger max_adapters"),
        (lambda: engine.capture(IDS, "sft", RANKINGS[0], 31), "a capture of 31 neurons: start the engine with"),
    ):  # fmt: skip
        with pytest.raises(SnpatchError, match=message):
            call()
    assert not progress
    assert engine.generate([IDS[0]], "sft")


@pytest.mark.parametrize("caching", [False, True])
def test_promise_5_preemption_and_chunks_count_every_token_once(llama, start, caching):
    """The cache is too small for the batch, so requests are preempted and recomputed, and prompts are chunked."""
    engine = start("llama", kv_cache_memory_bytes=None, gpu_memory_utilization=0.3, num_gpu_blocks_override=12,
                   max_num_batched_tokens=40, max_num_seqs=32, enable_prefix_caching=caching)  # fmt: skip
    stats = engine.executor.engine.engine_core.engine_core.scheduler
    jobs = [Job(i % 8, "sft", "dpo", (0, 29 + i)) for i in range(24)]
    preempted = []
    preempt = stats._preempt_request
    stats._preempt_request = lambda request, *arguments, **options: (
        preempted.append(request),
        preempt(request, *arguments, **options),
    )[1]
    completions = engine.generate([job.ids for job in jobs], [job.patch for job in jobs], Sampling(max_tokens=60))
    assert preempted, "nothing was preempted: the cache is too large for this test"
    for job, completion in zip(jobs, completions, strict=True):
        recipient, patch = job.oracle(llama)
        assert completion.token_ids[:10] == oracle.generate(recipient, job.ids, 10, patch).ids
        assert completion.overwrites == (29 + jobs.index(job)) * (len(job.ids) + 59)
    models = [oracle.model(*llama.checkpoints[name]) for name in ("sft", "dpo")]
    prompts = [LONG_PROMPTS[i % 3][: 60 + i] for i in range(12)]
    ranking = engine.contrast(prompts, "sft", "dpo", positions="prompt", exclude_layers=())
    assert_ranking(ranking, oracle.contrast(*models, [(text, list(range(len(text)))) for text in prompts]))
    # Observed during generation, so that preempted requests are observed, too.
    preempted.clear()
    sampling, statistics = Sampling(max_tokens=60, ignore_eos=True), Statistics.zeros(tiny.LAYERS, tiny.NEURONS)
    observe = Observation(statistics, 0, 10**6)
    outputs = engine.execute([engine.requests.observing(ids, PAIR, observe, sampling=sampling) for ids in IDS * 3])
    assert preempted
    texts = [(ids + o.token_ids[:-1]) for ids, o in zip(IDS * 3, outputs, strict=True)]
    want = oracle.contrast(*models, [(text, list(range(len(text)))) for text in texts])
    n = want["tokens"].item()
    assert statistics.count.tolist() == [n] * tiny.LAYERS
    assert ((statistics.sums[:, 4] / n).sqrt() - want["scores"]).abs().max() <= 1e-5 * want["scores"].max()


def test_patch_with_several_interventions_matches_the_oracle(llama, start):
    engine = start("llama", max_interventions=3, max_num_batched_tokens=64)
    jobs = [*JOBS, *INTERVENTION_JOBS, *EXTENDED_JOBS]
    assert_equals_oracle(llama, jobs, generate(engine, jobs))
    assert_equals_oracle(llama, jobs, generate(engine, jobs))  # from the prefix cache
    large_patch = replace(INTERVENTION_JOBS[3], further=(*INTERVENTION_JOBS[3].further, INTERVENTION_JOBS[0])).patch
    with pytest.raises(
        SnpatchError, match=r"a patch of 4 interventions: start the engine with a larger max_interventions \(3\)"
    ):
        engine.generate([IDS[0]], large_patch)
    donors = Job(0, "base", "dpo", (0, 5), further=(Job(0, "", "sft", (5, 9)),))
    with pytest.raises(SnpatchError, match=r"interventions: expected at most one donor model, got dpo, sft"):
        donors.patch  # noqa: B018


def random_job(rng) -> tuple[list[int], Patch | str, Sampling]:
    """Return a prompt of 2 to 60 tokens, any patch with any ranking, and any length."""
    ids = [tiny.BOS, *(rng.randrange(6, 102) for _ in range(rng.randrange(1, 60)))]
    sampling = Sampling(
        max_tokens=rng.randrange(1, 30), temperature=rng.choice([0.0, 1.0]), logprobs=rng.random() < 0.3
    )
    if rng.random() < 0.3:
        return ids, rng.choice(["base", "sft", "dpo_kv"]), sampling
    lo, recipient = rng.randrange(ALL), rng.choice(["base", "sft", "dpo"])
    donor = rng.choice(["base", "dpo", "sft_kv", Constant(VALUES), Noise(VALUES.abs(), seed=rng.randrange(9))])
    positions = rng.choice(["all", "prompt", "completion", -1, 3, 0])
    patch = Patch(recipient, donor, rng.choice(RANKINGS), (lo, rng.randrange(lo, ALL + 1)), positions)
    return ids, patch, sampling


def held_bytes() -> tuple[int, int]:
    """Return the bytes of Python objects and of tensors; the process itself grows at first even with plain vLLM."""
    gc.collect()
    tensors = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if type(t) is torch.Tensor}
    return tracemalloc.get_traced_memory()[0], sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("num_batches", [8, pytest.param(20, marks=pytest.mark.full)])
def test_soak_of_random_requests_with_aborts_leaves_nothing(llama, start, num_batches):
    """Batches of 100 requests; every third is aborted halfway. Each patched request has its receipt checked."""
    engine = start("llama", max_num_seqs=48, max_num_batched_tokens=256, max_receipts=256)
    unpatched_jobs = [Job(i, name) for i in range(8) for name in ("base", "sft")]
    fresh = completion_data(generate(engine, unpatched_jobs))
    rng, sizes, first_measured = random.Random(7), [], num_batches // 4

    class AbortedError(Exception):
        pass

    def abort_halfway(num_done, total):
        if num_done >= total // 2:
            raise AbortedError

    for batch in range(num_batches):
        ids, patches, samplings = zip(*(random_job(rng) for _ in range(100)), strict=True)
        arguments = ids, list(patches), list(samplings)
        if batch % 3 == 2:
            with pytest.raises(AbortedError):
                engine.generate(*arguments, progress=abort_halfway)
        else:
            assert len(engine.generate(*arguments)) == 100
            engine.contrast(ids[:5], "sft", "dpo", positions="prompt")
            engine.capture(ids[:5], "sft", RANKINGS[0], 20)
        if batch == first_measured:
            tracemalloc.start()
        if batch >= first_measured:
            sizes.append(held_bytes())
    tracemalloc.stop()
    assert completion_data(generate(engine, unpatched_jobs)) == fresh
    engine.executor.engine.step()  # the worker learns which requests have ended
    tracker = get_dual_stream(engine).tracker
    assert not tracker._records
    assert not tracker._tickets
    assert not tracker._ended
    assert len(tracker._free_rows) == len(tracker.table)
    assert sorted(tracker._free_receipts) == list(range(256))
    assert not tracker._capture_used.any()
    assert not tracker.tables.receipt.any()
    assert tracker.tables.capture.isnan().all()
    assert not any(engine.executor.slots.num_in_use.values())
    for first, last in zip(sizes[1], sizes[-1], strict=True):
        assert last - first < 2 << 20, sizes


@pytest.fixture(scope="module")
def eos_engines(llama, start, tmp_path_factory):
    """Return an engine whose EOS is a token that sft generates, and the same on transformers."""
    texts = [oracle.generate(oracle.model(*llama.checkpoints["sft"]), ids, 10).ids for ids in IDS]
    token = max({t for text in texts for t in text}, key=lambda t: len({x.index(t) for x in texts if t in x[:9]}))
    tiny_model = llama.with_eos(token, tmp_path_factory.mktemp("ended") / "model")
    adapters = {name: list(folders) for name, folders in tiny_model.adapters.items()}
    engine = start(tiny_model)
    return token, engine, Engine(tiny_model.folder, adapters, backend="transformers")


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 10},
        {"max_tokens": 10, "min_tokens": 4},
        {"max_tokens": 10, "ignore_eos": True},
        {"max_tokens": 1},
        {"max_tokens": 12, "min_tokens": 6, "stop": ("STOP0",)},
        {"max_tokens": 12, "stop": ("nowhere", "STOP1", "STOP0")},
    ],
    ids=str,
)
def test_completions_end_as_on_transformers(eos_engines, sampling):
    _, engine, reference = eos_engines
    if "stop" in sampling:
        words = reference.generate([IDS[0]], "sft", Sampling(max_tokens=12, ignore_eos=True))[0].text.split()
        sampling = {
            **sampling,
            "stop": tuple(s.replace("STOP0", words[1]).replace("STOP1", words[4]) for s in sampling["stop"]),
        }
    patches = ["sft"] * 8 + [Patch("sft", "dpo", RANKINGS[0], 30)] * 8
    actual, expected = (e.generate(IDS * 2, patches, Sampling(logprobs=True, **sampling)) for e in (engine, reference))
    assert completion_data(actual) == completion_data(expected)
    for first, second in zip(actual, expected, strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


@pytest.mark.parametrize("positions", ["completion", "completion_shifted"])
def test_contrast_generates_completions_and_excludes_eos(eos_engines, positions):
    token, engine, reference = eos_engines
    sampling = Sampling(max_tokens=10)
    actual, expected = (
        e.contrast(IDS, "sft", "dpo", positions=positions, sampling=sampling) for e in (engine, reference)
    )
    assert actual.meta["tokens"] == expected.meta["tokens"]
    assert (actual.scores - expected.scores).abs().max() <= 1e-5 * expected.scores.max()
    assert torch.equal(actual.half.count, expected.half.count)
    assert (actual.half.sums - expected.half.sums).abs().max() <= 1e-5 * expected.half.sums.abs().max()
    assert any(c.token_ids[-1] == token for c in reference.generate(IDS, "sft", sampling)), "no completion ends early"


def test_context_ends_a_completion_and_can_be_filled_by_a_prompt(eos_engines):
    _, engine, reference = eos_engines
    prompt = [tiny.BOS, *(10 + i % 90 for i in range(tiny.CONTEXT - 4))]
    sampling = Sampling(max_tokens=10, ignore_eos=True)
    actual, expected = (e.generate([prompt], "sft", sampling)[0] for e in (engine, reference))
    assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, "length")
    full_context = [*prompt, 9, 9, 9]
    assert len(full_context) == tiny.CONTEXT
    torch.testing.assert_close(
        *(e.logprobs([full_context], "dpo")[0].values for e in (engine, reference)), rtol=0, atol=1e-4
    )
    with pytest.raises(
        SnpatchError, match=f"prompt 0: expected at most .* tokens for a context of {tiny.CONTEXT}, got 128"
    ):
        engine.generate([full_context], "sft")


def test_n_samples_equal_single_ones_and_vllm_settings_are_applied(eos_engines):
    _, engine, reference = eos_engines
    patch, sampling = Patch("sft", "dpo", RANKINGS[0], 30), Sampling(temperature=1.0, seed=5, max_tokens=8, n=3)
    samples = engine.generate(IDS[:2], patch, sampling)
    assert [c.prompt_ids for c in samples] == [IDS[0]] * 3 + [IDS[1]] * 3
    singles = [
        engine.generate([IDS[i]], patch, replace(sampling, n=1, seed=5 + s))[0] for i in range(2) for s in range(3)
    ]
    assert [c.token_ids for c in samples] == [c.token_ids for c in singles]
    assert len({tuple(c.token_ids) for c in samples}) > 3
    free = engine.generate([IDS[0]], "sft", Sampling(max_tokens=6, ignore_eos=True))[0]
    bias = Sampling(max_tokens=6, ignore_eos=True, vllm={"logit_bias": {free.token_ids[0]: -100.0}})
    assert engine.generate([IDS[0]], "sft", bias)[0].token_ids[0] != free.token_ids[0]
    for setting, message in {"nonsense": "vLLM does not take", "temperature": "temperature cannot be set"}.items():
        with pytest.raises(SnpatchError, match=message):
            engine.generate([IDS[0]], "sft", Sampling(vllm={setting: 1}))
    with pytest.raises(SnpatchError, match="logit_bias needs the vllm backend"):
        reference.generate([IDS[0]], "sft", bias)


def test_one_stream_rejects_donors_only(llama, start):
    engine = start("llama", streams=1)
    jobs = [
        job
        for job in (*JOBS, *PLAIN_JOBS[:8])
        if not isinstance(job.donor, str) and oracle_completion(llama, job).gap > MIN_LOGIT_GAP
    ]
    assert_equals_oracle(llama, jobs, generate(engine, jobs))
    captured = engine.capture(IDS, "sft", RANKINGS[0], 40)
    model = oracle.model(*llama.checkpoints["sft"])
    want = torch.stack([model.activations(ids)[-1][tuple(RANKINGS[0].top(40).T)] for ids in IDS])
    assert (captured - want).abs().max() <= 1e-5 * want.abs().max()
    assert_ranked_by_one_model(engine.contrast(IDS, "sft", completions=COMPLETIONS, exclude_layers=()), model)
    for call in (
        lambda: generate(engine, [PATCHED_JOB]),
        lambda: engine.contrast(IDS, "sft", "dpo", positions="prompt"),
    ):
        with pytest.raises(SnpatchError, match="a donor model needs streams=2"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, "neither snpatch nor vLLM has an argument nonsense"),
        ({"batch_size": 8}, "batch_size: expected no max_num_seqs with it"),
        ({"enable_lora": True}, "enable_lora cannot be set"),
        ({"pipeline_parallel_size": 2}, "cannot be combined with pipeline parallel"),
        ({"compilation_config": {"dynamic_shapes_config": {"type": "unbacked"}}}, "with unbacked dynamic shapes"),
        ({"compilation_config": {"dynamic_shapes_config": {"type": "backed_size_oblivious"}}},
         "with backed_size_oblivious dynamic shapes"),
        ({"compilation_config": {"compile_sizes": [8], "custom_ops": ["+rotary_embedding"]}},
         "compile_sizes together with"),
        ({"max_model_len": 129}, "max_model_len: expected 1 to 128, got 129"),
        ({"dtype": "float99"}, "dtype: expected one of auto, float32"),
        ({"streams": 3}, "streams: expected one of 1, 2, got 3"),
        ({"max_rankings": 0}, "max_rankings: expected at least 1, got 0"),
        ({"scales_kv": False}, "this engine was started without; start it with scales_kv=True"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
         "cannot be combined with speculative decoding"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_engine_arguments_raise(start, options, message):
    if torch.cuda.device_count() == 1 and "pipeline_parallel_size" in options:
        pytest.skip("vLLM counts the GPUs before snpatch checks the arguments")
    with pytest.raises(SnpatchError, match=message):
        start("llama", **options)


def other_model(kind: str, folder, **options) -> tiny.TinyModel:
    """Build a tiny random model of an untested architecture, with an adapter if its MLP is a plain one."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options}), dtype=torch.float32)
    tiny.init_weights(model, 1)
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    if not hasattr(model.model.layers[0], "mlp") or "num_local_experts" in options:
        return tiny.TinyModel(folder / "model", {})
    tiny.write_adapter(model, folder / "sft", ["down_proj"], seed=2)
    return tiny.TinyModel(folder / "model", {"sft": (folder / "sft",)})


def test_untested_architecture_raises_unless_allowed(start, tmp_path):
    tiny_model = other_model("granite", tmp_path)
    with pytest.raises(SnpatchError, match=r"architecture granite is not tested .* allow_untested=True tries it"):
        start(tiny_model)
    engine = start(tiny_model, allow_untested=True)
    adapters = {"sft": list(tiny_model.adapters["sft"])}
    reference = Engine(tiny_model.folder, adapters, backend="transformers", allow_untested=True)
    patches = [Patch("base", "sft", RANKINGS[0], 30 * i) for i in range(8)]
    actual, expected = (e.logprobs(IDS, patches) for e in (engine, reference))
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first.values, second.values, rtol=0, atol=1e-4)


def test_mixture_of_experts_raises(start, tmp_path):
    if torch.cuda.is_available() and not hasattr(torch.ops._moe_C, "topk_softmax"):
        pytest.skip("this vLLM has no kernels for mixtures of experts")
    tiny_model = other_model("mixtral", tmp_path, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(SnpatchError, match="a mixture of experts or shared layers cannot be patched"):
        start(tiny_model, allow_untested=True)


@pytest.mark.skipif(VERSION < (0, 28), reason="this vLLM's hybrid models need Triton")
def test_one_stream_patches_a_hybrid_model_with_constants(start, tmp_path):
    """State-space layers have a gated MLP as well; two streams raise an error that names the alternative."""
    tiny_model = other_model("falcon_h1", tmp_path, mamba_d_ssm=64, mamba_n_heads=2, mamba_d_head=32, mamba_d_state=16)
    with pytest.raises(SnpatchError, match=r"hybrid and attention-free models.*; streams=1 patches it with constants"):
        start(tiny_model, allow_untested=True)
    try:
        engine = start(tiny_model, allow_untested=True, streams=1, max_num_seqs=8)
    except SnpatchError as error:
        if "causal_conv1d" in str(error):
            pytest.skip("this vLLM has no float32 kernel for state-space layers on a CPU")
        raise
    model = AutoModelForCausalLM.from_pretrained(tiny_model.folder, dtype=torch.float32).eval()
    layers = [next(m for n, m in layer.named_modules() if n.endswith("down_proj")) for layer in model.model.layers]
    ranking, zero = RANKINGS[0], Constant.zero(RANKINGS[0])

    def zeroing(layer, k):
        return lambda module, inputs: (torch.where(ranking.rank[layer] < k, 0.0, inputs[0]),)

    for k in (0, 40, len(ranking)):
        handles = [m.register_forward_pre_hook(zeroing(i, k)) for i, m in enumerate(layers)]
        logprobs = engine.logprobs(IDS[:3], Patch("base", zero, ranking, k))
        for ids, actual in zip(IDS[:3], logprobs, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            want = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(actual.values, want, rtol=0, atol=2e-4)
        for handle in handles:
            handle.remove()
    assert len(engine.contrast(IDS[:3], "base", positions="prompt", exclude_layers=())) == len(ranking)
