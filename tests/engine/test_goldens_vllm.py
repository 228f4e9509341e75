"""The published implementation's outputs (see test_goldens.py) compared with the vLLM backend."""

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
    RANKING,
    RELATIVE,
    RUNS,
    assert_near,
    parse_golden_patch,
    read_golden,
    without_padding,
)
from safetensors.torch import load_file

from snpatch import Engine, Patch, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine

SAMPLING = Sampling(max_tokens=24, logprobs=True)
NAMES = sorted({name.rsplit(".", 1)[0] for name in RUNS})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the model, and the same model with another EOS token."""
    eos = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(HOME / "eos_variant", eos)
    shutil.copy(HOME / "model" / "model.safetensors", eos)
    return {"": HOME / "model", "eos": eos}


@pytest.fixture(scope="module", params=["", "eos"])
def engine(request, folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
        options |= {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}
        with Engine(folders[request.param], ADAPTERS, backend="vllm", dtype="float32", **options) as engine:
            engine.is_eos = request.param == "eos"
            yield engine


def test_contrast_matches_golden_scores_and_moments(engine):
    kinds = {"completion_eos": "completion"} if engine.is_eos else {
        "completion": "completion", "prompt": "prompt", "prompt_last": "last_prompt_token"}  # fmt: skip
    for kind, at in kinds.items():
        ranking = engine.contrast(IDS, "sft", "dpo", positions=at, sampling=Sampling(max_tokens=24), exclude_layers=())
        for batch in ("batch5", "batch1"):
            assert_near(ranking.scores, CONTRAST[f"{kind}.{batch}.change_scores"])
            for role, name in (("recipient", "second"), ("donor", "first")):
                for moment in ("mean", "std"):
                    assert_near(ranking.moments[f"{role}_{moment}"], CONTRAST[f"{kind}.{batch}.{name}_{moment}"])


def test_generation_of_all_runs_in_one_batch_matches_goldens(engine):
    """Tokens are equal, and log-probabilities of the first and last token match the golden logits."""
    names = [name for name in NAMES if name.startswith("eos") == engine.is_eos]
    pairs = [(name, prompt) for name in names for prompt in range(len(IDS))]
    patches = [parse_golden_patch(RUNS[f"{name}.batch1"]) for name, _ in pairs]
    completions = engine.generate([IDS[prompt] for _, prompt in pairs], patches, SAMPLING)
    for (name, prompt), completion in zip(pairs, completions, strict=True):
        run = RUNS[f"{name}.batch1"]
        assert completion.token_ids == without_padding(run["ids"][prompt], run.get("eos_token_id")), name
        read_tokens = len(completion.prompt_ids) + len(completion.token_ids) - 1
        assert completion.overwrites == read_tokens * (run.get("k") or 0)
        if prompt in GENERATION["logit_prompts"]:
            index = GENERATION["logit_prompts"].index(prompt)
            for step, position in ((0, "first"), (-1, "last")):
                if position == "last" and run.get("eos_token_id") is not None:
                    continue  # last step of the padded batch, which an ended completion does not have
                golden = GOLDEN_LOGITS[f"{name}.batch1.{position}_logits"][index]
                want = golden.log_softmax(-1)[completion.token_ids[step]].item()
                assert completion.logprobs[step] == pytest.approx(want, abs=2 * LOGITS)


@pytest.mark.parametrize("engine", [""], indirect=True)
def test_captures_and_perplexity_match_goldens(engine):
    golden = load_file(HOME / "features.safetensors")
    assert_near(engine.capture(IDS, "sft", RANKING, 64), golden["batch1.features_rank_order"])
    golden = read_golden("perplexity.json")
    ids, size = golden["input_ids"], golden["window"]
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    for want in golden["results"].values():
        patch = Patch(want["recipient"], "dpo", RANKING, want["k"])
        for role, patches in {"recipient": want["recipient"], "donor": "dpo", "patched": patch}.items():
            losses = torch.stack([-logprobs.values.mean() for logprobs in engine.logprobs(windows, patches)])
            assert losses.tolist() == pytest.approx(want[f"{role}_nll"], rel=RELATIVE)
