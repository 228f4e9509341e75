"""Inputs without effect are noted: equal models, adapters of ones, ties, a donor equal to the recipient."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from snpatch import Engine, Patch, Ranking, Sampling, SnpatchError
from snpatch.judges.refusal import RefusalWords
from snpatch.ranking.contrast_statistics import Statistics
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep import sweep

PROMPTS = tiny.PROMPTS[:3]
SHAPE = (tiny.LAYERS, tiny.NEURONS)


def ones(folder, out, **values):
    """Return an IA3 adapter of ones but for the given layer's."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    vectors = {(layer, "down_proj"): torch.ones(tiny.NEURONS) for layer in range(tiny.LAYERS)}
    for layer, value in values.items():
        vectors[int(layer.removeprefix("layer")), "down_proj"] *= value
    tiny.write_adapter(model, out, ["down_proj"], 0, vectors)
    return out


@pytest.fixture(scope="module")
def engine(zoo, tmp_path_factory):
    """Yield an engine with models same (scales of 1), last (another last layer) and untrained (a LoRA whose B is 0)."""
    folder, out = zoo("llama").folder, tmp_path_factory.mktemp("degenerate")
    lora = tiny.write_lora(folder, out)
    path = lora / "adapter_model.safetensors"
    save_file({k: t if "lora_A" in k else torch.zeros_like(t) for k, t in load_file(path).items()}, path)
    adapters = {
        "same": ones(folder, out / "same"),
        "last": ones(folder, out / "last", layer2=2.0),
        "sft": zoo("llama").adapters["sft"],
    }
    with Engine(folder, adapters, models={"untrained": {"lora": lora}}, backend="transformers") as degenerate_engine:
        yield degenerate_engine


def test_adapter_without_effect_is_noted_at_start(engine):
    notes = [note for note in engine.notes if "changes nothing" in note]
    assert [why in note for why, note in zip(("scales are 1", "updates are 0"), notes, strict=True)] == [True, True]
    assert all("it was never trained, or saved wrong" in note for note in notes)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("base", "same"), "expected two models, got base and same"),
        (("same", "same"), "expected two models, got same and same"),
        (("base", "untrained"), r"none of the 192 neurons differs between the two models on these texts"),
        (("base", "last"), r"none of the 192 neurons differs .* or an adapter changes nothing in the layers that are"),
    ],
)
@pytest.mark.parametrize("positions", ["completion", "prompt"])
def test_contrast_of_equal_models_is_rejected(engine, pair, message, positions):
    with pytest.raises(SnpatchError, match=message):
        engine.contrast(PROMPTS, *pair, positions=positions, sampling=Sampling(max_tokens=3))


def test_temperature_as_whole_number_samples(engine):
    whole, number = (Sampling(temperature=value, seed=0, max_tokens=3) for value in (1, 1.0))
    texts = [engine.generate([[5, 6]], "sft", sampling, progress=False)[0].token_ids for sampling in (whole, number)]
    assert texts[0] == texts[1]


def test_contrast_with_all_layers_excluded_is_one_line(engine):
    n_layers = engine.geometry.n_layers
    with pytest.raises(SnpatchError, match=f"exclude_layers: expected a layer to rank, got all {n_layers} excluded"):
        engine.contrast([[5, 6]], "base", engine.models[-1], exclude_layers=range(n_layers), progress=False)


def test_contrast_of_different_models_keeps_notes(engine):
    ranking = engine.contrast(PROMPTS, "base", "sft", sampling=Sampling(max_tokens=3))
    assert any("changes nothing" in note for note in ranking.meta["notes"])
    base_ranking = engine.contrast(PROMPTS, "base", sampling=Sampling(max_tokens=3))
    assert len(base_ranking) == 192, "one model alone is ranked by its own activations"


def test_statistics_of_equal_models_give_no_ranking():
    values = torch.randn(100, *SHAPE, dtype=torch.float64)
    sums = torch.stack([values.sum(0), values.square().sum(0)] * 2 + [torch.zeros(SHAPE, dtype=torch.float64)], 1)
    statistics = Statistics(sums, torch.full((SHAPE[0],), 100))
    with pytest.raises(SnpatchError, match="none of the 288 neurons differs between the two models"):
        Ranking.from_statistics(statistics)
    statistics.sums[1, 4, 7] = 1e-12 * statistics.sums[:, 1].max()  # rounding
    with pytest.raises(SnpatchError, match="none of the 288 neurons differs between the two models"):
        Ranking.from_statistics(statistics)
    statistics.sums[1, 4, 7] = 1e-8 * statistics.sums[:, 1].max()
    assert Ranking.from_statistics(statistics).top(1).tolist() == [[1, 7]]


def test_donor_equal_to_recipient_is_noted(zoo, tmp_path):
    adapter = ones(zoo("llama").folder, tmp_path / "same")
    with Engine(zoo("llama").folder, {"same": adapter}, backend="transformers") as engine:
        ranking, before = Ranking.from_scores(torch.rand(SHAPE)), len(engine.notes)
        for _ in range(2):
            engine.generate(PROMPTS, Patch("base", "same", ranking, 10), Sampling(max_tokens=2))
        (note,) = engine.notes[before:]
        assert "the donor of a patch is its recipient base by content: the patch changes nothing" in note
        config = SweepConfig(recipients=("base",), donors=("same",), windows=(10,), controls=0)
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        with pytest.raises(
            SnpatchError, match="sweep: expected two models, got base and same, which are equal by content"
        ):
            sweep(engine, chats, {"r": ranking}, {"cost": RefusalWords()}, config)


@pytest.mark.parametrize(
    ("scores", "border", "tied"),
    [
        (torch.zeros(SHAPE), 10, 288),
        (torch.arange(288.0).view(SHAPE), 10, 0),
        (torch.arange(288).div(4, rounding_mode="floor").float().view(SHAPE), 10, 4),
        (torch.arange(288).div(4, rounding_mode="floor").float().view(SHAPE), 8, 0),
        (torch.zeros(SHAPE), 288, 0),
    ],
)
def test_ties_across_window_border_are_noted_once(zoo, scores, border, tied):
    ranking = Ranking.from_scores(scores)
    assert ranking.ties(border) == tied
    assert ranking.ties(0) == ranking.random_control(5, seed=0, disjoint=False).ties(2) == 0
    with Engine(zoo("llama").folder, {"sft": zoo("llama").adapters["sft"]}, backend="transformers") as engine:
        engine.generate(PROMPTS, Patch("base", "sft", ranking, border), Sampling(max_tokens=1))
        notes = [f"{tied} neurons of a ranking share the score at a window's border, {border}"] if tied else []
        assert [note.partition(":")[0] for note in engine.notes] == notes
        if border < 288:
            engine.capture(PROMPTS, "base", ranking, border)
        assert len(engine.notes) == len(notes)


def test_sweep_notes_ties(zoo, tmp_path):
    ranking = Ranking.from_scores(torch.zeros(SHAPE))
    config = SweepConfig(
        recipients=("base",), donors=("sft",), windows=(10,), controls=0, sampling=Sampling(max_tokens=1)
    )
    with Engine(zoo("llama").folder, {"sft": zoo("llama").adapters["sft"]}, backend="transformers") as engine:
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        result = sweep(engine, chats, {"r": ranking}, {"cost": RefusalWords()}, config)
    assert "r: 288 neurons share the score at the border 10 of a window" in result.notes
