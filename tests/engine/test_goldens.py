"""Engine results equal the published implementation's; tests/goldens/README.md describes data and tolerances."""

import shutil

import pytest
import torch
from golden import (
    ADAPTERS,
    CONTRAST,
    GENERATION,
    GOLDEN_LOGITS,
    HOME,
    IDS,
    LOGITS,
    PROMPTS,
    RANKING,
    RELATIVE,
    RUNS,
    WRITE,
    assert_near,
    parse_golden_patch,
    read_golden,
    without_padding,
)
from safetensors.torch import load_file

from snpatch import Engine, Patch, Sampling
from snpatch.executors.transformers import batch as batch_module
from snpatch.sweeps.perplexity import compute_perplexities, split_into_windows


@pytest.fixture(scope="module")
def engine():
    """Return an engine with the published code's batches: 5, 5, 2, in the given order."""
    return Engine(HOME / "model", ADAPTERS, backend="transformers", dtype="float32", batch_size=5, token_budget=None)


@pytest.fixture(scope="module")
def eos_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(HOME / "eos_variant", folder)
    shutil.copy(HOME / "model" / "model.safetensors", folder)
    return Engine(folder, ADAPTERS, backend="transformers", dtype="float32", batch_size=5, token_budget=None)


@pytest.fixture
def logits(monkeypatch):
    """Record each request's logits, one row per step, in the order of the requests."""
    rows_by_writer: dict[int, list[torch.Tensor]] = {}
    known_writers = []  # kept alive, so that no id is used twice
    choose_tokens = batch_module.choose_tokens

    def spy(rows, writers):
        known_writers.extend(writers)
        for row, writer in zip(rows, writers, strict=True):
            rows_by_writer.setdefault(id(writer), []).append(row.clone())
        return choose_tokens(rows, writers)

    monkeypatch.setattr(batch_module, "choose_tokens", spy)
    return lambda: [torch.stack(rows) for rows in rows_by_writer.values()]


@pytest.mark.parametrize("batch", ["batch5", "batch1"])
@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("completion", "completion"),
        ("completion_eos", "completion"),
        ("prompt", "prompt"),
        ("prompt_last", "last_prompt_token"),
    ],
)
def test_contrast_equals_golden(engine, eos_engine, kind, positions, batch):
    texts = read_golden("contrast.json")[f"{kind}.{batch}"]
    ranking = (eos_engine if kind == "completion_eos" else engine).contrast(
        IDS, "sft", "dpo", positions=positions, sampling=WRITE, exclude_layers=()
    )
    assert ranking.meta["tokens"] == sum(len(text["scored_positions"]) for text in texts)
    golden = {name: CONTRAST[f"{kind}.{batch}.{name}"] for name in ("change_scores", "neuron_ranks")}
    assert_near(ranking.scores, golden["change_scores"])
    for role, name in (("recipient", "second"), ("donor", "first")):
        for moment in ("mean", "std"):
            assert_near(ranking.moments[f"{role}_{moment}"], CONTRAST[f"{kind}.{batch}.{name}_{moment}"])
    # Neurons may swap only where their golden scores are almost equal.
    scores, expected = (golden["change_scores"][tuple(o.long().T)] for o in (ranking.top(1408), golden["neuron_ranks"]))
    assert (scores - expected).abs().max() <= RELATIVE * expected.max()


def test_contrast_of_golden_completions_gives_the_same_scores(engine):
    """Teacher-forced, with completions given as strings."""
    completions = []
    for prompt, text in zip(IDS, read_golden("contrast.json")["completion.batch5"], strict=True):
        assert text["input_ids"][: len(prompt)] == prompt
        completions.append(engine.tokenizer.decode(text["input_ids"][len(prompt) :]))
    ranking = engine.contrast([p["text"] for p in PROMPTS], "sft", "dpo", completions=completions)
    assert_near(ranking.scores, CONTRAST["completion.batch5.change_scores"])
    assert len(ranking) == 3 * 352


@pytest.mark.parametrize("name", sorted({name.rsplit(".", 1)[0] for name in RUNS}))
def test_generation_equals_golden(engine, eos_engine, logits, name):
    """Tokens are equal and the logits of the first and the last step close, for the batched and the single run."""
    run = RUNS[f"{name}.batch5"]
    completions = (eos_engine if name.startswith("eos") else engine).generate(IDS, parse_golden_patch(run), WRITE)
    steps = logits()
    for batch in ("batch5", "batch1"):
        ids = RUNS[f"{name}.{batch}"]["ids"]
        assert [c.token_ids for c in completions] == [without_padding(row, run.get("eos_token_id")) for row in ids]
        for index, prompt in enumerate(GENERATION["logit_prompts"]):
            for step, position in ((0, "first"), (-1, "last")):
                expected = GOLDEN_LOGITS[f"{name}.{batch}.{position}_logits"][index]
                assert (steps[prompt][step] - expected).abs().max() <= LOGITS
    # The patch covers the prompt and every generated token but the last, which is never read.
    read_tokens = [len(c.prompt_ids) + len(c.token_ids) - 1 for c in completions]
    assert [c.overwrites for c in completions] == [n * (run.get("k") or 0) for n in read_tokens]


def test_generation_of_all_runs_in_one_batch_equals_golden():
    """All patched runs in one mixed batch, sized by the engine, give the same tokens."""
    names = sorted(n for n in RUNS if n.endswith("batch1") and not n.startswith("eos"))
    engine = Engine(HOME / "model", ADAPTERS, backend="transformers", dtype="float32")
    pairs = [(name, prompt) for prompt in (0, 5, 11) for name in names]
    patches = [parse_golden_patch(RUNS[name]) for name, _ in pairs]
    completions = engine.generate([IDS[prompt] for _, prompt in pairs], patches, WRITE)
    assert [c.token_ids for c in completions] == [RUNS[name]["ids"][prompt] for name, prompt in pairs]


def test_prompts_as_text_and_as_chat_have_the_golden_ids(engine):
    chats = [[{"role": "user", "content": prompt["content"]}] for prompt in PROMPTS]
    for prompts in (chats, [prompt["text"] for prompt in PROMPTS]):
        completions = engine.generate(prompts, "base", Sampling(max_tokens=1))
        assert [c.prompt_ids for c in completions] == IDS


@pytest.mark.parametrize("batch", ["batch5", "batch1"])
def test_capture_equals_golden_features(engine, batch):
    golden = load_file(HOME / "features.safetensors")
    assert torch.equal(RANKING.top(64).int(), golden["columns_rank_order"].int())
    assert_near(engine.capture(IDS, "sft", RANKING, 64), golden[f"{batch}.features_rank_order"])


@pytest.mark.parametrize("name", read_golden("perplexity.json")["results"])
def test_perplexity_equals_golden(engine, name):
    golden = read_golden("perplexity.json")
    ids, size, expected = golden["input_ids"], golden["window"], golden["results"][name]
    windows = split_into_windows(ids, size)
    assert list(map(len, windows)) == golden["window_lengths"]
    patches = {
        "recipient": expected["recipient"],
        "donor": "dpo",
        "patched": Patch(expected["recipient"], "dpo", RANKING, expected["k"]),
    }
    for role, result in zip(patches, compute_perplexities(engine, windows, list(patches.values())), strict=True):
        assert [total / n for total, n in result.losses] == pytest.approx(expected[f"{role}_nll"], rel=RELATIVE)
        assert result.window_mean == pytest.approx(expected[f"{role}_ppl"], rel=RELATIVE)
