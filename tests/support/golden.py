"""The published implementation's outputs in tests/goldens, as an engine's patches and expected results."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from snpatch import Constant, Patch, Ranking, Sampling

HOME = Path(__file__).parents[1] / "goldens" / "A"
SHAPE = (4, 352)
ADAPTERS = {"sft": [HOME / "adapters" / "sft"], "dpo": [HOME / "adapters" / "sft", HOME / "adapters" / "dpo"]}
RELATIVE = 1e-5  # to the largest value for a contrast's arrays and features, to the value for perplexity
LOGITS = 1e-4
WRITE = Sampling(max_tokens=24)
PAD = 3


def read_golden(name: str):
    return json.loads((HOME / name).read_text())


PROMPTS = read_golden("prompts.json")["prompts"]
IDS = [prompt["input_ids"] for prompt in PROMPTS]
CONTRAST, GENERATION = load_file(HOME / "contrast.safetensors"), read_golden("generation.json")
RANKING = Ranking.from_order(
    CONTRAST["completion.batch5.neuron_ranks"],
    SHAPE,
    moments={
        "recipient_mean": CONTRAST["completion.batch5.second_mean"],
        "donor_mean": CONTRAST["completion.batch5.first_mean"],
    },
)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def parse_golden_patch(run: dict) -> Patch | str:
    """Return the patch of a run in generation.json or ablation.json."""
    if "value" in run:
        donor = {
            "zero": lambda: Constant.zero(RANKING),
            "mean_of_sft": lambda: Constant.mean(RANKING, of="recipient"),
            "mean_of_dpo": lambda: Constant.mean(RANKING, of="donor"),
        }[run["value"]]()
        return Patch(run["model"], donor, RANKING, run["k"])
    return run["recipient"] if run["donor"] is None else Patch(run["recipient"], "dpo", RANKING, run["k"])


def without_padding(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


RUNS = {**GENERATION["runs"], **read_golden("ablation.json")["runs"]}
GOLDEN_LOGITS = {**load_file(HOME / "generation.safetensors"), **load_file(HOME / "ablation.safetensors")}
