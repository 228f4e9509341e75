"""The engine on the transformers executor compared with the oracle, and the promises to users by number."""

import gc
import json
import math
import shutil

import oracle
import pytest
import tiny
import torch
from jobs import (
    ALL,
    COMPLETIONS,
    ENCODE,
    EXTENDED_JOBS,
    IDS,
    INTERVENTION_JOBS,
    JOBS,
    LOGPROB,
    ORDERS,
    RANKINGS,
    SHAPE,
    VALUES,
    Job,
    assert_batch_equals_single,
    assert_equals_oracle,
    assert_k_zero_and_all_give_pure_completions,
    assert_logprobs_equal_generation,
    assert_ranking,
    assert_self_patch_changes_nothing,
    forced_sequences,
    generate,
    oracle_completion,
)
from spoiled import TOO_LARGE, build_overflow_request, huge_patch

from snpatch import Constant, Engine, Noise, Patch, Ranking, ReceiptError, Sampling, SnpatchError
from snpatch.errors import OverflowedError, SpoiledEngineError
from snpatch.op import ops
from snpatch.op.plan import UNRANKED, PlanColumn


@pytest.fixture(scope="module")
def engines(zoo):
    engines_by_options = {}

    def get(architecture="llama", **options) -> Engine:
        key = (architecture, *sorted(options.items()))
        if key not in engines_by_options:
            model = zoo(architecture)
            adapters = {n: list(f) for n, f in model.adapters.items()}
            engines_by_options[key] = Engine(model.folder, adapters, backend="transformers", **options)
        return engines_by_options[key]

    return get


@pytest.fixture(scope="module")
def llama(zoo):
    return zoo("llama")


@pytest.fixture
def engine(engines):
    return engines()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_mixed_batch_equals_the_oracle(zoo, engines, architecture):
    jobs = [*JOBS, *EXTENDED_JOBS, *INTERVENTION_JOBS]
    assert_equals_oracle(zoo(architecture), jobs, generate(engines(architecture), jobs))


@pytest.mark.parametrize("architecture", tiny.KV_ARCHITECTURES)
def test_adapters_on_keys_and_values_equal_the_oracle(zoo, engines, architecture):
    jobs = [
        Job(j.prompt, j.recipient, j.donor, j.window, j.positions, j.order, j.seed, suffix="_kv") for j in JOBS[:11]
    ]
    assert_equals_oracle(zoo(architecture), jobs, generate(engines(architecture), jobs))


def test_oracle_patches_change_most_completions(zoo):
    """On most architectures the unpatched model chooses another token somewhere in each patched completion, so a patch
    without effect would fail the comparison.
    """
    for job in JOBS:
        if job.window == (0, 0):
            continue
        num_changed = 0
        for tiny_model in map(zoo, tiny.ARCHITECTURES):
            recipient, _ = job.oracle(tiny_model)
            ids = oracle_completion(tiny_model, job).ids
            unpatched_ids = recipient.forward([*job.ids, *ids])[len(job.ids) - 1 : -1].argmax(-1)
            num_changed += unpatched_ids.tolist() != ids
        assert num_changed > len(tiny.ARCHITECTURES) / 2, job


def test_promise_1_k_0_gives_the_recipient_and_k_all_the_donor(engine):
    assert_k_zero_and_all_give_pure_completions(engine)


