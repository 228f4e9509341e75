"""Sweep the number of patched neurons with random controls, judge the completions and plot the mean cost.

    python sweep_and_plot.py        # writes curve.png; completions are in sweep/, so the same command resumes

A lower cost is safer. The cost model ships with the demo model.
"""

import matplotlib.pyplot as plt

from snpatch import Engine, Sampling, SweepConfig, load_dataset, open_judge, sweep
from snpatch.demo import DEMO_MODEL as DEMO

NUM_PROMPTS = 20


def main() -> None:
    ranking_prompts = load_dataset(DEMO / "contrast.jsonl").prompts[:100]
    prompts = load_dataset(DEMO / "eval/beavertails.jsonl").prompts[:NUM_PROMPTS]
    sampling = Sampling(max_tokens=32)
    models = {"sft": DEMO / "sft", "dpo": [DEMO / "sft", DEMO / "dpo"]}
    with (
        Engine(DEMO / "base", models, template="tulu") as engine,
        open_judge(str(DEMO / "cost"), format="tulu") as cost,
    ):
        ranking = engine.contrast(ranking_prompts, recipient="sft", donor="dpo", sampling=sampling)
        windows = [round(share * len(ranking)) for share in (0, 0.02, 0.05, 0.1, 0.2, 0.4)]
        config = SweepConfig(("sft",), "dpo", windows, controls=2, sampling=sampling)
        result = sweep(engine, prompts, {"safety": ranking}, {"cost": cost}, config, store="sweep")
    lines = {
        "top k": (None, None),
        "random neurons": ("per_layer", 0),
        "random neurons, again": ("per_layer", 1),
        "largest activations": ("magnitude", None),
    }
    for label, control in lines.items():
        rows = result.line("cost", "sft", "safety", *control)
        points = [(row.rank_hi, row.mean) for row in rows if row.mean is not None]
        plt.plot([k for k, _ in points], [mean for _, mean in points], "o-", label=label)
    dpo = result.baseline("dpo", "cost").mean
    if dpo is not None:
        plt.axhline(dpo, linestyle=":", color="gray", label="dpo")
    plt.xlabel("patched neurons")
    plt.ylabel("mean cost")
    plt.legend()
    plt.savefig("curve.png")
    for row in result.line("cost", "sft", "safety"):
        print(f"k = {row.rank_hi:4d}: mean cost {row.mean:6.2f} ({row.mean_low:.2f} .. {row.mean_high:.2f})")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
