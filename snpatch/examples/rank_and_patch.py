"""Rank the neurons of two models and patch the best into a third, which then refuses forbidden requests.

    python rank_and_patch.py

Replace MODEL, MODELS and the prompts with your own. The second set of prompts is not in the first one.
"""

from snpatch import Engine, Patch, Sampling, load_dataset
from snpatch.demo import DEMO_MODEL as DEMO

MODEL = DEMO / "base"
MODELS = {"sft": DEMO / "sft", "dpo": [DEMO / "sft", DEMO / "dpo"]}  # IA3 adapters, stacked in order


def main() -> None:
    ranking_prompts = load_dataset(DEMO / "contrast.jsonl").prompts[:100]
    prompts = load_dataset(DEMO / "eval/beavertails.jsonl").prompts[:4]
    sampling = Sampling(max_tokens=32)
    with Engine(MODEL, MODELS, template="tulu") as engine:
        ranking = engine.contrast(ranking_prompts, recipient="sft", donor="dpo", sampling=sampling)
        ranking.save("safety.safetensors")
        patch = Patch("base", "dpo", ranking, len(ranking) // 5)  # the top 20 % of the ranked neurons
        plain = engine.generate(prompts, "base", sampling)
        patched = engine.generate(prompts, patch, sampling)
    for prompt, before, after in zip(prompts, plain, patched, strict=True):
        print(prompt[-1]["content"])
        print("  base:   ", before.text)
        print("  patched:", after.text, f"({after.overwrites} overwrites)")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