@pytest.mark.parametrize("model", ["base", "sft", "dpo_kv"])
def test_promise_2_model_patched_into_itself_is_unchanged(engine, model):
    assert_self_patch_changes_nothing(engine, model)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 3, "token_budget": None},
        {"batch_size": 16, "token_budget": None},
        {"token_budget": 60},
        {"token_budget": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_promise_3_mixed_batch_equals_its_requests_one_by_one(engines, architecture, options):
    samplings = [Sampling(max_tokens=3 + i % 9, logprobs=i % 2 == 0) for i in range(len(JOBS))]
    samplings[3] = samplings[8] = Sampling(temperature=1.0, seed=11, max_tokens=9)
    singles = [generate(engines(architecture), [job], s)[0] for job, s in zip(JOBS, samplings, strict=True)]
    batch = generate(engines(architecture, **options), JOBS, samplings)
    assert_batch_equals_single(batch, singles, LOGPROB)


def test_promise_4_patched_request_does_not_change_later_plain_ones(engine):
    unpatched_jobs = [Job(i, name) for i in range(8) for name in ("base", "sft")]
    before = generate(engine, unpatched_jobs)
    generate(engine, JOBS)
    engine.contrast(IDS, "sft", "dpo", positions="prompt")
    assert generate(engine, unpatched_jobs) == before


@pytest.mark.parametrize("source", TOO_LARGE, ids=lambda source: type(source).__name__)
def test_promise_4_overflowing_patch_is_an_error_and_changes_no_other_request(engine, source):
    unpatched_jobs = [Job(i, name) for i in range(4) for name in ("base", "sft")]
    expected = [completion.token_ids for completion in generate(engine, unpatched_jobs)]
    sampling = Sampling(max_tokens=10)
    requests = [engine.requests.patched(job.ids, job.patch, sampling=sampling) for job in unpatched_jobs]
    outputs = dict(engine.run([build_overflow_request(engine, [40, 41], source, 10), *requests]))
    assert type(outputs[0].error) is OverflowedError
    assert "overflowed in float32 at layer 0 under its patch" in str(outputs[0].error)
    assert [outputs[index].token_ids for index in range(1, 9)] == expected
    with pytest.raises(OverflowedError, match="under its patch"):
        engine.generate([[40, 41]], huge_patch(), sampling)
    assert [completion.token_ids for completion in generate(engine, unpatched_jobs)] == expected


def test_unpatched_completion_that_overflows_restarts_the_engine(engine, monkeypatch):
    expected, executor = generate(engine, [Job(2, "base")]), engine.executor
    real = ops.patched_glu

    def run_with_nan(gate_up, *tensors, **setting):
        return real(gate_up * (torch.nan if setting["layer"] == 1 else 1), *tensors, **setting)

    monkeypatch.setattr(ops, "patched_glu", run_with_nan)
    with pytest.raises(SpoiledEngineError, match=r"the engine is spoiled: .* in float32 at layer 1 without a patch"):
        generate(engine, [Job(2, "base")])
    assert engine.executor is not executor
    with pytest.raises(OverflowedError, match="the model itself overflows on this prompt"):
        generate(engine, [Job(2, "base")])
    monkeypatch.undo()
    assert generate(engine, [Job(2, "base")]) == expected


def miss_one_neuron(layer, rank, plan):
    if layer == 1:
        rank[:, 5] = UNRANKED


def miss_one_layer(layer, rank, plan):
    if layer == 2:
        plan[:, PlanColumn.HI] = plan[:, PlanColumn.LO]


def miss_decode(layer, rank, plan):
    if len(plan) == 1:
        plan[:, PlanColumn.HI] = plan[:, PlanColumn.LO]


def patch_one_too_many(layer, rank, plan):
    plan[0, PlanColumn.HI] += 1


def inject_fault(monkeypatch, fault, skip_layer=None):
    """Replace the op: `fault` may change its ranks and plan; a skipped layer does not record anything."""
    real = ops.patched_glu

    def run_with_fault(gate_up, scale, rank, constant, plan, stats, count, capture, receipt, **setting):
        rank, plan = rank.clone(), plan.clone()
        fault(setting["layer"], rank, plan)
        if setting["layer"] == skip_layer:
            stats, count, receipt, capture = stats.clone(), count.clone(), receipt.clone(), capture.clone()
        return real(gate_up, scale, rank, constant, plan, stats, count, capture, receipt, **setting)

    monkeypatch.setattr(ops, "patched_glu", run_with_fault)


def no_fault(layer, rank, plan):
    pass


@pytest.mark.parametrize("fault", [miss_one_neuron, miss_one_layer, miss_decode, patch_one_too_many])
def test_promise_6_patch_not_applied_in_full_is_an_error(engine, monkeypatch, fault):
    job = Job(2, "sft", "dpo", (0, 280))
    assert generate(engine, [job])[0].overwrites == 280 * (len(job.ids) + 9)
    inject_fault(monkeypatch, fault)
    with pytest.raises(ReceiptError, match=r"expected \d+ overwrites, the device did \d+"):
        generate(engine, [job])


def test_promise_6_only_a_failed_patch_is_an_error(engine, monkeypatch):
    inject_fault(monkeypatch, miss_one_neuron)
    generate(engine, [Job(i, "sft") for i in range(3)])  # nothing was to be patched
    with pytest.raises(ReceiptError):
        generate(engine, [Job(0, "sft"), Job(1, "sft", "dpo", (0, ALL)), Job(2, "base", VALUES, (0, 0))])


def test_promise_6_for_logprobs_constants_statistics_and_captures(engine, monkeypatch):
    inject_fault(monkeypatch, no_fault, skip_layer=1)
    with pytest.raises(ReceiptError):
        engine.logprobs(IDS, Job(0, "sft", "dpo", (0, ALL)).patch)
    with pytest.raises(ReceiptError):
        generate(engine, [Job(0, "sft", VALUES, (0, ALL))])
    with pytest.raises(ReceiptError, match="counted tokens per layer"):
        engine.contrast(IDS, "sft", "dpo", positions="prompt")
    with pytest.raises(ReceiptError, match="capture"):
        engine.capture(IDS, "sft", RANKINGS[0], ALL)


def test_promise_7_statistics_use_memory_for_neurons_not_for_tokens(engines, monkeypatch):
    """Compare the peak of live tensors inside the op for 2 batches and for 20 batches of the same prompts."""
    engine, real, peak = engines(batch_size=4), ops.patched_glu, 0

    def measuring(*tensors, **setting):
        nonlocal peak
        alive = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if type(t) is torch.Tensor}
        peak = max(peak, sum(t.untyped_storage().nbytes() for t in alive.values()))
        return real(*tensors, **setting)

    monkeypatch.setattr(ops, "patched_glu", measuring)
    peaks = []
    for repeats in (1, 10):
        gc.collect()
        gc.freeze()  # tensors that are alive now are not counted
        peak = 0
        engine.contrast(IDS * repeats, "sft", "dpo", positions="prompt")
        peaks.append(peak)
        gc.unfreeze()
    assert peaks[0] > tiny.LAYERS * 5 * tiny.NEURONS * 8, "not even the sums were counted"
    # Storing one float per neuron and token would add ten times as many bytes.
    assert peaks[1] - peaks[0] < 0.1 * 9 * sum(map(len, IDS)) * ALL * 4


