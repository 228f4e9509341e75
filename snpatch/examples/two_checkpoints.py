"""Patch between two checkpoints, as in Engine("Qwen/Qwen3-4B", models={"safe": "Qwen/Qwen3-4B-SafeRL"}).

    python two_checkpoints.py [FIRST SECOND]        # folders or hub names of one architecture

Without names it merges the demo's adapters with PEFT into two checkpoints, first-checkpoint/ and second-checkpoint/.
"""

import shutil
import sys
from pathlib import Path

from snpatch import Engine, Patch, Sampling, load_dataset
from snpatch.demo import DEMO_MODEL as DEMO


def write_demo_checkpoints() -> tuple[str, str]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    names = []
    for adapter, name in (("sft", "first-checkpoint"), ("dpo", "second-checkpoint")):  # dpo was trained on top of sft
        model = PeftModel.from_pretrained(model, DEMO / adapter).merge_and_unload()
        shutil.copytree(DEMO / "base", name, dirs_exist_ok=True)
        model.save_pretrained(name)
        names.append(str(Path(name).resolve()))
    return names[0], names[1]


def main() -> None:
    first, second = sys.argv[1:] or write_demo_checkpoints()
    ranking_prompts = load_dataset(DEMO / "contrast.jsonl").prompts[:50]
    prompts = load_dataset(DEMO / "eval/harmbench.jsonl").prompts[:4]
    sampling = Sampling(max_tokens=32)
    with Engine(first, models={"safe": second}) as engine:
        ranking = engine.contrast(ranking_prompts, recipient="base", donor="safe", sampling=sampling)
        for share in (0.0, 0.05, 0.2):
            patch = Patch("base", "safe", ranking, round(share * len(ranking)))
            for completion in engine.generate(prompts, patch, sampling):
                print(f"{share:4.0%}  {completion.text}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