@pytest.mark.parametrize("positions", ["completion", "completion_shifted", "prompt", "last_prompt_token"])
@pytest.mark.parametrize(("first", "second"), [("sft", "dpo"), ("base", "sft_kv")])
def test_contrast_of_given_completions_equals_the_oracle(llama, engine, positions, first, second):
    models = [oracle.model(*llama.checkpoints[name]) for name in (first, second)]
    ranking = engine.contrast(IDS, first, second, positions=positions, completions=COMPLETIONS, exclude_layers=())
    assert_ranking(ranking, oracle.contrast(*models, forced_sequences(positions)))
    assert len(ranking) == ALL
    assert {"recipient": first, "donor": second, "positions": positions}.items() <= ranking.meta.items()


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "llama"])
def test_contrast_on_every_architecture_equals_the_oracle(zoo, engines, architecture):
    tiny_model = zoo(architecture)
    models = [oracle.model(*tiny_model.checkpoints[name]) for name in ("base", "dpo")]
    options = {"batch_size": 3, "token_budget": None}
    ranking = engines(architecture, **options).contrast(IDS, "base", "dpo", completions=COMPLETIONS)
    assert_ranking(ranking, oracle.contrast(*models, forced_sequences("completion")))
    assert ranking.rank[-1].eq(UNRANKED).all()
    assert len(ranking) == ALL - tiny.NEURONS


def test_contrast_accepts_strings_and_token_ids(engine):
    as_text = [ENCODE.decode(ids) for ids in COMPLETIONS]
    by_text = engine.contrast(tiny.PROMPTS, "sft", "dpo", completions=as_text)
    by_ids = engine.contrast(IDS, "sft", "dpo", completions=COMPLETIONS)
    assert torch.equal(by_text.scores, by_ids.scores)
    assert torch.equal(by_text.rank, by_ids.rank)
    assert by_text.meta["tokens"] == sum(map(len, COMPLETIONS))


def test_contrast_of_one_model_with_itself_is_an_error(engine):
    with pytest.raises(SnpatchError, match="expected two models, got sft and sft, which are equal by content"):
        engine.contrast(IDS, "sft", "sft", completions=COMPLETIONS)


@pytest.fixture(scope="module")
def eos_engine(llama, tmp_path_factory):
    """Return the Llama with an EOS that sft generates in some completions, at different positions."""
    texts = [oracle.generate(oracle.model(*llama.checkpoints["sft"]), ids, 10).ids for ids in IDS]

    def ends(token: int) -> list[int]:
        return [text.index(token) for text in texts if token in text]

    token = max({t for text in texts for t in text}, key=lambda t: (len({i for i in ends(t) if i < 9}), -len(ends(t))))
    assert len(set(ends(token))) >= 2
    assert len(ends(token)) < len(IDS)
    tiny_model = llama.with_eos(token, tmp_path_factory.mktemp("ended") / "model")
    return (
        tiny_model,
        token,
        Engine(tiny_model.folder, {n: list(f) for n, f in tiny_model.adapters.items()}, backend="transformers"),
    )


@pytest.mark.parametrize("positions", ["completion", "completion_shifted"])
def test_contrast_generates_completions_and_does_not_count_eos(eos_engine, positions):
    tiny_model, token, engine = eos_engine
    models = [oracle.model(*tiny_model.checkpoints[name]) for name in ("sft", "dpo")]
    texts = []
    for prompt in IDS:
        text = oracle.generate(models[0], prompt, 10, eos=token).ids
        length = len(text) - (text[-1] == token)
        texts.append((prompt + text[:length], oracle.scored_positions(positions, len(prompt), length)))
    ranking = engine.contrast(IDS, "sft", "dpo", positions=positions, sampling=Sampling(max_tokens=10))
    assert_ranking(ranking, oracle.contrast(*models, texts))


def test_contrast_of_given_completions_does_not_count_eos(eos_engine):
    _, _, engine = eos_engine
    sampling = Sampling(max_tokens=10)
    texts = [c.token_ids for c in engine.generate(IDS, "sft", sampling)]
    ranking = engine.contrast(IDS, "sft", "dpo", completions=texts)
    assert ranking.meta["tokens"] == engine.contrast(IDS, "sft", "dpo", sampling=sampling).meta["tokens"]


def test_eos_ends_a_completion_after_min_tokens(eos_engine):
    tiny_model, token, engine = eos_engine
    sft = oracle.model(*tiny_model.checkpoints["sft"])
    for min_tokens in (0, 4):
        completions = engine.generate(IDS, "sft", Sampling(max_tokens=10, min_tokens=min_tokens, logprobs=True))
        for prompt, completion in zip(IDS, completions, strict=True):
            expected = oracle.generate(sft, prompt, 10, eos=token, min_tokens=min_tokens)
            assert completion.token_ids == expected.ids
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB)
            has_ended = expected.ids[-1] == token
            assert completion.finish_reason == ("eos" if has_ended else "length")
            assert completion.text == " ".join(tiny.VOCAB[i] for i in expected.ids[: len(expected.ids) - has_ended])
    on = engine.generate(IDS, "sft", Sampling(max_tokens=10, ignore_eos=True))
    assert [c.token_ids for c in on] == [oracle.generate(sft, prompt, 10).ids for prompt in IDS]
    assert {c.finish_reason for c in on} == {"length"}


def test_patched_completion_that_ends_early_counts_its_read_positions(eos_engine):
    tiny_model, token, engine = eos_engine
    jobs = [Job(i, "sft", "dpo", (0, 30)) for i in range(8)]
    completions = generate(engine, jobs)
    lengths = set()
    for job, completion in zip(jobs, completions, strict=True):
        recipient, patch = job.oracle(tiny_model)
        expected = oracle.generate(recipient, job.ids, 10, patch, eos=token).ids
        assert completion.token_ids == expected
        assert completion.overwrites == 30 * (len(job.ids) + len(expected) - 1)
        lengths.add(len(expected))
    assert len(lengths) > 1, "no completion ends early"


def test_stop_strings_and_max_tokens_end_a_completion(engine):
    (full_completion,) = engine.generate([IDS[0]], "base", Sampling(max_tokens=10))
    words = full_completion.text.split()
    assert len(set(words[:6])) == 6
    (first_token,) = engine.generate([IDS[0]], "base", Sampling(max_tokens=1))
    assert (first_token.token_ids, first_token.finish_reason, first_token.text) == (
        full_completion.token_ids[:1],
        "length",
        words[0],
    )
    for stop, match in (((words[4],), words[4]), (("nowhere", words[5], words[3]), words[3])):
        (stopped_completion,) = engine.generate([IDS[0]], "base", Sampling(max_tokens=10, stop=stop))
        at = words.index(match)
        assert (stopped_completion.finish_reason, stopped_completion.stop_reason) == ("stop", match)
        assert stopped_completion.token_ids == full_completion.token_ids[: at + 1]
        assert stopped_completion.text == " ".join(words[:at]) + " "
    across = f"{words[2]} {words[3]}"
    (stopped_completion,) = engine.generate([IDS[0]], "base", Sampling(max_tokens=10, stop=(across,)))
    assert stopped_completion.text == " ".join(words[:2]) + " "
    assert len(stopped_completion.token_ids) == 4
    (min_tokens_completion,) = engine.generate(
        [IDS[0]], "base", Sampling(max_tokens=10, min_tokens=6, stop=(words[0],))
    )
    assert len(min_tokens_completion.token_ids) >= 6


def test_context_length_ends_a_completion(llama, engine):
    prompt = [tiny.BOS, *(10 + i % 90 for i in range(tiny.CONTEXT - 4))]
    (completion,) = engine.generate([prompt], "sft", Sampling(max_tokens=10))
    expected = oracle.generate(oracle.model(*llama.checkpoints["sft"]), prompt, 3)
    assert (completion.token_ids, completion.finish_reason) == (expected.ids, "length")
    with pytest.raises(
        SnpatchError, match=f"prompt 0: expected at most .* tokens for a context of {tiny.CONTEXT}, got 128"
    ):
        engine.generate([[*prompt, 9, 9, 9]], "sft")


def test_sampling_depends_only_on_the_seed(engine):
    def texts(seeds, n=8):
        samplings = [Sampling(temperature=1.0, max_tokens=8, seed=seed) for seed in seeds]
        return [c.token_ids for c in engine.generate([IDS[2]] * len(seeds), "sft", samplings)]

    seeds = list(range(8))
    together = texts(seeds)
    assert together == [texts([seed])[0] for seed in seeds]
    assert together == texts(seeds[::-1])[::-1]
    assert len(set(map(tuple, together))) == 8
    fresh = texts([None] * 8)
    sampled_texts = [
        tuple(ids) for ids in fresh if len(ids) > 1
    ]  # one in a hundred is only an EOS, and two of those are equal
    assert len(set(sampled_texts)) == len(sampled_texts) > 4


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_from_one_candidate_is_greedy(engine, narrow):
    sampling = Sampling(**{"temperature": 1.0, "max_tokens": 8, "seed": 3, **narrow})
    samples = engine.generate(IDS, "sft", sampling)
    assert [c.token_ids for c in samples] == [c.token_ids for c in engine.generate(IDS, "sft", Sampling(max_tokens=8))]


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.0, "top_k": 5}])
def test_sampling_follows_the_models_distribution(llama, engine, options):
    """Among 1000 first tokens each token's share is within 5 standard errors of its probability."""
    logits = oracle.model(*llama.checkpoints["sft"]).forward(IDS[4])[-1].double()
    share = (logits / options["temperature"]).softmax(-1)
    if "top_k" in options:
        share[share < share.topk(options["top_k"]).values[-1]] = 0.0
        share /= share.sum()
    n = 1000
    samplings = [Sampling(max_tokens=1, seed=seed, logprobs=True, **options) for seed in range(n)]
    completions = engine.generate([IDS[4]] * n, "sft", samplings)
    token_ids = torch.tensor([c.token_ids[0] for c in completions])
    counts = torch.bincount(token_ids, minlength=len(logits)).double()
    assert (counts[share == 0] == 0).all()
    assert ((counts - n * share).abs() <= 5 * (n * share * (1 - share)).sqrt() + 1).all()
    expected_logprobs = logits.log_softmax(-1)[token_ids]
    assert torch.tensor([c.logprobs[0] for c in completions]).sub(expected_logprobs).abs().max() < LOGPROB


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_capture_is_in_rank_order_on_every_architecture(zoo, engines, architecture):
    tiny_model = zoo(architecture)
    engine = engines(architecture)
    for model, positions, k in (("sft", "last_prompt_token", 40), ("dpo", 1, 288), ("base", -2, 1)):
        features = engine.capture(IDS, model, RANKINGS[0], k, positions=positions)
        position = -1 if positions == "last_prompt_token" else positions
        activations = [oracle.model(*tiny_model.checkpoints[model]).activations(ids)[position] for ids in IDS]
        expected = torch.stack([torch.stack([a[layer, n] for layer, n in ORDERS[0][:k]]) for a in activations])
        assert features.shape == (8, k)
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_logprobs_patched_and_unpatched_equal_the_oracle(zoo, engines, architecture):
    results = engines(architecture).logprobs([job.ids for job in JOBS], [job.patch for job in JOBS])
    for job, logprobs in zip(JOBS, results, strict=True):
        recipient, patch = job.oracle(zoo(architecture))
        expected = oracle.logprobs(recipient, job.ids, patch)
        torch.testing.assert_close(logprobs.values, expected, rtol=0, atol=LOGPROB)
    assert_logprobs_equal_generation(engines(architecture), zoo(architecture), JOBS)


def test_bfloat16_logprobs_are_close_to_the_oracle(llama, engines):
    jobs = [job for job in JOBS if job.prompt != 1]
    half = engines(dtype="bfloat16").logprobs([job.ids for job in jobs], [job.patch for job in jobs])
    for job, logprobs in zip(jobs, half, strict=True):
        recipient, patch = job.oracle(llama)
        assert (logprobs.values - oracle.logprobs(recipient, job.ids, patch)).abs().mean() < 0.1


def test_prompts_may_be_strings_chats_or_token_ids(engine):
    sampling = Sampling(max_tokens=3)
    chat = [{"role": "user", "content": tiny.PROMPTS[2]}]
    tulu = [tiny.BOS, 4, *IDS[2][1:], 5]  # <|user|> and <|assistant|> are 4 and 5
    text, chat_completion, ids = engine.generate([tiny.PROMPTS[2], chat, tulu], "sft", sampling)
    assert text.prompt_ids == IDS[2]
    assert chat_completion.prompt_ids == ids.prompt_ids == tulu
    assert chat_completion.token_ids == ids.token_ids
    assert engine.models == ("base", "sft", "dpo", "sft_kv", "dpo_kv")


def test_progress_counts_to_the_end(engines):
    calls = []
    engines(batch_size=3, token_budget=None).generate(IDS, progress=lambda *call: calls.append(call))
    assert calls == [(n, 8) for n in range(1, 9)]


OTHER = Ranking.from_order(torch.tensor([[0, 0]]), (2, 5))
SCORED = Ranking.from_scores(torch.rand(SHAPE), [-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([IDS[0]], "nobody"), "model: expected one of base, sft"),
        (lambda e: e.generate([IDS[0]], Patch("sft", "nobody", RANKINGS[0], 3)), "got 'nobody'"),
        (lambda e: e.generate(IDS, ["base"]), "one for each of 8 prompts, got 1"),
        (
            lambda e: e.generate([IDS[0]], Patch("sft", "dpo", OTHER, 1)),
            r"expected the model's shape \[3, 96\], got \[2, 5\]",
        ),
        (lambda e: e.generate("a text"), "prompts: expected a list"),
        (lambda e: e.generate(ids for ids in IDS), "prompts: expected a list, got generator"),
        (lambda e: e.logprobs({"a": 1}), "prompts: expected a list, got dict"),
        (lambda e: e.generate([b"the cat"]), "prompt 0: expected a string, a chat"),
        (lambda e: e.capture([None], "sft", RANKINGS[0], 3), "prompt 0: expected a string, a chat"),
        (lambda e: e.contrast(IDS, "sft", "dpo", completions="a text"), "completions: expected a list, got one string"),
        (lambda e: e.contrast(IDS, "sft", "dpo", sampling={"max_tokens": 3}), "sampling: expected a Sampling, got"),
        (lambda e: e.generate(IDS, sampling={"max_tokens": 3}), "sampling: expected Sampling, got"),
        (lambda e: e.generate([]), "prompts: expected at least one prompt"),
        (lambda e: e.generate([IDS[0], []]), "prompt 1: expected at least one token"),
        (lambda e: e.generate([[1, 128]]), "expected token ids in 0..127"),
        (
            lambda e: e.contrast(IDS, "sft", "dpo", positions="somewhere"),
            "positions: expected one of completion, completion_shifted",
        ),
        (
            lambda e: e.contrast(IDS, "sft", "dpo", completions=COMPLETIONS[1:]),
            "completions: expected one for each of 8 prompts, got 7",
        ),
        (lambda e: e.contrast(IDS, "sft", "dpo", completions=[[]] * 8), "got only empty completions"),
        (lambda e: e.contrast(IDS[:1], "sft", "dpo", completions=[[128]]), "expected token ids in 0..127"),
        (lambda e: e.contrast(IDS[:1], "sft", "dpo", completions=[[9] * 123]), "for a context of 128"),
        (
            lambda e: e.logprobs(IDS, completions=COMPLETIONS[1:]),
            "completions: expected one for each of 8 prompts, got 7",
        ),
        (lambda e: e.logprobs(IDS, completions=COMPLETIONS), "completion 2: expected at least one token"),
        (lambda e: e.logprobs(IDS[:1], completions=[[9] * 123]), "prompt 0: expected at most .* for a context of 128"),
        (lambda e: e.capture(IDS, "sft", RANKINGS[0], 0), r"k: expected 1\.\.288"),
        (lambda e: e.capture(IDS, "sft", SCORED, 193), r"k: expected 1\.\.192"),
        (lambda e: e.capture(IDS, "sft", RANKINGS[0], 3, positions=2), "the 2 tokens of prompt 1"),
        (lambda e: e.add_adapter("sft", []), "'sft' is taken"),
        (lambda e: Patch("sft", "dpo", SCORED, 193), "reaches past the ranking's 192 neurons"),
        (lambda e: Patch("sft", "dpo", SCORED, (3, 2)), "0 <= lo <= hi"),
        (
            lambda e: Patch("sft", "dpo", SCORED, 1, "somewhere"),
            "positions: expected one of all, prompt, last_prompt_token, completion",
        ),
        (lambda e: Patch("sft", Constant(torch.zeros(2, 5)), SCORED, 1), r"values are \[2, 5\]"),
        (lambda e: Constant(torch.full(SHAPE, math.nan)), r"constant holds NaN or infinity: .* got nan at"),
        (lambda e: Noise(-VALUES.abs()), "deviation: expected at least 0"),
        (lambda e: Constant.mean(SCORED), "holds no recipient_mean"),
        (lambda e: Sampling(max_tokens=0), "max_tokens: expected at least 1"),
        (lambda e: Sampling(temperature=-1.0), "temperature: expected 0 .greedy. or at least 1e-5"),
        (lambda e: Sampling(top_p=0.0), r"top_p: expected a value in \(0, 1\]"),
    ],
)
def test_invalid_call_error_names_the_cause(engine, call, message):
    with pytest.raises(SnpatchError, match=message):
        call(engine)


def test_constants_and_noise_take_a_contrasts_moments(engine):
    ranking = engine.contrast(IDS, "sft", "dpo", completions=COMPLETIONS)
    assert torch.equal(Constant.zero(ranking).values, torch.zeros(SHAPE))
    assert torch.equal(Constant.mean(ranking).values, ranking.moments["recipient_mean"])
    assert torch.equal(Constant.mean(ranking, of="donor").values, ranking.moments["donor_mean"])
    assert torch.equal(Noise.of_std(ranking, 3.0).deviation, ranking.moments["recipient_std"] * 3)


def test_broken_or_untested_model_is_an_error(tmp_path, llama):
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SnpatchError, match="architecture gpt2 is not tested"):
        Engine(tmp_path / "gpt2", backend="transformers")
    with pytest.raises(SnpatchError, match="no such folder"):
        Engine(tmp_path / "nothing", backend="transformers")
    folder = llama.with_eos(tiny.EOS, tmp_path / "broken").folder
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnpatchError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        Engine(folder, backend="transformers")


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_positions_that_depend_on_the_batch_are_an_error(llama, tmp_path, rope_type):
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0,
                                 "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnpatchError, match=f"{rope_type} rotary positions depend on the longest text"):
        Engine(folder, backend="transformers")


def test_stop_string_within_min_tokens_does_not_end_a_completion(engine):
    """As in vLLM, only text after min_tokens is searched, and nothing before it is cut."""
    free = engine.generate([IDS[0]], "sft", Sampling(max_tokens=8))[0]
    stop = engine.tokenizer.decode([free.token_ids[1]])
    last = max(i for i in range(8) if engine.tokenizer.decode([free.token_ids[i]]) == stop)
    assert engine.generate([IDS[0]], "sft", Sampling(max_tokens=8, stop=stop))[0].token_ids == free.token_ids[:2]
    completion = engine.generate([IDS[0]], "sft", Sampling(max_tokens=8, min_tokens=last + 1, stop=stop))[0]
    assert completion.finish_reason == "length"
    assert completion.text == free.text
